"""RMSNorm over the whole row: the norm of cross-attention's Q and K."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan


def _check_arguments(x: Tensor, weight: Tensor) -> None:
    _check.tokens("x", x)
    _check.weight("weight", weight, x.shape[2], x)


def _plan(x: Tensor, weight: Tensor, eps: float, backend: str) -> Plan:
    _check_arguments(x, weight)
    batch, num_tokens, dim = x.shape
    if backend == "reference":
        return Plan(reference.rms_norm, ("x", "weight", "eps"))
    outputs = (Output("y", like="x"),)
    if backend == "triton":
        from lingbot_kernels.triton import rms_norm as kernel

        _dispatch.demand("rms_norm", "triton", kernel.why_not(x))
        return Plan(kernel.rms_norm, ("x", "weight", "y", "eps"), outputs)
    fields = (
        *_native.rows("x", x), "weight", "y", batch, num_tokens, dim, _native.DTYPE_CODES[x.dtype], "eps",
    )  # fmt: skip
    return _native.plan("rms_norm", backend, fields, outputs)


def _fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    _check_arguments(x, weight)
    return x.new_empty(x.shape)


_op = register_kernel(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> Tensor",
    _plan,
    _fake,
    place=lambda x, *_: _dispatch.place(x),
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
    return _op(backend, x, weight, eps)
