"""A linear layer of int8 rows and int8 weights, exact up to its epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lingbot_kernels.reference._common import accumulation_dtype

ACTIVATIONS = (None, "gelu_tanh")


def int8_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The exact int32 sums x w^T of int8 x [..., K] and w [N, K]: [..., N].

    In float64, which holds every partial sum: 128 * 128 * K < 2**53.
    """
    return F.linear(x.double(), w.double()).to(torch.int32)


def int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """activation(acc * (x_scale * w_scale) + bias), [B, S, N], of acc = x w^T in int32.

    x int8 [B, S, K], x_scale float32 [B, S]; w int8 [N, K], w_scale float32 [N]; bias [N]; activation None or
    "gelu_tanh". The epilogue is float32 (float64 for a float64 result), rounded once, to `out_dtype`.
    """
    accumulate = accumulation_dtype(out_dtype)
    scale = x_scale.to(accumulate).unsqueeze(-1) * w_scale.to(accumulate)
    y = int8_product(x, w).to(accumulate) * scale
    if bias is not None:
        y = y + bias.to(accumulate)
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation is not None:
        raise ValueError(f"activation: got {activation!r}, must be one of {ACTIVATIONS}")
    return y.to(out_dtype)
