"""sglang beside the model bench's own rollout: its transformer and stage as installed, then accelerated, on the same
weights, noise and window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingbot_kernels.benchmarks import sglang_peer
from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.rows import ABSENT, FAILED, GREEN, RED, failure_note
from lingbot_kernels.benchmarks.scene import chunks_of_a_window
from lingbot_kernels.benchmarks.timing import ChunkTimer, ChunkTimes
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.model import ModelBench
    from lingbot_kernels.benchmarks.model_session import BenchSession

SGLANG, ACCELERATED = "sglang", "sglang accelerated"
_LIMIT = 0.05  # of a chunk's latents in bfloat16; the two round in different places, and differ by under 0.01


def measure(bench: ModelBench, session: BenchSession, ceiling_ms: float) -> bool:
    """Rows of sglang's forwards and chunk, plain and accelerated; False if a chunk's latents disagree with ours."""
    missing = sglang_peer.why_not()
    if missing is not None:
        for backend in (SGLANG, ACCELERATED):
            bench.add("chunk", backend, peer=True, gate=ABSENT, note=missing)
        return True
    backend = SGLANG
    try:
        inputs = Inputs(session)
        ours = inputs.ours()
        peer = sglang_peer.SglangPeer(
            bench.config, session.model.state_dict(), bench.plan.latent_size, session.stage.schedule, bench.device
        )
        green = _measure_one(bench, peer, inputs, ours, SGLANG, ceiling_ms)
        backend = ACCELERATED
        from lingbot_kernels.integrations.sglang import accelerate, restore

        accelerate(peer.transformer)
        green &= _measure_one(bench, peer, inputs, ours, ACCELERATED, ceiling_ms)
        restore(peer.transformer)
        return green
    except Exception as failure:  # a peer's failure is a row of its own, not the end of ours
        bench.add("chunk", backend, peer=True, gate=FAILED, note=failure_note(failure))
        return True


class Inputs:
    """What every engine is given: the first chunks, from one seed, two more than fill the window."""

    def __init__(self, session: BenchSession) -> None:
        self.session, cfg = session, session.model.config
        generator = torch.Generator(session.bench.device).manual_seed(5)
        shape, steps = session.latents, len(session.stage.schedule.times)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=session.bench.device, generator=generator)

        self.chunks: list[dict[str, Any]] = [
            {
                "noise": draw(*shape),
                "renoise": draw(steps - 1, *shape),
                "camera": draw(1, cfg.camera_channels, *shape[2:]),
                "condition": draw(1, cfg.in_channels - cfg.out_channels, *shape[2:]),
            }
            for _ in range(chunks_of_a_window(cfg) + 2)
        ]

    def ours(self) -> list[Tensor]:
        """Latents of this library's own rollout."""
        state = RealtimeCausalDiTState(camera_cache=self.session.bench.plan.camera_cache)
        try:
            return [self.session.stage.denoise_chunk(state, text=self.session.text, **chunk) for chunk in self.chunks]
        finally:
            state.dispose()


def _measure_one(
    bench: ModelBench, peer: sglang_peer.SglangPeer, inputs: Inputs, ours: Sequence[Tensor], backend: str,
    ceiling_ms: float,
) -> bool:  # fmt: skip
    text = inputs.session.text
    peer.begin()
    errors = []
    for want, chunk in zip(ours, inputs.chunks, strict=True):
        errors.append(relative_error(peer.chunk(chunk["noise"], chunk["renoise"], text=text, camera=chunk["camera"],
                                                condition=chunk["condition"]), want))  # fmt: skip
    green = max(errors) < _LIMIT  # of a NaN, False
    times = [_timed_chunk(bench, peer, inputs) for _ in range(bench.plan.chunks + 1)][1:]
    gated: dict[str, Any] = {"peer": True, "gate": GREEN if green else RED, "error": max(errors)}
    note = (
        f"sglang {sglang_peer.version()}; {peer.fast_paths()}; latents differ from ours by "
        f"{errors[0]:.2g} in the first chunk, {errors[-1]:.2g} in chunk {len(errors)}"
    )
    bench.report_chunks(times, ceiling_ms, note=note, backend=backend, **gated)
    peer.begin()
    return green


def _timed_chunk(bench: ModelBench, peer: sglang_peer.SglangPeer, inputs: Inputs) -> ChunkTimes:
    session, timer = inputs.session, ChunkTimer(bench.device)
    timer.start()
    noise = torch.randn(session.latents, device=bench.device)
    renoise = torch.randn(len(peer.schedule.times) - 1, *session.latents, device=bench.device)
    camera = session.new_camera()
    timer.inputs_ready()
    with peer.observed(timer.observe):
        latents = peer.chunk(noise, renoise, text=session.text, camera=camera)
    timer.chunk_ready()
    times = timer.stop()
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError("the chunk is not finite")
    return times
