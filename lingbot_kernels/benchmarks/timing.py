"""Times of calls and of copies of the same bytes, CUDA graphs over rotated inputs, or the clock on a CPU; times of a
chunk and its forwards, and which chunks are steady.

A graph holds calls on different inputs, at least four times the L2 cache in all, so that no call finds its operands
cached. Replays are queued behind a spinning kernel: the GPU never waits for the host between the events.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

Thunk = Callable[[], Any]
Mark = float | torch.cuda.Event
_SPIN_CYCLES = 2_000_000  # about a millisecond
_MAX_GRAPH_CALLS = 2048
_MIN_SETS, _MAX_SETS = 3, 512


@dataclass(frozen=True)
class Timing:
    """Percentiles over samples of the time a call takes, microseconds; a sample is a mean over `calls` calls.

    `method`: "graph" (CUDA-graph replays between events), "events" (eager launches between events) or "clock".
    """

    p20_us: float
    p50_us: float
    p80_us: float
    calls: int
    samples: int
    method: str


@dataclass(frozen=True)
class Effort:
    """How long to measure: samples of at least `sample_us` each, as many as fit in `budget_us`, within bounds."""

    sample_us: float = 1000.0
    budget_us: float = 40_000.0
    min_samples: int = 8
    max_samples: int = 40

    def samples(self, sample_us: float) -> int:
        return int(min(max(self.budget_us / max(sample_us, 1.0), self.min_samples), self.max_samples))


QUICK = Effort(sample_us=600.0, budget_us=20_000.0, min_samples=5, max_samples=20)


def mark(device: torch.device) -> Mark:
    """This moment: an event in the GPU's current stream, or the clock's seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(start: Mark, end: Mark) -> float:
    """From one mark to another; the GPU must have passed both."""
    if isinstance(start, float) and isinstance(end, float):
        return 1e3 * (end - start)
    assert not isinstance(start, float) and not isinstance(end, float)
    return start.elapsed_time(end)


def settle(device: torch.device) -> None:
    """Wait until a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(call: Thunk, device: torch.device) -> float:
    """Milliseconds of one call: between events on a GPU that has nothing else to do, or on the clock."""
    settle(device)
    start = mark(device)
    call()
    end = mark(device)
    settle(device)
    return milliseconds(start, end)


def event_ms(call: Thunk) -> float:
    """Milliseconds of one call between events, queued behind what the GPU still has to do; waits."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(calls: Mapping[str, Thunk], rounds: int, device: torch.device, samples: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each call, `samples` whenever its turn comes: clocks and temperature are the same for all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name] += [timed_ms(call, device) for _ in range(samples)]
    return times


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Replays `run` as a CUDA graph; it has run once, which allocates and tunes."""
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def free() -> None:
    """Give back memory that nothing holds any more, and begin anew to measure its peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def rotated_sets(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of operands a ring needs, so that L2 can't hold what a call reads when its turn comes again."""
    wanted = -(-4 * l2_bytes(device) // max(bytes_per_call, 1))
    return min(max(wanted, _MIN_SETS), _MAX_SETS)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]}


def _timing(samples: Sequence[float], calls: int, method: str) -> Timing:
    p = percentiles(samples)
    return Timing(p["p20"], p["p50"], p["p80"], calls, len(samples), method)


def measure(calls: Sequence[Thunk], device: torch.device, effort: Effort, *, graph: bool = True) -> Timing:
    """Time the calls, one after another and round again; each must work on operands of its own.

    Args:
        graph: capture them (CUDA only); False for calls that copy from the host or wait for it.
    """
    if device.type != "cuda":
        return _measure_clock(calls, effort)
    with torch.cuda.device(device):
        per_call = _warm_up(calls)
        if graph:
            return _measure_graph(calls, per_call, effort)
        return _measure_events(calls, per_call, effort)


def _measure_clock(calls: Sequence[Thunk], effort: Effort) -> Timing:
    for call in calls:
        call()
    start = time.perf_counter_ns()
    calls[0]()
    once = (time.perf_counter_ns() - start) / 1e3
    samples = []
    for i in range(max(effort.samples(once), len(calls))):
        call = calls[i % len(calls)]
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return _timing(samples, 1, "clock")


def _warm_up(calls: Sequence[Thunk]) -> float:
    """Compile and tune on a side stream, as graph capture wants it; returns a call's time in microseconds, roughly."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        for call in calls[:_MIN_SETS]:
            call()
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) * 1e3 / len(calls[:_MIN_SETS]), 0.5)


def _measure_graph(calls: Sequence[Thunk], per_call: float, effort: Effort) -> Timing:
    rounds = max(1, -(-int(effort.sample_us / per_call) // len(calls)))
    rounds = max(1, min(rounds, _MAX_GRAPH_CALLS // len(calls)))
    graph = torch.cuda.CUDAGraph()
    held: deque[Any] = deque(maxlen=len(calls))  # outputs rotate as well: a ring of them is alive during capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for call in calls:
                held.append(call())
    count = rounds * len(calls)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(effort.samples(per_call * count))
    ]
    torch.cuda._sleep(_SPIN_CYCLES)
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return _timing([start.elapsed_time(end) * 1e3 / count for start, end in events], count, "graph")


def _measure_events(calls: Sequence[Thunk], per_call: float, effort: Effort) -> Timing:
    samples = []
    for _ in range(effort.samples(per_call * len(calls))):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return _timing(samples, len(calls), "events")


def wall_us(calls: Sequence[Thunk], device: torch.device, call_us: float, batches: int = 15) -> float:
    """Median over batches of the mean time the host spends in one call, microseconds, launches queued and not waited
    for; the first batch, which allocates, is not counted.

    A batch is short enough for the GPU's launch queue, so that a full queue never holds the host back, and shorter
    where a call takes long: `call_us` on the device.
    """
    batch = int(min(max(10_000 / max(call_us, 1.0), 3), 20))
    times = []
    for _ in range(batches + 1):
        settle(device)
        start = time.perf_counter_ns()
        for i in range(batch):
            calls[i % len(calls)]()
        times.append((time.perf_counter_ns() - start) / 1e3 / batch)
    settle(device)
    return statistics.median(times[1:])


def copy_pair(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(target, source), contiguous bf16, nbytes in all."""
    source = torch.randn(max(nbytes // 4, 1), dtype=torch.bfloat16, device=device)
    return torch.empty_like(source), source


def measure_copy(nbytes: int, device: torch.device, effort: Effort) -> Timing:
    """Time of a copy that reads nbytes / 2 and writes nbytes / 2: the ceiling of an op that moves nbytes."""
    pairs = [copy_pair(nbytes, device) for _ in range(rotated_sets(nbytes, device))]
    return measure([partial(target.copy_, source) for target, source in pairs], device, effort)


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
    _marks: list[tuple[str, Mark]] = field(default_factory=list)

    def _mark(self, name: str) -> None:
        self._marks.append((name, mark(self.device)))

    def start(self) -> None:
        settle(self.device)
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
        settle(self.device)
        start = self._marks[0][1]
        at = [(name, milliseconds(start, each)) for name, each in self._marks]
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
