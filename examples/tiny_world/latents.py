"""Pictures to latents and back by a fixed transform: 2 x 2 pixels of (red, green, blue, nearness) are the 16 channels
of a latent position, shifted and scaled to about unit variance. One latent frame is one frame of the picture.

The transform moves numbers about and scales them, so that it loses nothing: 8-bit pictures come back bit for bit. The
noise of flow matching stays white in the pixels, and the loss is the error of the picture.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIDE = 2  # pixels, each way, of one latent position
CHANNELS = 4 * SIDE * SIDE
MASK_CHANNELS = 4
# Of random walks in the default scene: red, green, blue, nearness. Gray is zero, as in the library's image condition.
_MEAN = (0.5, 0.5, 0.5, 0.25)
_STD = (0.21, 0.21, 0.21, 0.17)


@functools.lru_cache(maxsize=16)
def _scales(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype, device=device).view(4, 1, 1, 1) for values in (_MEAN, _STD))
    return mean, std


def encode(pixels: Tensor) -> Tensor:
    """[B, 4, F, H, W] red, green, blue from 0 to 1 and nearness -> latents [B, 16, F, H / 2, W / 2]."""
    mean, std = _scales(pixels.dtype, str(pixels.device))
    batch, planes, frames, height, width = pixels.shape
    if planes != 4 or height % SIDE or width % SIDE:
        raise ValueError(f"pixels: got shape {list(pixels.shape)}, must be [B, 4, F, H, W] with even H and W")
    cells = ((pixels - mean) / std).view(batch, 4, frames, height // SIDE, SIDE, width // SIDE, SIDE)
    return cells.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)


def decode(latents: Tensor) -> Tensor:
    """The inverse of `encode`."""
    batch, _, frames, rows, columns = latents.shape
    cells = latents.view(batch, 4, SIDE, SIDE, frames, rows, columns).permute(0, 1, 4, 5, 2, 6, 3)
    mean, std = _scales(latents.dtype, str(latents.device))
    return cells.reshape(batch, 4, frames, rows * SIDE, columns * SIDE) * std + mean


def image_condition(first: Tensor, frames: int) -> Tensor:
    """[B, 4 + 16, frames, h, w] for a world that begins with latents `first` [B, 16, 1, h, w]: a mask that is one in
    the first frame, then the first frame's latents, zeros (gray) after it. The library's order and format.
    """
    known = torch.cat([torch.ones_like(first[:, :MASK_CHANNELS]), first], 1)
    rest = known.new_zeros(*known.shape[:2], frames - 1, *known.shape[3:])
    return torch.cat([known, rest], 2)
