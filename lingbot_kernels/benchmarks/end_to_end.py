"""From a key press to a frame in host memory: latency, frames a second sustained, and where a chunk's time goes.

Random weights of the real sizes; the session is the pipeline's own. What a prompt costs is no part of it: it is encoded
once, before the first chunk.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels.benchmarks.decoder import DecoderBench, DecoderPlan
from lingbot_kernels.benchmarks.rows import ABSENT, GREEN, RED, Row, failure_note
from lingbot_kernels.benchmarks.scene import NetworkPlan, chunks_of_a_window, token_grid
from lingbot_kernels.benchmarks.timing import Mark, free, mark, milliseconds, settle, timed_ms
from lingbot_kernels.components.random_parts import REAL_VAE, NoiseText, random_vae
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.pipeline import LingBotWorldPipeline, WorldSession
from lingbot_kernels.quantization import recipe_of
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

KEYS = ("w", "w+l", "", "a", "s+j", "d+i")  # held in turns: every chunk has another camera
IDLE = 10  # key presses that find the session at rest


@dataclass(frozen=True)
class EndToEndPlan(NetworkPlan):
    """What to measure.

    Attributes:
        chunks: steady chunks, one right after the other.
        orders: where the context update runs, see `LingBotWorldPipeline`.
        base_dim: of the VAE.
        decoder: also the decoder alone, beside diffusers'.
        precision: "bfloat16", or of `quantization.recipe_of`: the blocks' products in int8.
    """

    chunks: int = 100
    orders: tuple[str, ...] = ("after", "beside")
    base_dim: int = REAL_VAE
    decoder: bool = True
    precision: str = "bfloat16"


class Phases:
    """GPU milliseconds of the phases of chunks, between events (on a CPU, the clock's), by phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self.on = False

    @contextlib.contextmanager
    def span(self, phase: str, index: int = 0) -> Iterator[None]:
        if not self.on:
            yield
            return
        begin = mark(self._device)
        yield
        self._spans.setdefault(phase, []).append((begin, mark(self._device)))

    def take(self) -> dict[str, float]:
        """The sum of each phase's spans in milliseconds, which are then forgotten."""
        settle(self._device)
        sums = {name: sum(milliseconds(*span) for span in spans) for name, spans in self._spans.items()}
        self._spans.clear()
        return sums


class EndToEndBench:
    """One run of a plan on a device, or on a rank of `group`; rank 0's rows are the run's."""

    def __init__(
        self,
        plan: EndToEndPlan,
        device: torch.device,
        report: Callable[[Row], None],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.plan, self.device, self.report, self.group = plan, device, report, group
        self.config = plan.config()
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.tokens = self.config.frames_per_chunk * math.prod(token_grid(self.config, plan.latent_size))
        self.size = (8 * plan.latent_size[0], 8 * plan.latent_size[1])
        self.precision = plan.precision
        self.case = f"{plan.name}-{self.size[0]}x{self.size[1]}-{self.ranks}gpu"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @torch.no_grad()
    def run(self) -> bool:
        """Measure; whether every gate was green."""
        vae = random_vae(self.plan.base_dim, self.device)
        green = True
        if self.plan.decoder:
            decoder = DecoderPlan(self.plan.latent_size, self.plan.base_dim)
            green = DecoderBench(decoder, self.device, self.report).run(vae)
            free()
        torch.manual_seed(0)  # the same weights on every rank
        model = CausalLingBotTransformer(self.config, device=self.device, dtype=self.dtype).eval()
        recipe = recipe_of(self.plan.precision)
        if recipe is not None:
            model.quantize(recipe)
            free()
        self.precision = model.precision
        if self.group is not None:
            model.shard_sequence(self.group)
        self._text()
        phases = Phases(self.device)
        stage = CausalDenoisingStage(model, observe=phases.span)
        text = NoiseText(self.config.text_dim)
        expected = None
        for order in self.plan.orders:
            pipeline = LingBotWorldPipeline(model, vae, text, stage=stage, context=order)
            session = pipeline.session("noise", height=self.size[0], width=self.size[1], seed=1)
            decode = session._decoder.decode

            def timed_decode(latents: Tensor, decode: Callable[[Tensor], Tensor] = decode) -> Tensor:
                with phases.span("decode"):
                    return decode(latents)

            session._decoder.decode = timed_decode  # type: ignore[method-assign]
            first = self._warm(session)
            if expected is None:
                expected = first
            same = torch.equal(first, expected)
            green &= same
            self._measure(session, order, phases, GREEN if same else RED)
            session.close()
        return green

    def _text(self) -> None:
        """A row of what a prompt costs: umT5-xxl (a small one beside the tiny VAE) with random weights, 64 tokens."""
        real = self.plan.base_dim == REAL_VAE
        try:
            times = self._text_times(real)
        except ImportError as error:
            self._report("encode_prompt", "64tokens", [], failure_note(error), ABSENT)
            return
        name = "umT5-xxl" if real else "a small umT5"
        self._report("encode_prompt", "64tokens", times, f"{name}, once per prompt", GREEN)
        free()

    def _text_times(self, real: bool) -> list[float]:
        """Milliseconds of a prompt; the encoder is gone afterwards."""
        from transformers import UMT5Config, UMT5EncoderModel

        sizes: dict[str, Any] = {"feed_forward_proj": "gated-gelu"}
        if real:
            sizes |= {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                encoder = UMT5EncoderModel(UMT5Config(**sizes)).eval()
        finally:
            torch.set_default_dtype(default)
        ids = torch.randint(2, 1000, (1, 64), device=self.device)
        return [timed_ms(partial(encoder, ids), self.device) for _ in range(7)][2:]

    def _warm(self, session: WorldSession) -> Tensor:
        """Chunks until the window is full and every graph is captured; the last one's frames."""
        for chunk in range(chunks_of_a_window(self.config) + 4):
            frames = session.step(KEYS[chunk % len(KEYS)])
        return frames.cpu()

    def _press(self, session: WorldSession, chunk: int) -> tuple[float, float]:
        """Milliseconds from a key press to the chunk's first frame, and to its last, in host memory."""
        begin = time.perf_counter()
        frames = session.step(KEYS[chunk % len(KEYS)])
        frames[:1].cpu()
        first = time.perf_counter()
        frames.cpu()
        return 1e3 * (first - begin), 1e3 * (time.perf_counter() - begin)

    def _rest(self, session: WorldSession) -> None:
        session.settle()
        settle(self.device)
        if self.group is not None:
            dist.barrier(self.group)

    def _measure(self, session: WorldSession, order: str, phases: Phases, gate: str) -> None:
        self._rest(session)
        begin = time.perf_counter()
        pressed = [self._press(session, chunk)[0] for chunk in range(self.plan.chunks)]
        self._rest(session)
        period = 1e3 * (time.perf_counter() - begin) / self.plan.chunks
        idle = []
        for chunk in range(IDLE):
            self._rest(session)
            idle.append(self._press(session, chunk)[0])
        phases.on = True
        self._rest(session)
        begin = time.perf_counter()
        for chunk in range(IDLE):
            self._press(session, chunk)
        self._rest(session)
        whole = 1e3 * (time.perf_counter() - begin)
        phases.on = False
        shares = {name: ms / whole for name, ms in phases.take().items()}
        frames = 4 * self.config.frames_per_chunk
        rate = 1e3 * frames / period
        if order == "after":  # beside each other, the phases of a chunk add up to more than it takes
            shares["host and copies"] = max(0.0, 1 - sum(shares.values()))
        busy = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        memory = "" if self.device.type != "cuda" else f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
        ceiling_ms = 1e3 * frames / 16
        self._report("key_to_frame", f"sustained-{order}", pressed, self._p95(pressed), gate, ceiling_ms)
        self._report("key_to_frame", f"idle-{order}", idle, self._p95(idle), gate, ceiling_ms)
        note = f"{rate:.2f} frames a second over {self.plan.chunks} chunks; shares of a chunk: {busy}{memory}"
        self._report("frames_per_second", order, [period], note, gate, ceiling_ms)

    @staticmethod
    def _p95(milliseconds: list[float]) -> str:
        last = statistics.quantiles(milliseconds, n=20, method="inclusive")[-1] if len(milliseconds) > 1 else 0.0
        return f"p50 {statistics.median(milliseconds):.1f} ms, p95 {last:.1f} ms, worst {max(milliseconds):.1f} ms"

    def _report(
        self, op: str, suffix: str, times_ms: Sequence[float], note: str, gate: str, ceiling_ms: float = 0.0
    ) -> None:
        frames = 4 * self.config.frames_per_chunk
        row = Row(
            bench="end_to_end", case=f"{self.case}-{suffix}", op=op, backend="lingbot_kernels", peer=False,
            shape=(frames, *self.size, 3), dtype=str(self.dtype).removeprefix("torch."), tokens=self.tokens,
            dim=self.config.dim, gate=gate, bytes=3 * frames * math.prod(self.size), method="clock", calls=1,
            note=note, precision=self.precision,
        )  # fmt: skip
        self.report(row.timed(times_ms, ceiling_ms, "a chunk at 16 frames a second"))
