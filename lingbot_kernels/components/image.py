"""The image that a world begins with: 4 mask and 16 latent channels for each chunk, as the official code makes them.

The official code encodes a video whose first frame is the image and whose other frames are gray (zero) and gives each
chunk its part. Here the same video is encoded as its chunks are asked for, four frames a latent frame, by the VAE's own
causal encoder in float32. Its memory ends: after some gray frames nothing of the image is left in any of its caches,
and every later latent frame has the same bits, so that none is encoded again.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels.components.reading import require

MASK_CHANNELS = 4  # the four pixel frames of a latent frame
VAE_STRIDE = 8
MAX_AREA = 480 * 832  # pixels of the official code's default
MAX_ASPECT = 8  # beyond it the frames' short side has hardly a token
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def open_image(image: Any) -> Any:
    """A PIL image in RGB, of a path, a PIL image or a uint8 array [H, W, 3].

    Raises:
        ValueError, TypeError: naming what was given and what it must be.
    """
    pil = require("PIL.Image")
    if isinstance(image, (str, os.PathLike)):
        try:
            with pil.open(image) as opened:
                opened.load()
                image = opened
        except OSError as error:  # a missing file, or one that is no image, or a damaged one
            reason = error.strerror or str(error)
            raise ValueError(f"image: {os.fspath(image)}: {reason}") from error
    elif isinstance(image, (np.ndarray, Tensor)):
        array = image.cpu().numpy() if isinstance(image, Tensor) else image
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ValueError(f"image: got {array.dtype} {list(array.shape)}, must be uint8 [H, W, 3]")
        image = pil.fromarray(array)
    if not isinstance(image, pil.Image):
        raise TypeError(f"image: got {type(image).__name__}, must be a path, a PIL image or a uint8 array [H, W, 3]")
    if image.mode not in _MODES:
        raise ValueError(f"image: got mode {image.mode!r}, must be one of {', '.join(_MODES)}")
    return image.convert("RGB")


def fitting_size(width: int, height: int, patch: tuple[int, int], area: int = MAX_AREA) -> tuple[int, int]:
    """(height, width) in pixels of a video of about `area` pixels with an image's aspect, whole tokens each way.

    Args:
        width, height: of the image.
        patch: latent (rows, columns) of a token.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image: got {width}x{height} pixels, must be at most {MAX_ASPECT} times as long as wide")
    aspect = height / width
    cells = (math.sqrt(area * aspect), math.sqrt(area / aspect))
    rows, columns = (int(side // VAE_STRIDE // step) * step for side, step in zip(cells, patch, strict=True))
    return rows * VAE_STRIDE, columns * VAE_STRIDE


def image_pixels(image: Any, height: int, width: int) -> Tensor:
    """float32 [3, height, width] in -1 to 1: the image, resized by bicubic interpolation without regard to its
    aspect.
    """
    array = torch.from_numpy(np.array(open_image(image))).permute(2, 0, 1)
    pixels = array.to(torch.float32).div(255).sub(0.5).div(0.5)
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic")[0]


def settled_after(encoder: Any) -> int:
    """The first latent frame from which all that diffusers' Wan encoder keeps and gives stays the same, bit for bit.

    A layer repeats itself from call to call as soon as its input and what it kept of earlier calls do. A causal
    convolution keeps its last two input frames: of the call before where a call brings two or more, of two calls where
    it brings one. A temporal downsampling keeps one frame.
    """
    settled, frames = 1, 4  # latent frame 0 is the image; every later one is four gray frames

    def after(convolutions: int) -> int:
        return settled + convolutions * (1 if frames > 1 else 2)

    settled = after(1)
    for block in encoder.down_blocks:
        if hasattr(block, "conv1"):
            settled = after(2)
        elif getattr(block, "mode", "") == "downsample3d":
            settled += 1
            frames //= 2
    return after(2 * len(encoder.mid_block.resnets) + 1)


class ImageCondition:
    """The condition of a session's chunks, encoded as far as it was asked for.

    Args:
        vae: diffusers' `AutoencoderKLWan` in float32.
        pixels: [3, H, W] in -1 to 1, the first frame of the video.
        scale: (mean, std) [1, z_dim, 1, 1, 1] of latents.
    """

    def __init__(self, vae: Any, pixels: Tensor, scale: tuple[Tensor, Tensor]) -> None:
        parameter = next(vae.encoder.parameters())
        self._vae = vae
        self._video = torch.zeros(
            1, 3, MASK_CHANNELS, *pixels.shape[1:], dtype=parameter.dtype, device=parameter.device
        )
        self._first = pixels.to(self._video)[None, :, None]
        self._settled = settled_after(vae.encoder)
        self._caches: list[Any] = [None] * _convolutions(vae.encoder)
        self._latents: list[Tensor] = []
        self._mean, self._std = scale

    @property
    def encoded(self) -> int:
        """Latent frames encoded so far."""
        return len(self._latents)

    def chunk(self, start: int, frames: int) -> Tensor:
        """[1, 4 + z_dim, frames, H / 8, W / 8] for the latent frames from `start` on: mask, then normalised latents.

        The mask is one in the four channels of the video's first latent frame, and zero after it.
        """
        last = min(start + frames - 1, self._settled)
        while len(self._latents) <= last:
            self._latents.append(self._encode(len(self._latents)))
        latents = torch.cat([self._latents[min(n, self._settled)] for n in range(start, start + frames)], 2)
        mask = torch.zeros_like(latents[:, :1]).expand(-1, MASK_CHANNELS, -1, -1, -1).contiguous()
        if start == 0:
            mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)

    def encode_all(self) -> None:
        """Encode up to the frame after which all are the same, so that no later chunk waits for an encoder."""
        self.chunk(self._settled, 1)

    @torch.no_grad()
    def _encode(self, n: int) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            # The caches are handed to the encoder, which keeps nothing itself: a VAE serves several sessions.
            frames = self._first if n == 0 else self._video
            moments = self._vae.quant_conv(self._vae.encoder(frames, feat_cache=self._caches, feat_idx=[0]))
        if n == self._settled:
            self._caches = []
        return (moments[:, : self._mean.shape[1]] - self._mean) / self._std


def _convolutions(encoder: Any) -> int:
    """Entries of the encoder's feature cache: diffusers counts its causal convolutions."""
    return sum(type(module).__name__ == "WanCausalConv3d" for module in encoder.modules())
