"""What the quantising passes share: a row in registers, rotated, as int8 codes with one scale.

The definition is `lingbot_kernels.reference.rotate_quantize`; the rotation keeps to its order and has its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.reference.rotate_quantize import ROTATION_BLOCK, SMALLEST_AMAX, padded_width
from lingbot_kernels.triton._rows import (
    INTERPRETED,
    MAX_DIM,
    RowConfig,
    load_chunk,
    row_config,
    store_chunk,
    why_not_rows,
)

BLOCK: tl.constexpr = tl.constexpr(ROTATION_BLOCK)
STAGES: tl.constexpr = tl.constexpr(ROTATION_BLOCK.bit_length() - 1)
NORMALISER: tl.constexpr = tl.constexpr(1 / ROTATION_BLOCK**0.5)
SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_AMAX)
NO_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)
QUARTER = 4  # values of a chunk in a thread
# 1.5 * 2**23: added to a float of a magnitude up to 127, it rounds it to the integer in the sum's low byte.
TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def rotate_chunk(value, CHUNK: tl.constexpr):
    """float32 [CHUNK] times the Hadamard matrix / sqrt(128), block by block: the definition's seven stages.

    A value's partner is what the exclusive or of both leaves once the value is taken out: one shuffle between lanes,
    nothing within a thread. The sign +-1 makes (a + b, a - b) of both lanes one fma, which rounds once.
    """
    for stage in tl.static_range(STAGES):
        pairs = value.reshape(CHUNK // (2 << stage), 2, 1 << stage)
        bits = pairs.to(tl.int32, bitcast=True)
        partner = (bits ^ tl.reduce(bits, 1, _xor, keep_dims=True)).to(tl.float32, bitcast=True)
        sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, :, None]
        value = tl.fma(pairs, tl.broadcast_to(sign, pairs.shape), partner).reshape(CHUNK)
    return value * NORMALISER


@triton.jit
def to_codes(value, inverse):
    """round(value * inverse) as int8, ties to even, the product rounded to float32 first; |result| <= 127."""
    if INTERPRETED:
        return ((value * inverse + TO_INTEGER).to(tl.int32, bitcast=True) & 0xFF).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 a, b, c, d;
            .reg .b32 low, high;
            mul.rn.f32 a, $1, $5;
            mul.rn.f32 b, $2, $6;
            mul.rn.f32 c, $3, $7;
            mul.rn.f32 d, $4, $8;
            add.rn.f32 a, a, 0f4B400000;
            add.rn.f32 b, b, 0f4B400000;
            add.rn.f32 c, c, 0f4B400000;
            add.rn.f32 d, d, 0f4B400000;
            prmt.b32 low, a, b, 0x0040;
            prmt.b32 high, c, d, 0x0040;
            prmt.b32 $0, low, high, 0x5410;
            }
            """,
            "=r,f,f,f,f,f,f,f,f",
            [value, inverse],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def quantize_store(
    codes_ptr,
    scale_ptr,
    row,
    signs_ptr,
    ROTATE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """codes [PADDED], scale = the row's: float32 row of DIM values as chunks, times signs, rotated with ROTATE.

    CHUNK is a multiple of 128. Chunks that begin beyond DIM hold nothing but the padding.
    """
    rotated = ()
    largest = tl.zeros([CHUNK], tl.int32)
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        value = row[i]
        if (i + 1) * CHUNK > DIM:
            value = tl.where(i * CHUNK + tl.arange(0, CHUNK) < DIM, value, 0.0)
        if signs_ptr is not None:
            value *= load_chunk(signs_ptr, i, PADDED, CHUNK, "evict_last").to(tl.float32)
        if ROTATE:
            value = rotate_chunk(value, CHUNK)
        # As integers, magnitudes are in the same order, and Inf and NaN above all of them.
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & NO_SIGN)
        rotated = rotated + (value,)  # type: ignore[assignment]  # noqa: RUF005
    amax_bits = tl.max(largest)
    amax = amax_bits.to(tl.float32, bitcast=True)
    finite = amax_bits < INFINITY_BITS
    usable = finite & (amax >= SMALLEST)
    inverse = tl.math.div_rn(127.0, tl.where(usable, amax, 1.0))
    scale = tl.math.div_rn(tl.where(usable, amax, 0.0), 127.0)
    tl.store(scale_ptr, tl.where(finite, scale, float("nan")))
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        codes = to_codes(tl.where(usable, rotated[i], 0.0), tl.broadcast_to(inverse, [CHUNK]))
        store_chunk(codes_ptr, codes, i, PADDED, CHUNK, MODIFIER)


def quantizing_config(dim: int, warps: int | None = None) -> RowConfig:
    """Configuration of a pass that leaves rows of `dim` values as codes: a thread has four neighbours of each chunk.

    A row is held in float32 while it is rotated: with fewer values a thread more rows are in flight.
    """
    return row_config(dim, QUARTER, warps, streaming=False)


def why_not_quantized(dim: int, **tensors: torch.Tensor | None) -> str | None:
    """Why rows of `dim` values of these tensors can't be quantised, or None."""
    if padded_width(dim) > MAX_DIM:
        return f"D is {dim}, must be at most {MAX_DIM}"
    return why_not_rows(dim, **tensors)
