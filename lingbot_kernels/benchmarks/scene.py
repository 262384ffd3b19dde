"""What a measured rollout is of: a network, and what it is given chunk after chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingbot_kernels.models.camera import CELL, CameraStream, CameraTrajectory
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.stages.schedule import Schedule


@dataclass(frozen=True)
class CameraPath:
    """A trajectory, what its translations are divided by (None: their running maximum), and one word for reports of
    where it comes from. After its end the camera stands still.
    """

    trajectory: CameraTrajectory
    scale: float | None
    source: str


@dataclass(frozen=True)
class StageInputs:
    """noise [1, C, F, H, W], renoise [steps - 1, 1, C, F, H, W], camera [1, 384, F, H, W] or None."""

    noise: Tensor
    renoise: Tensor
    camera: Tensor | None


@dataclass(frozen=True)
class Scene:
    """A network with everything that a rollout of it is given.

    Attributes:
        preset, checkpoint: where the network comes from; one of them is None.
        size: (height, width) of the video in pixels.
        camera: the path, or None without camera conditioning.
        text: [1, L, text_dim] on the model's device; prompt: where it comes from, in a word or as a path.
        seed: of the noise.
        weights_bytes: allocated on a GPU once the weights were there; None elsewhere.
    """

    model: CausalLingBotTransformer
    preset: str | None
    checkpoint: str | None
    schedule: Schedule
    size: tuple[int, int]
    camera: CameraPath | None
    text: Tensor
    prompt: str
    seed: int
    weights_bytes: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        _, ph, pw = self.model.config.patch_size
        return self.size[0] // CELL // ph, self.size[1] // CELL // pw

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.model.config.frames_per_chunk

    def inputs(self) -> Iterator[StageInputs]:
        """Each chunk's inputs, without end, on the model's device; the same for the same seed and device."""
        cfg, device, camera = self.model.config, self.model.device, self.camera
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        shape = (1, cfg.out_channels, cfg.frames_per_chunk, self.size[0] // CELL, self.size[1] // CELL)
        generator = torch.Generator(device).manual_seed(self.seed)
        stream = None if camera is None else CameraStream(*self.size, scale=camera.scale, device=device, dtype=dtype)
        start = 0
        while True:
            embedding = None
            if camera is not None and stream is not None:
                path = camera.trajectory
                frames = np.minimum(np.arange(start, start + cfg.frames_per_chunk), len(path) - 1)
                embedding = stream.advance(path.poses[frames], path.intrinsics[frames])
            noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            steps = len(self.schedule.times) - 1
            renoise = torch.randn((steps, *shape), generator=generator, device=device, dtype=dtype)
            yield StageInputs(noise, renoise, embedding)
            start += cfg.frames_per_chunk

    def latents(self, chunks: int) -> tuple[tuple[int, int, int, int, int], torch.dtype]:
        """Shape [1, C, frames, H, W] and dtype of the latents of so many chunks together."""
        cfg = self.model.config
        size = (self.size[0] // CELL, self.size[1] // CELL)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return (1, cfg.out_channels, chunks * cfg.frames_per_chunk, *size), dtype

    def describe(self) -> dict[str, Any]:
        """The report's model: preset, checkpoint, parameters, config."""
        return {
            "preset": self.preset,
            "checkpoint": self.checkpoint,
            "parameters": self.model.config.num_parameters(),
            "config": self.model.config.to_dict(),
        }


def allocated(device: torch.device) -> int | None:
    """Bytes allocated on a GPU now; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None
