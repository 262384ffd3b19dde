"""Rows of activations as int8 codes with a scale each, after random signs and a Hadamard rotation of their channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lingbot_kernels.reference._common import accumulation_dtype

ROTATION_BLOCK = 128  # channels that are rotated together
LARGEST_CODE = 127
# A row whose largest value lies below is a row of zeros: here 127 / amax and amax / 127 are still normal in float32.
SMALLEST_AMAX = 2.0**-119


def padded_width(width: int) -> int:
    """`width` channels, filled up to whole blocks of the rotation."""
    return -(-width // ROTATION_BLOCK) * ROTATION_BLOCK


def hadamard_blocks(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] times the Hadamard matrix of order 128 (Sylvester's) / sqrt(128), block by block; K a multiple of 128.

    Seven stages of (a + b, a - b), of values 1, 2, 4 ... 64 apart, each rounded in x's dtype, then one product with
    1 / sqrt(128) in that dtype: an implementation that keeps to this order has the same bits. Its own inverse.
    """
    value = x.reshape(-1, ROTATION_BLOCK)
    apart = 1
    while apart < ROTATION_BLOCK:
        a, b = value.unflatten(1, (-1, 2, apart)).unbind(2)
        value = torch.stack([a + b, a - b], dim=2).flatten(1)
        apart *= 2
    # Filled on the device, where a CUDA graph may be capturing: a tensor made of a Python number would be copied there.
    return (value * value.new_full((), 1 / math.sqrt(ROTATION_BLOCK))).reshape(x.shape)


def rotated(x: torch.Tensor, signs: torch.Tensor | None, rotate: bool) -> torch.Tensor:
    """x [..., K] in its dtype, times signs, rotated: [..., Kp], zeros from channel K on before the rotation."""
    width = x.shape[-1]
    value = F.pad(x, (0, padded_width(width) - width))
    if signs is not None:
        value = value * signs.to(value.dtype)
    return hadamard_blocks(value) if rotate else value


def quantize_rows(
    value: torch.Tensor, signs: torch.Tensor | None = None, rotate: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [..., Kp], scale float32 [...]) of rows [..., K] in an accumulation dtype, float32 or float64.

    scale = amax / 127, code = round(value * (127 / amax)), ties to even, of the rotated row; amax is its largest
    magnitude, and each operation is rounded for itself. A row of zeros (amax < 2**-119) has scale 0; one with a NaN or
    Inf has scale NaN; the codes of both are 0, so that a product with the row is 0, or NaN.
    """
    return quantize_values(rotated(value, signs, rotate))


def quantize_values(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 like value, scale float32 [...]) of rows [..., K] as they are, as `quantize_rows` says."""
    amax = value.abs().amax(-1) if value.shape[-1] else value.new_zeros(value.shape[:-1])
    usable = (amax >= SMALLEST_AMAX) & amax.isfinite()
    largest = torch.full_like(amax, LARGEST_CODE)  # a tensor: by a number torch may multiply with its reciprocal
    inverse = torch.where(usable, largest / amax, 0)
    codes = torch.where(usable.unsqueeze(-1), (value * inverse.unsqueeze(-1)).round(), 0)
    scale = torch.where(usable, amax / largest, torch.where(amax < SMALLEST_AMAX, 0.0, math.nan))
    return codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale.float()


def rotate_quantize(
    x: torch.Tensor, signs: torch.Tensor | None = None, rotate: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [B, S, Kp], scale float32 [B, S]) of x [B, S, K], Kp = K filled up to a multiple of 128.

    The row times `signs` (int8 [Kp] of +-1; None: all +1), then, with `rotate`, times the Hadamard matrix of each block
    of 128, then as `quantize_rows` says. Arithmetic is float32, float64 for float64 x.
    """
    return quantize_rows(x.to(accumulation_dtype(x.dtype)), signs, rotate)
