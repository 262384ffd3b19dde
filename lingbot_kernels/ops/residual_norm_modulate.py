"""Residual addition and the modulated layer norm that follows it, in one pass."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan


def _check_arguments(x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None) -> None:
    _check.residual("x", x, "delta", delta)
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None:
            _check.modulation(name, vector, x)


def _plan(
    x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None, backend: str
) -> Plan:
    _check_arguments(x, delta, shift, scale, gate)
    if backend == "reference":
        return Plan(reference.residual_norm_modulate, ("x", "delta", "shift", "scale", "eps", "gate"))
    outputs = (Output("x_out", like="x"), Output("y", like="delta"))
    if backend == "triton":
        from lingbot_kernels.triton import residual_norm_modulate as kernel

        _dispatch.demand("residual_norm_modulate", "triton", kernel.why_not(x, delta))
        arguments = ("x", "delta", "gate", "shift", "scale", "x_out", "y", "eps")
        return Plan(kernel.residual_norm_modulate, arguments, outputs)
    codes = _native.DTYPE_CODES
    fields = (
        "x", "delta", *_native.vector("gate", gate), *_native.vector("shift", shift), *_native.vector("scale", scale),
        "x_out", "y", *x.shape, codes[x.dtype], codes[delta.dtype], "eps",
    )  # fmt: skip
    return _native.plan("residual_norm_modulate", backend, fields, outputs)


def _fake(
    x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check_arguments(x, delta, shift, scale, gate)
    return x.new_empty(x.shape), delta.new_empty(x.shape)


_op = register_kernel(
    "residual_norm_modulate(Tensor x, Tensor delta, Tensor shift, Tensor scale, float eps, Tensor? gate, str backend) "
    "-> (Tensor, Tensor)",
    _plan,
    _fake,
    place=lambda x, *_: _dispatch.place(x),
)


def residual_norm_modulate(
    x: Tensor,
    delta: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    gate: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out = x + delta * gate; y = layer_norm(x_out) * (1 + scale) + shift. Returns (x_out, y), both [B, S, D].

    Arithmetic is float32. x_out is rounded to x's dtype first and the norm sees the rounded value, so that the fused
    pass equals the two passes; y is rounded to delta's dtype once.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what the residual branch gave.
        shift, scale, gate: float32 [D] or [B, D] (float64 where x is); gate None is a gate of one.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, delta, shift, scale, eps, gate)
