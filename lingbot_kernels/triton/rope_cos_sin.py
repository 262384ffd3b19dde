"""RoPE table of any run of tokens of a (frame, row, column) grid, from token indices alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lingbot_kernels.reference.rope_cos_sin import rope_frequencies
from lingbot_kernels.triton._launch import launch


@triton.jit
def sin_cos(angle):
    """(sin, cos) of float64 angles, 0 <= angle < 1e8, to about 1e-15.

    angle = k * pi/2 + r with |r| <= pi/4; pi/2 comes in three parts of 33 bits, so that the leading products are exact;
    Taylor series of r, whose first neglected terms are r^17 / 17! and r^16 / 16!.
    """
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - k * 1.5707963267341256
    r = r - k * 6.077100506303966e-11
    r = r - k * 2.0222662487959506e-21
    z = r * r
    s = 1 / 6227020800 - z * (1 / 1307674368000)
    s = -1 / 39916800 + z * s
    s = 1 / 362880 + z * s
    s = -1 / 5040 + z * s
    s = 1 / 120 + z * s
    s = -1 / 6 + z * s
    s = r + r * z * s
    c = -1 / 87178291200 * z + 1 / 479001600
    c = -1 / 3628800 + z * c
    c = 1 / 40320 + z * c
    c = -1 / 720 + z * c
    c = 1 / 24 + z * c
    c = -0.5 + z * c
    c = 1.0 + z * c
    quadrant = k.to(tl.int64)
    odd = (quadrant & 1) != 0
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where((quadrant & 2) != 0, -sin, sin), tl.where(((quadrant + 1) & 2) != 0, -cos, cos)


@triton.jit(do_not_specialize=["num_tokens", "frame_start", "offset", "frame_stride", "width"])
def rope_cos_sin_kernel(
    out_ptr,
    frequencies_ptr,
    num_tokens,
    frame_start,
    offset,
    frame_stride,
    width,
    TEMPORAL: tl.constexpr,
    SPATIAL: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out[i] = cos(angle) | sin(angle), angle[j] = position[j] * frequency[j], j < PAIRS, in float64, rounded once

    position is the frame for the first TEMPORAL pairs, the row for the next SPATIAL, the column for the rest, of token
    n = frame_start * frame_stride + offset + i; out float32 [num_tokens, 2 * PAIRS]. Programs: tokens / BLOCK_TOKENS.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pair = tl.arange(0, BLOCK_PAIRS)
    n = offset + token
    frame = (frame_start + n // frame_stride)[:, None]
    row = (n % frame_stride // width)[:, None]
    column = (n % frame_stride % width)[:, None]
    position = tl.where(pair < TEMPORAL, frame, tl.where(pair < TEMPORAL + SPATIAL, row, column))
    frequency = tl.load(frequencies_ptr + pair, mask=pair < PAIRS, other=0.0)
    sin, cos = sin_cos(position.to(tl.float64) * frequency)
    mask = (token < num_tokens)[:, None] & (pair < PAIRS)
    out = out_ptr + token.to(tl.int64)[:, None] * (2 * PAIRS) + pair
    tl.store(out, cos.to(tl.float32), mask=mask)
    tl.store(out + PAIRS, sin.to(tl.float32), mask=mask)


@dataclass(frozen=True)
class RopeCosSinConfig:
    """A program makes `tokens` rows of `pairs` (a power of two) pairs."""

    num_warps: int
    tokens: int
    pairs: int


def launch_config(head_dim: int) -> RopeCosSinConfig:
    """Tiles of one angle a thread: many small programs hide the latency of float64 series."""
    pairs = triton.next_power_of_2(head_dim // 2)
    return RopeCosSinConfig(num_warps=4, tokens=max(1, 128 // pairs), pairs=pairs)


@lru_cache(maxsize=32)
def frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """float64 [head_dim / 2] on the device, made once: not during the capture of a CUDA graph."""
    t, h, w = rope_frequencies(head_dim, theta)
    return torch.tensor(t + h + w, dtype=torch.float64, device=device)


def why_not(head_dim: int) -> str | None:
    """Why this kernel can't serve this head_dim, or None."""
    return None if head_dim <= 1024 else f"head_dim is {head_dim}, must be at most 1024"


def rope_cos_sin(
    out: torch.Tensor,
    token_start: int,
    frame_stride: int,
    width: int,
    theta: float,
    *,
    config: RopeCosSinConfig | None = None,
) -> None:
    """Fill out float32 [num_tokens, head_dim], contiguous, with cos‖sin of tokens token_start onwards."""
    num_tokens, head_dim = out.shape
    config = config or launch_config(head_dim)
    spatial = head_dim // 6
    launch(
        rope_cos_sin_kernel,
        (-(-num_tokens // config.tokens),),
        (out, frequencies(head_dim, theta, out.device)),
        (num_tokens, token_start // frame_stride, token_start % frame_stride, frame_stride, width),
        (),
        {
            "TEMPORAL": head_dim // 2 - 2 * spatial,
            "SPATIAL": spatial,
            "PAIRS": head_dim // 2,
            "BLOCK_PAIRS": config.pairs,
            "BLOCK_TOKENS": config.tokens,
        },
        config.num_warps,
    )
