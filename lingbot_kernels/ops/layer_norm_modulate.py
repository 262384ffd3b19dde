"""Layer norm and the timestep's scale and shift, in one pass: what opens a block and the head."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan


def _check_arguments(x: Tensor, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> None:
    _check.tokens("x", x)
    _check.contiguous("x", x)
    _check.modulation("shift", shift, x)
    _check.modulation("scale", scale, x)
    if out_dtype != x.dtype and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out_dtype: got {out_dtype}, must be x's {x.dtype}, since only a float32 x may be narrowed")


def _plan(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> Plan:
    _check_arguments(x, shift, scale, out_dtype)
    if backend == "reference":
        return Plan(partial(reference.layer_norm_modulate, out_dtype=out_dtype), ("x", "shift", "scale", "eps"))
    outputs = (Output("y", like="x", dtype=out_dtype),)
    if backend == "triton":
        from lingbot_kernels.triton import layer_norm_modulate as kernel

        _dispatch.demand("layer_norm_modulate", "triton", kernel.why_not(x, x.new_empty(0, dtype=out_dtype)))
        return Plan(kernel.layer_norm_modulate, ("x", "shift", "scale", "y", "eps"), outputs)
    codes = _native.DTYPE_CODES
    fields = (
        "x", *_native.vector("shift", shift), *_native.vector("scale", scale), "y",
        *x.shape, codes[x.dtype], codes[out_dtype], "eps",
    )  # fmt: skip
    return _native.plan("layer_norm_modulate", backend, fields, outputs)


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> Tensor:
    _check_arguments(x, shift, scale, out_dtype)
    return x.new_empty(x.shape, dtype=out_dtype)


_op = register_kernel(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype, str backend) -> Tensor",
    _plan,
    _fake,
    place=lambda x, *_: _dispatch.place(x),
)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = layer_norm(x) * (1 + scale) + shift [B, S, D], the norm without parameters, all in float32, one rounding.

    Adaptive layer norm as in DiT (Peebles and Xie 2023).

    Args:
        x: residual stream [B, S, D], contiguous.
        shift, scale: float32 [D] or [B, D] (float64 where x is).
        out_dtype: dtype of y; x's own where None. Only a float32 x may be narrowed.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, shift, scale, eps, out_dtype or x.dtype)
