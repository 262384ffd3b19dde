"""`residual_norm_modulate` whose norm leaves as int8 codes with a scale, for the product of int8 that follows."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops._quantized import codes_of


@kernel_op("residual_norm_modulate_quantize", returns=("x_out", "codes", "row_scale"))
def _op(
    x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None, signs: Tensor | None,
    rotate: bool,
) -> Launch:  # fmt: skip
    _check.residual("x", x, "delta", delta)
    _check.modulation("shift", shift, x)
    _check.modulation("scale", scale, x)
    if gate is not None:
        _check.modulation("gate", gate, x)
    outputs = [Output(x), *codes_of(x, signs)]
    return Launch(outputs, {**sizes(x), "residual_dtype": x.dtype, "dtype": delta.dtype})


def residual_norm_modulate_quantize(
    x: Tensor,
    delta: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    gate: Tensor | None = None,
    signs: Tensor | None = None,
    rotate: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_out = x + delta * gate, and `rotate_quantize` of y = layer_norm(x_out) * (1 + scale) + shift. Returns
    (x_out [B, S, D], codes int8 [B, S, Dp], row_scale float32 [B, S]).

    x_out is that of `residual_norm_modulate`, rounded to x's dtype, and the norm sees the rounded value. y is the
    float32 value, never rounded to delta's dtype.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what the residual branch gave.
        shift, scale, gate: float32 [D] or [B, D] (float64 where x is); gate None is a gate of one.
        signs, rotate: as in `rotate_quantize`.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, delta, shift, scale, eps, gate, signs, rotate)
