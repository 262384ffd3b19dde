"""Rollouts of the model bench: of its plan's size, chunk by chunk on random inputs, and a small one for the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingbot_kernels.benchmarks.scene import chunks_of_a_window
from lingbot_kernels.benchmarks.timing import ChunkTimer, ChunkTimes
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops.windowed_attention import resolve_library
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.kv_cache import KeyValue, RingLayer
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.model import ModelBench

STEPS = (1000, 750, 500, 250)


class BenchSession:
    """A rollout of the bench's model with random inputs, one chunk at a time."""

    def __init__(self, bench: ModelBench, model: CausalLingBotTransformer) -> None:
        self.bench, self.model = bench, model
        cfg, device = model.config, bench.device
        heads = cfg.num_heads // model.shard_group.ranks
        shape = (bench.tokens, bench.window, heads * cfg.head_dim)
        self.library = resolve_library(None, device.type, model.dtype, cfg.head_dim, *shape)
        self.state = RealtimeCausalDiTState(camera_cache=bench.plan.camera_cache)
        self.timer = ChunkTimer(device)
        self.stage = CausalDenoisingStage(model, STEPS, observe=self.timer.observe)
        self.text = torch.randn(1, bench.plan.prompt_tokens or cfg.text_len, cfg.text_dim, device=device)
        self.first: Tensor | None = None
        self.latents = (1, cfg.out_channels, cfg.frames_per_chunk, *bench.plan.latent_size)

    def chunk(self) -> ChunkTimes:
        """Denoise and time the next chunk, context update included, on new noise and a new camera."""
        self.timer.start()
        noise = torch.randn(self.latents, device=self.bench.device)
        camera = self.new_camera()
        self.timer.inputs_ready()
        chunk = self.stage.denoise_chunk(self.state, noise, text=self.text, camera=camera)
        self.timer.chunk_ready()
        times = self.timer.stop()
        self.first = chunk if self.first is None else self.first
        if not bool(torch.isfinite(chunk).all()):
            raise FloatingPointError("the chunk is not finite")
        return times

    def new_camera(self) -> Tensor:
        batch, _, *rest = self.latents
        return torch.randn(batch, self.model.config.camera_channels, *rest, device=self.bench.device)

    def caches(self) -> tuple[Sequence[RingLayer], Sequence[KeyValue]]:
        """K/V of every layer: of the window, and of the text."""
        assert self.state.kv_cache is not None and self.state.crossattn_cache is not None
        return self.state.kv_cache.layers, self.state.crossattn_cache.layers

    def fill(self, begun: Callable[[], None] = lambda: None) -> ChunkTimes:
        """Run until the window is full and graphs are captured; the first chunk's times. `begun` is called after it."""
        first = self.chunk()
        begun()
        for _ in range(chunks_of_a_window(self.model.config) + 1):
            self.chunk()
        return first

    def new_latents(self) -> Tensor:
        """What a forward reads: noisy latents and image condition."""
        return torch.randn(1, self.model.config.in_channels, *self.latents[2:], device=self.bench.device)

    def step(self, camera: Tensor, latents: Tensor | None = None) -> Tensor:
        """One more denoise step of the current chunk."""
        flow = self.model(
            self.new_latents() if latents is None else latents,
            self.text, 1000.0, state=self.state, start_frame=self.state.chunk_start_frame, camera=camera,
        )  # fmt: skip
        assert isinstance(flow, Tensor)
        return flow

    def repeated_step(self) -> Callable[[], Tensor]:
        """`step` on one camera: what repeats within a chunk, a graph's replay once the window is full."""
        camera = self.new_camera()
        return lambda: self.step(camera)


def small_rollout(model: CausalLingBotTransformer) -> Tensor:
    """7 chunks with eviction on a grid of 4 x 6 tokens, from one seed: [1, C, 21, H, W], float64."""
    generator = torch.Generator(model.device).manual_seed(3)
    frames, size = 7 * model.config.frames_per_chunk, (8, 12)
    text = torch.randn(1, 9, model.config.text_dim, device=model.device, generator=generator)
    camera = torch.randn(1, model.config.camera_channels, frames, *size, device=model.device, generator=generator)
    stage = CausalDenoisingStage(model, STEPS)
    chunks = stage.rollout(RealtimeCausalDiTState(), 7, text=text, camera=camera, generator=generator)
    return torch.cat([chunk.double() for chunk in chunks], dim=2)
