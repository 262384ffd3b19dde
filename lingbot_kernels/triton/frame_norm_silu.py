"""What stands between two convolutions of the video decoder: bias, residual, RMSNorm and SiLU of a frame's pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# The interpreter has no inline assembly.
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) within 3 float32 ulp, by the unit for special functions without its range checks: both ends are
    right, 0 where exp(-x) overflows.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.ftz.f32 e, e, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, e; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit(do_not_specialize=["pixels", "width"])
def frame_norm_silu_kernel(
    y_ptr,
    bias_ptr,
    residual_ptr,
    stream_ptr,
    gamma_ptr,
    act_ptr,
    pixels,
    width,
    y_row,
    y_pixel,
    residual_row,
    residual_pixel,
    stream_row,
    stream_pixel,
    act_row,
    act_pixel,
    root,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    ADD_STREAM: tl.constexpr,
    SILU: tl.constexpr,
    PARITIES: tl.constexpr,
):
    """v = y + bias + residual + stream; stream = v; act = SiLU(v / max(||v||, 1e-12) * root * gamma), root = sqrt(C)

    y, residual, stream, act: [pixels / width, width, C] by row and pixel strides, unit channel stride; tensors that are
    None leave their part out. PARITIES: y is [H / 2 + 1, W / 2 + 1, 4 * C]. A program serves BLOCK_PIXELS pixels.
    """
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    # Vectors are loaded with one dimension: a load of [1, C] would decide the layout of the whole tile.
    channels = tl.arange(0, BLOCK_CHANNELS)
    channel = channels[None, :]
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)
    row = (pixel // width).to(tl.int64)
    column = pixel % width
    if PARITIES:
        odd_row, odd_column = row & 1, column & 1
        start = ((row >> 1) + odd_row) * y_row + ((column >> 1) + odd_column) * y_pixel
        start += (2 * odd_row + odd_column) * CHANNELS
    else:
        start = row * y_row + column * y_pixel
    v = tl.load(y_ptr + start[:, None] + channel, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias_ptr + channels, mask=channels < CHANNELS, other=0.0)[None, :]
    if residual_ptr is not None:
        at = (row * residual_row + column * residual_pixel)[:, None] + channel
        v += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if stream_ptr is not None:
        at = (row * stream_row + column * stream_pixel)[:, None] + channel
        if ADD_STREAM:
            v += tl.load(stream_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream_ptr + at, v.to(stream_ptr.dtype.element_ty), mask=inside)
    if act_ptr is not None:
        if gamma_ptr is not None:
            scale = root * tl.rsqrt(tl.maximum(tl.sum(v * v, 1, keep_dims=True), 1e-24))
            gamma = tl.load(gamma_ptr + channels, mask=channels < CHANNELS, other=0.0)
            v = v * scale * gamma[None, :]
        if SILU:
            v = v * sigmoid(v)
        at = (row * act_row + column * act_pixel)[:, None] + channel
        tl.store(act_ptr + at, v.to(act_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class FrameConfig:
    """Launch configuration: channels are padded to a power of two; a tile is `pixels` of them."""

    block_channels: int
    pixels: int
    num_warps: int


TILE = 4096  # values a program holds: 32 a thread of 4 warps
MAX_CHANNELS = 4096


def launch_config(channels: int) -> FrameConfig:
    """Configuration for pixels of `channels` values."""
    block = triton.next_power_of_2(channels)
    return FrameConfig(block, max(1, TILE // block), 4)


def why_not(y: Tensor, bias: Tensor) -> str | None:
    """Why this kernel can't serve y, or None."""
    if y.dtype == torch.float64:
        return "serves bfloat16, float16 and float32, not float64"
    if bias.shape[0] > MAX_CHANNELS:
        return f"holds a pixel's channels in registers: at most {MAX_CHANNELS}, not {bias.shape[0]}"
    return None


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def frame_norm_silu(
    y: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stream: Tensor | None,
    gamma: Tensor | None,
    act: Tensor | None,
    add_stream: bool,
    silu: bool,
    parities: bool,
    *,
    config: FrameConfig | None = None,
) -> None:
    """Fill `stream` and `act`; shapes as in `lingbot_kernels.reference.frame_norm_silu`, unit channel strides."""
    channels = bias.shape[0]
    height, width = (2 * (n - 1) for n in y.shape[:2]) if parities else y.shape[:2]
    pixels = height * width
    if pixels == 0:
        return
    config = config or launch_config(channels)
    frame_norm_silu_kernel[(triton.cdiv(pixels, config.pixels),)](
        y,
        bias,
        residual,
        stream,
        gamma,
        act,
        pixels,
        width,
        *_strides(y),
        *_strides(residual),
        *_strides(stream),
        *_strides(act),
        math.sqrt(channels),
        CHANNELS=channels,
        BLOCK_CHANNELS=config.block_channels,
        BLOCK_PIXELS=config.pixels,
        ADD_STREAM=add_stream,
        SILU=silu,
        PARITIES=parities,
        num_warps=config.num_warps,
    )
