"""What each cache of a session is worth: the same rollout with one switch off at a time, and all of them.

The report (`--json`) has environment, device, model and settings as a rollout's (and layers, such as "8 of 40": nothing
is extrapolated to those that are left out), steady_chunks (the chunks that count), bit_identical, and rows, one a
variant: off (what is switched off, None for the whole), total_ms, denoise_step_ms and context_ms (p20, p50, p80; a
denoise step is the chunk's mean step), saved (for each of these ms: the median of the differences to the same chunk
with everything on, and share: that over the variant's own median), cache_bytes (what the cache holds with everything
on; None where it holds nothing of its own) and bit_identical.

The rows of `--rows` are those of the other benches: op is what is switched off, the ceiling the chunk with everything
on; besides they have saved_ms and share of the chunk, of a denoise step (step_saved_ms, step_share) and of the context
update (context_saved_ms, context_share).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.benchmarks import environment
from lingbot_kernels.benchmarks.rollout import RolloutPlan, cache_bytes, settings
from lingbot_kernels.benchmarks.rows import GREEN, OURS, RED, Row
from lingbot_kernels.benchmarks.scene import Scene, SceneSession, StageInputs
from lingbot_kernels.benchmarks.timing import ChunkTimer, ChunkTimes, percentiles, steady
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.realtime import memory
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

TIMES = ("total_ms", "denoise_step_ms", "context_ms")


class FullContextStage(CausalDenoisingStage):
    """The context update as a whole forward at t = 0, its output thrown away: what `update_cache_only` saves."""

    def _update_causal_context_cache(self, *arguments: Any, **options: Any) -> None:
        super()._update_causal_context_cache(*arguments, **{**options, "update_cache_only": False})


@dataclass(frozen=True)
class Variant:
    """What is switched off: keyword arguments of RealtimeCausalDiTState, and update_cache_only.

    Attributes:
        off: its name in the report; None for the variant that has everything.
        op: its name in the benches' rows.
        store: the runtime cache that a single switch turns off.
    """

    off: str | None
    op: str
    switches: tuple[str, ...] = ()
    update_cache_only: bool = True
    store: str | None = None

    def session(self) -> RealtimeCausalDiTState:
        return RealtimeCausalDiTState(**dict.fromkeys(self.switches, False))


_SWITCHES = ("rope_cache", "time_cache", "camera_cache", "text_cache")
VARIANTS = (
    Variant(None, "nothing"),
    Variant("RoPE cache", "rope_cache", ("rope_cache",), store="rope"),
    Variant("time-embedding cache", "time_cache", ("time_cache",), store="time_embeddings"),
    Variant("camera cache", "camera_cache", ("camera_cache",), store="camera_modulation"),
    Variant("text K/V cache", "text_cache", ("text_cache",), store="text"),
    Variant("update_cache_only", "update_cache_only", (), update_cache_only=False),
    Variant("all of them", "all", _SWITCHES, update_cache_only=False),
)


@dataclass
class VariantRun:
    """A variant under way: its session, and what came out so far."""

    variant: Variant
    session: SceneSession
    timer: ChunkTimer
    times: list[ChunkTimes] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)
    captures: list[int] = field(default_factory=list)

    @property
    def state(self) -> RealtimeCausalDiTState:
        return self.session.state

    def denoise(self, inputs: StageInputs) -> Tensor:
        self.timer.start()
        self.timer.inputs_ready()
        latents = self.session.denoise(inputs)
        self.times.append(self.timer.stop())
        stats = self.state.stats()
        self.full.append(stats["visible_tokens"] == stats["capacity_tokens"])
        self.captures.append(stats["cuda_graphs"]["captures"] - sum(self.captures))
        return latents


def rotated(count: int, turn: int) -> list[int]:
    """0 .. count - 1, beginning at turn: who goes first changes from turn to turn."""
    return [(i + turn) % count for i in range(count)]


def pick_interleave(session_bytes: int, sessions: int, free_bytes: int) -> str:
    """ "chunk" where all sessions fit in three quarters of the free memory together, else "rollout"."""
    return "chunk" if 4 * sessions * session_bytes <= 3 * free_bytes else "rollout"


def savings(everything: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """The median of the differences, chunk by chunk, in ms, and its share of the median without."""
    saved = statistics.median(b - a for a, b in zip(everything, without, strict=True))
    return {"ms": saved, "share": saved / statistics.median(without)}


def _digest(latents: Tensor) -> bytes:
    """What stands for a chunk's bits, so that a rollout's need not be kept."""
    return hashlib.blake2b(latents.cpu().contiguous().numpy().tobytes(), digest_size=16).digest()


def _free_bytes(device: torch.device) -> int:
    free = memory.free_bytes(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if free is None else free


class CachingBench:
    """Runs every variant `repeats` times over the same inputs and keeps its times.

    Attributes:
        identical: for each variant, whether all its latents equalled those of the variant with everything, so far.
        cache_bytes: what each store of that variant held in the end.
    """

    def __init__(self, scene: Scene, chunks: int, cuda_graphs: bool = True) -> None:
        self.scene, self.chunks = scene, chunks
        scene.model.cuda_graphs = cuda_graphs
        self.identical = [True] * len(VARIANTS)
        self.cache_bytes: dict[str, int] = {}

    def inputs(self, chunks: int | None = None) -> Iterator[StageInputs]:
        return itertools.islice(self.scene.inputs(), chunks or self.chunks)

    def begin(self, variant: Variant) -> VariantRun:
        timer = ChunkTimer(self.scene.model.device)
        stage = CausalDenoisingStage if variant.update_cache_only else FullContextStage
        return VariantRun(variant, SceneSession(self.scene, variant.session(), timer, stage), timer)

    def end(self, session: VariantRun) -> None:
        if session.variant.off is None:
            self.cache_bytes = cache_bytes(session.state.stats())
        session.state.dispose()

    def by_chunk(self, repeat: int, chunks: int | None = None) -> list[VariantRun]:
        """All variants take a chunk each, then the next one; `chunks` of them, where that is given."""
        sessions = [self.begin(variant) for variant in VARIANTS]
        for index, inputs in enumerate(self.inputs(chunks)):
            results: dict[int, Tensor] = {}
            for i in rotated(len(sessions), repeat + index):
                results[i] = sessions[i].denoise(inputs)
            for i, latents in results.items():
                self.identical[i] &= torch.equal(latents, results[0])
        for session in sessions:
            self.end(session)
        return sessions

    def by_rollout(self, repeat: int, chunks: int | None = None) -> list[VariantRun]:
        """One session at a time: a rollout of one variant, then of the next."""
        sessions: dict[int, VariantRun] = {}
        results: dict[int, list[bytes]] = {}
        for i in rotated(len(VARIANTS), repeat):
            session = sessions[i] = self.begin(VARIANTS[i])
            results[i] = [_digest(session.denoise(inputs)) for inputs in self.inputs(chunks)]
            self.end(session)
        for i, digests in results.items():
            self.identical[i] &= digests == results[0]
        return [sessions[i] for i in range(len(VARIANTS))]

    def session_bytes(self) -> int:
        """Bytes that a session with everything on needs, at most."""
        return self.scene.planned_session(cuda_graphs=self.scene.model.cuda_graphs).total


def rows(bench: CachingBench, passes: Sequence[Sequence[VariantRun]]) -> tuple[list[dict[str, Any]], list[int]]:
    """(the report's rows, the steady chunks) of the sessions of each pass."""
    chosen = steady(passes[0][0].full, passes[0][0].captures)

    def series(i: int) -> dict[str, list[float]]:
        times = [sessions[i].times[chunk] for sessions in passes for chunk in chosen]
        return {
            "total_ms": [t.total for t in times],
            "denoise_step_ms": [statistics.mean(t.denoise) for t in times],
            "context_ms": [t.context for t in times],
        }

    everything = series(0)
    table = []
    for i, variant in enumerate(VARIANTS):
        measured = series(i)
        table.append(
            {
                "off": variant.off,
                **{name: percentiles(measured[name]) for name in TIMES},
                "saved": {name: savings(everything[name], measured[name]) for name in TIMES} if i else {},
                "cache_bytes": bench.cache_bytes[variant.store] if variant.store else None,
                "bit_identical": bench.identical[i],
            }
        )
    return table, chosen


def bench_rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The row of each variant as the other benches have them, with what it has besides; without the environment."""
    settings, model, measured = report["settings"], report["model"], report["rows"]
    cfg, tokens = model["config"], settings["tokens_per_chunk"]
    real, whole = settings["layers"].split(" of ")
    name = model["preset"] or Path(model["checkpoint"]).name
    layers = "" if real == whole else f"-{real}layers"
    case = f"{name}{layers}-s{tokens}-kv{cfg['window_frames'] * settings['tokens_per_frame']}"
    note = "CUDA graphs where a variant can" if settings["cuda_graphs"] else "no CUDA graphs"
    if real != whole:
        note += f"; {settings['layers']} layers, not extrapolated"
    everything = 1e3 * measured[0]["total_ms"]["p50"]
    for variant, found in zip(VARIANTS, measured, strict=True):
        row = Row(
            bench="caching", case=case, op=variant.op, backend=OURS, peer=False,
            shape=(1, tokens, cfg["dim"]), dtype=settings["dtype"], precision=settings["precision"], tokens=tokens,
            dim=cfg["dim"], gate=RED, bytes=found["cache_bytes"] or 0, note=f"{note}; the latents differ",
        )  # fmt: skip
        if not found["bit_identical"]:
            yield row.to_json()
            continue
        spread: dict[str, Any] = {f"{p}_us": 1e3 * ms for p, ms in found["total_ms"].items()}
        row = dataclasses.replace(
            row, gate=GREEN, note=note, **spread, ceiling="nothing off", ceiling_us=everything,
            ratio=spread["p50_us"] / everything, calls=1, samples=len(report["steady_chunks"]) * settings["repeats"],
            method="events" if settings["device"].startswith("cuda") else "clock",
        )  # fmt: skip
        more = row.to_json()
        for prefix, name in zip(("", "step_", "context_"), TIMES, strict=True):
            saved = found["saved"].get(name, {"ms": 0.0, "share": 0.0})
            more.update({f"{prefix}saved_ms": saved["ms"], f"{prefix}share": saved["share"]})
        yield more


@dataclass(frozen=True)
class CachingPlan:
    """`repeats` rollouts of `chunks` chunks by every variant; `interleave`: what alternates between variants, "chunk",
    "rollout", or "auto": chunks, where all sessions fit in three quarters of the free memory.
    """

    chunks: int
    repeats: int
    interleave: str = "auto"
    cuda_graphs: bool = True


def measure(scene: Scene, plan: CachingPlan) -> dict[str, Any]:
    """Measure every variant and report; to be called under the backend that is to serve them."""
    model, interleave = scene.model, plan.interleave
    bench = CachingBench(scene, plan.chunks, plan.cuda_graphs)
    if interleave == "auto":
        interleave = pick_interleave(bench.session_bytes(), len(VARIANTS), _free_bytes(model.device))
    one_pass = bench.by_chunk if interleave == "chunk" else bench.by_rollout
    one_pass(0, chunks=2)  # warm up: the allocator, and what libraries pick for these shapes
    passes = [one_pass(repeat) for repeat in range(plan.repeats)]
    table, chosen = rows(bench, passes)
    layers = model.config.num_layers
    whole = layers if scene.preset is None else LingBotConfig.preset(scene.preset).num_layers
    return {
        **environment.report_head(model.device),
        "model": scene.describe(),
        "settings": {
            **settings(scene, RolloutPlan(plan.chunks, cuda_graphs=plan.cuda_graphs)),
            "repeats": plan.repeats, "interleave": interleave, "layers": f"{layers} of {whole}",
        },
        "steady_chunks": chosen,
        "bit_identical": all(bench.identical),
        "rows": table,
    }  # fmt: skip
