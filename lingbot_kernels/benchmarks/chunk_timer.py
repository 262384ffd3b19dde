"""Times of a chunk and its forwards, and which chunks are steady."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState


@dataclass(frozen=True)
class ChunkTimes:
    """One chunk, in milliseconds.

    Attributes:
        inputs: camera rays and noise.
        denoise: each denoise step's forward; the first one computes the camera modulation.
        camera: the camera modulation; None where there is none, or where each forward computes its own.
        context: the context update's forward.
        to_chunk: from the start, inputs included, to clean latents.
        total: from the start to the end of the context update; the sampler's own arithmetic is in here as well.
    """

    inputs: float
    denoise: tuple[float, ...]
    camera: float | None
    context: float
    to_chunk: float
    total: float


@dataclass
class ChunkTimer:
    """Times one chunk after another: start, inputs_ready, the stage's forwards through `observe`, then stop; the camera
    modulation, within the first of them, where `watch` was given the session.

    On CUDA it records events and waits once, in `stop`; elsewhere it reads the clock.
    """

    device: torch.device
    _marks: list[tuple[str, float | torch.cuda.Event]] = field(default_factory=list)

    def _mark(self, name: str) -> None:
        if self.device.type != "cuda":
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._marks.append((name, event))

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks.clear()
        self._mark("start")

    def watch(self, state: RealtimeCausalDiTState) -> None:
        store = state.runtime_cache["camera_modulation"]
        if store.enabled:
            store.observe = lambda: self.observe("camera", 0)

    def inputs_ready(self) -> None:
        self._mark("inputs")

    @contextlib.contextmanager
    def observe(self, phase: str, index: int) -> Iterator[None]:
        """`CausalDenoisingStage`'s hook around each forward; a phase may lie within another."""
        self._mark(f"{phase} begins")
        yield
        self._mark(f"{phase} ends")

    def chunk_ready(self) -> None:
        self._mark("chunk")

    def stop(self) -> ChunkTimes:
        self._mark("stop")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self._marks[0][1]
        at = [(name, _milliseconds(start, mark)) for name, mark in self._marks]
        spans: dict[str, list[float]] = {"denoise": [], "camera": [], "context": []}
        begun: dict[str, float] = {}
        for name, moment in at:
            phase, _, edge = name.partition(" ")
            if edge == "begins":
                begun[phase] = moment
            elif edge == "ends":
                spans[phase].append(moment - begun[phase])
        single = dict(at)
        return ChunkTimes(
            inputs=single["inputs"],
            denoise=tuple(spans["denoise"]),
            camera=sum(spans["camera"]) if spans["camera"] else None,
            context=sum(spans["context"]),
            to_chunk=single["chunk"],
            total=single["stop"],
        )


def _milliseconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end)
    assert isinstance(start, float) and isinstance(end, float)
    return 1e3 * (end - start)


def steady(full: Sequence[bool], captures: Sequence[int]) -> list[int]:
    """Indices of the chunks that stand for an endless rollout.

    They saw a full window, are not the first chunk, and come after the last one in which a CUDA graph was captured.
    Where there are none, the latter condition falls, then all chunks after the first will do, then the first.

    Args:
        full: whether each chunk saw a full window.
        captures: CUDA graphs captured in each chunk.
    """
    chosen = [i for i, is_full in enumerate(full) if is_full and i > 0]
    captured = max((i for i, count in enumerate(captures) if count), default=-1)
    return [i for i in chosen if i > captured] or chosen or list(range(1, len(full))) or [0]
