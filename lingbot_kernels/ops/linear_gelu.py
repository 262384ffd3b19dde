"""A linear layer with GELU(tanh) in the epilogue of its matrix product, where the library has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu_tanh(x @ weight.T + bias): x [..., K], weight [N, K], bias [N], all of one dtype; returns [..., N].

    On CUDA the activation runs in cuBLASLt's epilogue, on the float32 accumulator, so that the [..., N] intermediate is
    neither written nor rounded. GELU's tanh form is Hendrycks and Gimpel 2016, section 2.

    Args:
        backend: "reference", or "auto" for torch's libraries.

    Raises:
        ValueError, TypeError: naming the argument.
        BackendUnavailable: any other backend is asked for; matrix products are a library's.
    """
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, must be [N, K] for x {list(x.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, must be {list(weight.shape[:1])}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand.dtype != x.dtype or operand.device != x.device:
            raise TypeError(f"{name}: got {_check.describe(operand)}, must be {x.dtype} on {x.device}")
    requested = _dispatch.requested_backend() if backend is None else backend
    if requested == "reference":
        return reference.linear_gelu(x, weight, bias)
    if backend not in (None, "auto"):
        _dispatch.resolve("linear_gelu", backend, x.device.type, x.dtype)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        rows = x.reshape(-1, x.shape[-1])
        return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
