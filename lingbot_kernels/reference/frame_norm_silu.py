"""What stands between two convolutions of the video decoder, on one frame: bias, residual, RMSNorm, SiLU."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels.reference._common import accumulation_dtype


def unfold_parities(y: Tensor, channels: int) -> Tensor:
    """y [H/2 + 1, W/2 + 1, 4 * C] -> [H, W, C]: output pixel (2i + a, 2j + b) is group 2a + b of y[i + a, j + b]."""
    height, width = 2 * (y.shape[0] - 1), 2 * (y.shape[1] - 1)
    out = y.new_empty(height, width, channels)
    for a in range(2):
        for b in range(2):
            first = (2 * a + b) * channels
            out[a::2, b::2] = y[a : a + height // 2, b : b + width // 2, first : first + channels]
    return out


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
) -> None:
    """v = y + bias + residual + stream, each term where there is one; stream <- v; act <- f(v), in place.

    f(v) = v / max(||v||, 1e-12) * sqrt(C) * gamma over the channels where gamma is given, else v; then SiLU where
    asked. All of it in float32 (float64 for float64), rounded once for each output.

    Shapes: y [H, W, C], or [H/2 + 1, W/2 + 1, 4 * C] where `parities` (`unfold_parities`); bias, gamma [C], residual,
    stream, act [H, W, C].
    """
    wide = accumulation_dtype(y.dtype)
    channels = bias.shape[0]
    v = (unfold_parities(y, channels) if parities else y).to(wide) + bias.to(wide)
    if residual is not None:
        v = v + residual.to(wide)
    if stream is not None:
        if add_stream:
            v = v + stream.to(wide)
        stream.copy_(v)
    if act is None:
        return
    if gamma is not None:
        norm = v.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        v = v * (math.sqrt(channels) / norm) * gamma.to(wide)
    act.copy_(F.silu(v) if silu else v)
