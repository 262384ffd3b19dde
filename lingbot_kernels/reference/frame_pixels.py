"""The last step of the video decoder, on one frame: three temporal taps summed to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_pixels(taps: Tensor, bias: Tensor, partial: Tensor, frame: Tensor) -> None:
    """A frame of the last convolution from its three temporal taps, which came as 3 * C output channels, in place:

    pixel = taps[2C:3C] + partial[0] + bias; partial[0] <- taps[C:2C] + partial[1]; partial[1] <- taps[0:C].

    frame <- clamp(pixel, -1, 1), or where frame is uint8 floor(127.5 * that + 128).

    Shapes: taps [H, W, >= 3 * C], bias [C], partial [2, H, W, C], frame [H, W, C].
    """
    channels = bias.shape[0]
    first, second, third = (taps[..., k * channels : (k + 1) * channels].to(partial.dtype) for k in range(3))
    pixel = (third + partial[0] + bias.to(partial.dtype)).clamp(-1, 1)
    torch.add(second, partial[1], out=partial[0])
    partial[1].copy_(first)
    frame.copy_((pixel * 127.5 + 128).floor().clamp(0, 255) if frame.dtype == torch.uint8 else pixel)
