"""Residual addition and the modulated layer norm that follows it, in one pass."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op


@kernel_op("residual_norm_modulate", returns=("x_out", "y"))
def _op(x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None) -> Launch:
    _check.residual("x", x, "delta", delta)
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None:
            _check.modulation(name, vector, x)
    return Launch([Output(x), Output(delta)], {**sizes(x), "residual_dtype": x.dtype, "dtype": delta.dtype})


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
