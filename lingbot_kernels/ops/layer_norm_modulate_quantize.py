"""`layer_norm_modulate` whose row leaves as int8 codes with a scale: what opens a block before int8 weights."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, sizes
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops._quantized import codes_of


@kernel_op("layer_norm_modulate_quantize", returns=("codes", "row_scale"))
def _op(x: Tensor, shift: Tensor, scale: Tensor, eps: float, signs: Tensor | None, rotate: bool) -> Launch:
    _check.tokens("x", x)
    _check.contiguous("x", x)
    _check.modulation("shift", shift, x)
    _check.modulation("scale", scale, x)
    return Launch(codes_of(x, signs), {**sizes(x), "residual_dtype": x.dtype})


def layer_norm_modulate_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    signs: Tensor | None = None,
    rotate: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rotate_quantize` of y = layer_norm(x) * (1 + scale) + shift: (codes int8 [B, S, Dp], row_scale float32 [B, S]).

    y is the float32 value, never rounded to x's dtype: one rounding less than the two ops one after the other.

    Args:
        x: residual stream [B, S, D], contiguous.
        shift, scale: float32 [D] or [B, D] (float64 where x is).
        signs, rotate: as in `rotate_quantize`.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, shift, scale, eps, signs, rotate)
