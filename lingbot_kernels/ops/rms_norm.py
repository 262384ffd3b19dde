"""RMSNorm over the whole row: the norm of cross-attention's Q and K."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register


def _check_arguments(x: Tensor, weight: Tensor) -> None:
    _check.tokens("x", x)
    _check.weight("weight", weight, x.shape[2], x)


def _run(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    _check_arguments(x, weight)
    batch, num_tokens, dim = x.shape
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    y = torch.empty_like(x)
    if backend == "triton":
        from lingbot_kernels.triton import rms_norm as kernel

        _dispatch.demand("rms_norm", "triton", kernel.why_not(x))
        kernel.rms_norm(x, weight, y, eps)
    else:
        _native.launch(
            backend, "rms_norm", x.device,
            *_native.rows(x), weight.data_ptr(), y.data_ptr(), batch, num_tokens, dim, _native.DTYPE_CODES[x.dtype],
            eps,
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    _check_arguments(x, weight)
    return x.new_empty(x.shape)


_op = register(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> Tensor",
    _run,
    _fake,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """y = T(T(x32 * rsqrt(mean(x32^2) + eps)) * weight) [B, S, D]: RMSNorm (Zhang and Sennrich 2019) with the two
    roundings of the official model.

    Args:
        x: [B, S, D], bfloat16, float16 or float32 (float64 by the reference), unit inner stride.
        weight: [D], of x's dtype.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    chosen = _dispatch.resolve_tokens("rms_norm", backend, x)
    return _op(x, weight, eps, chosen)
