"""Rows of activations as int8 codes with a scale each, after random signs and a Hadamard rotation of their channels."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, sizes
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops._quantized import codes_of


@kernel_op("rotate_quantize", returns=("codes", "row_scale"))
def _op(x: Tensor, signs: Tensor | None, rotate: bool) -> Launch:
    _check.tokens("x", x)
    return Launch(codes_of(x, signs), {**sizes(x), "dtype": x.dtype})


def rotate_quantize(
    x: Tensor, signs: Tensor | None = None, rotate: bool = True, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(codes int8 [B, S, Dp], row_scale float32 [B, S]) of x, Dp = D filled up with zeros to a multiple of 128.

    u = x * signs; with `rotate`, u times the Hadamard matrix (Sylvester's order) / sqrt(128), block of 128 channels by
    block; amax = the row's largest magnitude; row_scale = amax / 127; codes = round(u * (127 / amax)), ties to even. It
    is all float32 in one order of operations: the same bits from every backend. codes * row_scale is the rotated row to
    half a row_scale, and a product of it with weights rotated alike is that of x (Ashkboos et al. 2024, QuaRot).

    A row of zeros (amax below 2**-119) has row_scale 0, one with a NaN or Inf has row_scale NaN; the codes of both are
    0, so that what is multiplied with the row becomes 0, or NaN.

    Args:
        x: [B, S, D], D at least 1; rows may lie apart.
        signs: int8 [Dp] of +1 and -1, contiguous; None is +1 throughout.
        rotate: False leaves the Hadamard matrix out.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, signs, rotate)
