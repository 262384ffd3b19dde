"""The last step of the video decoder: three temporal taps summed to the pixels of a frame."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["values", "width"])
def frame_pixels_kernel(
    taps_ptr,
    bias_ptr,
    partial_ptr,
    frame_ptr,
    values,
    width,
    taps_row,
    taps_pixel,
    CHANNELS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pixel = taps[2C:3C] + partial[0] + bias; partial[0] = taps[C:2C] + partial[1]; partial[1] = taps[0:C]

    taps [H, width, >= 3C] by row and pixel strides; partial [2, H, width, C] and frame [H, width, C] contiguous,
    `values` values each. BYTES: the frame is uint8.
    """
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = value < values
    pixel, channel = value // CHANNELS, value % CHANNELS
    tap = taps_ptr + (pixel // width) * taps_row + (pixel % width) * taps_pixel + channel
    first = tl.load(tap, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(tap + CHANNELS, mask=inside, other=0.0).to(tl.float32)
    third = tl.load(tap + 2 * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    near = tl.load(partial_ptr + value, mask=inside, other=0.0)
    far = tl.load(partial_ptr + values + value, mask=inside, other=0.0)
    v = third + near + tl.load(bias_ptr + channel, mask=inside, other=0.0)
    v = tl.minimum(tl.maximum(v, -1.0), 1.0)
    if BYTES:
        v = tl.floor(v * 127.5 + 128.0)
        v = tl.minimum(tl.maximum(v, 0.0), 255.0)
    tl.store(partial_ptr + value, second + far, mask=inside)
    tl.store(partial_ptr + values + value, first, mask=inside)
    tl.store(frame_ptr + value, v.to(frame_ptr.dtype.element_ty), mask=inside)


def why_not(partial: Tensor) -> str | None:
    """Why this kernel can't serve, or None."""
    return "serves bfloat16, float16 and float32, not float64" if partial.dtype == torch.float64 else None


def frame_pixels(taps: Tensor, bias: Tensor, partial: Tensor, frame: Tensor) -> None:
    """Fill `frame` and `partial`; shapes as in `lingbot_kernels.reference.frame_pixels`."""
    values = frame.numel()
    if values == 0:
        return
    frame_pixels_kernel[(triton.cdiv(values, BLOCK),)](
        taps,
        bias,
        partial,
        frame,
        values,
        frame.shape[1],
        taps.stride(0),
        taps.stride(1),
        CHANNELS=bias.shape[0],
        BYTES=frame.dtype == torch.uint8,
        BLOCK=BLOCK,
        num_warps=4,
    )
