"""What is measured: a network's shape, or a network with what a rollout of it is given, chunk after chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingbot_kernels.benchmarks.timing import ChunkTimer
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models.camera import CELL, CameraStream, CameraTrajectory
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.memory import MemoryPlan, session_memory
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage
from lingbot_kernels.stages.schedule import Schedule


def token_grid(cfg: LingBotConfig, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens in a frame of latents (H, W)."""
    return latent_size[0] // cfg.patch_size[1], latent_size[1] // cfg.patch_size[2]


def chunks_of_a_window(cfg: LingBotConfig) -> int:
    """Chunks after which the window is full."""
    return -(-cfg.window_frames // cfg.frames_per_chunk)


@dataclass(frozen=True)
class NetworkPlan:
    """The network that a bench measures, with random weights.

    Attributes:
        preset: its shape.
        layers: transformer blocks to really run; None for all of the preset's.
        latent_size: (H, W) of the latents.
    """

    preset: str = "lingbot-world-14b"
    layers: int | None = None
    latent_size: tuple[int, int] = (58, 104)

    def config(self, **overrides: Any) -> LingBotConfig:
        if self.layers is not None:
            overrides.setdefault("num_layers", self.layers)
        return LingBotConfig.preset(self.preset, **overrides)

    @property
    def name(self) -> str:
        """As a row's case begins."""
        return self.preset if self.layers is None else f"{self.preset}-{self.layers}layers"


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
        return token_grid(self.model.config, self.latent_size)

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // CELL, self.size[1] // CELL

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
        shape = (1, cfg.out_channels, cfg.frames_per_chunk, *self.latent_size)
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

    def planned_session(self, camera_cache: bool = True, cuda_graphs: bool = True) -> MemoryPlan:
        """Bytes by part that a session needs on this rank, with graphs where the device has them."""
        model = self.model
        return session_memory(
            model.config, self.grid, model.dtype, ranks=model.shard_group.ranks, camera=self.camera is not None,
            camera_cache=camera_cache, time_entries=len(self.schedule.times) + 1,
            cuda_graphs=cuda_graphs and model.device.type == "cuda", recipe=model.recipe,
        )  # fmt: skip

    def latents(self, chunks: int) -> tuple[tuple[int, int, int, int, int], torch.dtype]:
        """Shape [1, C, frames, H, W] and dtype of the latents of so many chunks together."""
        cfg = self.model.config
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return (1, cfg.out_channels, chunks * cfg.frames_per_chunk, *self.latent_size), dtype

    def describe(self) -> dict[str, Any]:
        """The report's model: preset, checkpoint, parameters, config."""
        return {
            "preset": self.preset,
            "checkpoint": self.checkpoint,
            "parameters": self.model.config.num_parameters(),
            "config": self.model.config.to_dict(),
        }


class SceneSession:
    """A session of a scene under way; what its forwards take, `timer` notes where there is one."""

    def __init__(
        self,
        scene: Scene,
        state: RealtimeCausalDiTState | None = None,
        timer: ChunkTimer | None = None,
        stage: type[CausalDenoisingStage] = CausalDenoisingStage,
    ) -> None:
        self.scene, self.timer = scene, timer
        self.state = RealtimeCausalDiTState() if state is None else state
        self.stage = stage(scene.model, schedule=scene.schedule)
        if timer is not None:
            self.stage.observe = timer.observe

    def chunk(self, given: StageInputs) -> Tensor:
        """Clean latents of the next chunk, its context updated in the same call."""
        return self._denoise(given, update_context=True)

    def denoise(self, given: StageInputs, clean: Tensor | None = None) -> Tensor:
        """Clean latents of the next chunk; the context is then updated with them, or with `clean`."""
        latents = self._denoise(given, update_context=False)
        if self.timer is not None:
            self.timer.chunk_ready()
        context = latents if clean is None else clean.to(latents)
        self.stage.update_context(self.state, context, text=self.scene.text, camera=given.camera)
        return latents

    def _denoise(self, given: StageInputs, update_context: bool) -> Tensor:
        return self.stage.denoise_chunk(
            self.state, given.noise, text=self.scene.text, camera=given.camera, renoise=given.renoise,
            update_context=update_context,
        )  # fmt: skip


def allocated(device: torch.device) -> int | None:
    """Bytes allocated on a GPU now; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None
