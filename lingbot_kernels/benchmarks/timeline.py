"""Where the time of replayed CUDA graphs goes, kernel by kernel and layer by layer: the denoise step beside the floor.

Kernels launched programmatically start while the one before still runs, so their durations overlap. Here each
microsecond belongs to one kernel: to the latest only from where all before it ended. Own times and gaps add up to the
span.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lingbot_kernels.benchmarks.clocks import ClockSampler
from lingbot_kernels.benchmarks.timing import settle

ATTENTION, PRODUCTS, PASSES, OTHER = "attention", "products", "fused_passes", "other"
SELF, CROSS = "self-attention", "cross-attention"
KINDS = (ATTENTION, PRODUCTS, PASSES, OTHER)
LAUNCH = "correlation"  # what a trace calls the link from a kernel to the call that launched it
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_AFTER_SELF = ("self_attn.o", "cross_attn.q")
_AFTER_CROSS = ("cross_attn.o", "ffn.0", "ffn.2", "self_attn.qkv")


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the GPU; microseconds of the trace's clock. `launch`: what the trace says of the
    call that launched it, None for nothing.
    """

    name: str
    start: float
    end: float
    launch: Any = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        return kind(self.name)


@dataclass(frozen=True)
class Placed:
    """A kernel with its share of the time line: `gap` microseconds before it in which nothing ran, then `own`."""

    kernel: Kernel
    gap: float
    own: float


@dataclass(frozen=True)
class Line:
    """One place in a layer, means over all layers but the last.

    Attributes:
        label: the product's or attention's place in the block; for others the kernel and the place before it.
        kernel: name of the kernel there, without namespaces and arguments.
        launches: a layer.
        duration_us: from the kernel's start to its end, its wait for the one before included.
        own_us: what remains of it after the one before ended.
        gap_us: idle time before it.
    """

    label: str
    kind: str
    kernel: str
    launches: float
    duration_us: float
    own_us: float
    gap_us: float


@dataclass(frozen=True)
class Timeline:
    """Of replays of one graph.

    Attributes:
        replays, layers: how many were recorded, and the layers of each.
        span_us: of a replay, gaps and what lies between replays included.
        own_us: kind -> time of a replay; with `gaps_us` they add up to the span.
        gaps: how many gaps a replay has; `median_gap_us` is their median length.
        layer_us: of a layer, its gaps included: from one self-attention to the next.
        outside_us: of a replay, what its layers are not: embeddings, head, copies of inputs, other work between.
        launches_per_block: kernels of a layer by kind.
        lines: a layer's kernels in their order.
    """

    replays: int
    layers: int
    span_us: float
    own_us: dict[str, float]
    gaps_us: float
    gaps: float
    median_gap_us: float
    layer_us: float
    outside_us: float
    launches_per_block: dict[str, float]
    lines: list[Line]


def kind(name: str) -> str:
    """What a kernel is for, by its name: attention, products, the library's own passes, or other."""
    low = name.lower()
    if _is_clearing(name):
        return PRODUCTS  # cuBLAS clears its counters before some products; nothing else in a step fills memory so
    if any(part in low for part in ("flash", "fmha", "sdpa", "attention")):
        return ATTENTION
    if any(part in low for part in ("nvjet", "gemm", "gemv", "cutlass", "cublas", "splitk", "xmma", "int8_linear")):
        return PRODUCTS
    own = "lingbot" in low or re.fullmatch(r"[a-z_]+_kernel(_\w+)?", low) is not None
    return PASSES if own else OTHER


def _is_clearing(name: str) -> bool:
    return name.lower().startswith("memset")


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template and call arguments."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain, maxsplit=1)[0].rsplit("::", 1)[-1].strip() or name


def read_kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """Everything that a Chrome trace of torch.profiler says ran on the GPU, in the order it began."""
    found = [
        Kernel(event["name"], at := float(event["ts"]), at + float(event["dur"]), event.get("args", {}).get(LAUNCH))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ON_GPU
    ]
    return sorted(found, key=lambda kernel: (kernel.start, kernel.end))


def place(kernels: Iterable[Kernel]) -> list[Placed]:
    """Each kernel's gap and own time; their sum is the time from the first start to the last end."""
    placed: list[Placed] = []
    reached: float | None = None
    for kernel in kernels:
        before = kernel.start if reached is None else reached
        own = max(0.0, kernel.end - max(kernel.start, before))
        placed.append(Placed(kernel, max(0.0, kernel.start - before), own))
        reached = max(before, kernel.end)
    return placed


def own_times(placed: Sequence[Placed]) -> dict[str, float]:
    """Own microseconds by kind of kernel."""
    times = dict.fromkeys(KINDS, 0.0)
    for item in placed:
        times[item.kernel.kind] += item.own
    return times


def analyse(kernels: Sequence[Kernel], layers: int, replays: int) -> Timeline:
    """The time line of `replays` replays of a graph of `layers` layers, each with one self- and one cross-attention.

    Raises:
        ValueError: the trace holds another number of attention calls, or there is only one layer, which has no next.
    """
    if layers < 2:
        raise ValueError(f"layers: got {layers}, must be 2 or more: a layer is timed up to the next one's attention")
    placed = place(kernels)
    calls = _attention_calls(placed)
    if len(calls) != 2 * layers * replays:
        raise ValueError(
            f"kernels: got {len(calls)} attention calls, must be {2 * layers * replays}: 2 x {layers} layers x "
            f"{replays} replays"
        )
    sums: dict[str, _Sum] = {}
    periods = replays * (layers - 1)
    layer_us = 0.0
    for replay in range(replays):
        for layer in range(layers - 1):
            first = 2 * (replay * layers + layer)
            start, cross, stop = (calls[first + i] for i in range(3))
            whole = placed[start:stop]
            layer_us += sum(item.gap + item.own for item in whole) / periods
            for label, item in zip(_labels(whole, cross - start), whole, strict=True):
                sums.setdefault(label, _Sum(item.kernel.kind)).add(item)
    span = sum(item.gap + item.own for item in placed) / replays
    gaps = [item.gap for item in placed if item.gap > 0]
    launches = dict.fromkeys(KINDS, 0.0)
    for held in sums.values():
        launches[held.kind] += held.launches / periods
    return Timeline(
        replays, layers, span, {name: us / replays for name, us in own_times(placed).items()}, sum(gaps) / replays,
        len(gaps) / replays, statistics.median(gaps) if gaps else 0.0, layer_us, span - layers * layer_us, launches,
        [held.line(label, periods) for label, held in sums.items()],
    )  # fmt: skip


class _Sum:
    """Kernels at one place of a layer, over all layers and replays."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.names: Counter[str] = Counter()
        self.launches = 0
        self.duration = self.own = self.gap = 0.0

    def add(self, item: Placed) -> None:
        self.names[short_name(item.kernel.name)] += 1
        self.launches += 1
        self.duration += item.kernel.end - item.kernel.start
        self.own += item.own
        self.gap += item.gap

    def line(self, label: str, periods: int) -> Line:
        return Line(
            label, self.kind, self.names.most_common(1)[0][0], self.launches / periods, self.duration / periods,
            self.own / periods, self.gap / periods,
        )  # fmt: skip


def _attention_calls(placed: Sequence[Placed]) -> list[int]:
    """Index of the first kernel of each attention call; its later kernels (a combination of parts) have no product
    before them.
    """
    calls, open_call = [], False
    for i, item in enumerate(placed):
        if item.kernel.kind == ATTENTION:
            if not open_call:
                calls.append(i)
            open_call = True
        elif item.kernel.kind == PRODUCTS:
            open_call = False
    return calls


def _labels(layer: Sequence[Placed], cross: int) -> list[str]:
    """The place of each kernel of a layer that begins with self-attention and has cross-attention at index `cross`."""
    labels: list[str] = []
    for begin, end, attention, names in (
        (0, cross, SELF, _AFTER_SELF),
        (cross, len(layer), CROSS, _AFTER_CROSS),
    ):
        part = layer[begin:end]
        products = sum(_is_product(item) for item in part)
        seen, previous = 0, attention
        for item in part:
            if item.kernel.kind == ATTENTION:
                previous = attention
                labels.append(attention)
            elif _is_product(item):
                previous = _product_label(seen, products, names, attention)
                seen += 1
                labels.append(previous)
            elif item.kernel.kind == PRODUCTS and not _is_clearing(item.kernel.name):  # a split product's reduction
                labels.append(previous)
            else:
                labels.append(f"{short_name(item.kernel.name)} after {previous}")
    return labels


def _is_product(item: Placed) -> bool:
    name = item.kernel.name
    return item.kernel.kind == PRODUCTS and "reduce" not in name.lower() and not _is_clearing(name)


def _product_label(index: int, count: int, names: Sequence[str], attention: str) -> str:
    """`names` in order, the last twice where Q and K are projected apart from V; of another count none is told."""
    if count != len(names) + (count > len(names) and names[-1].endswith("qkv")):
        return f"product {index + 1} of {count} after {attention}"
    return names[min(index, len(names) - 1)]


def record_trace(
    run: Callable[[], object],
    device: torch.device,
    activities: Sequence[ProfilerActivity],
    keep: Callable[[Path], object] = lambda file: None,
) -> dict[str, Any]:
    """The Chrome trace of a run under torch.profiler; `keep` is shown its file, which is gone afterwards."""
    settle(device)
    with profile(activities=activities) as recorded:
        run()
        settle(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        trace: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        keep(file)
    return trace


def record(call: Callable[[], Any], times: int) -> list[Kernel]:
    """Run `call` so many times under torch.profiler, without ranges, and read what ran on the GPU."""

    def run() -> None:
        for _ in range(times):
            call()

    return read_kernels(record_trace(run, torch.device("cuda"), [ProfilerActivity.CUDA]))


def compare(
    calls: Mapping[str, Callable[[], Any]],
    layers: int,
    device: torch.device,
    *,
    replays: int = 5,
    seconds: float = 1.5,
    groups: int | None = None,
) -> tuple[dict[str, Any], str]:
    """Time, sample and record each call for itself, each a replay of `layers` layers: (report, table).

    The report has, for each name, unprofiled_ms (median between events, without the profiler), clocks (medians while
    those ran), timeline (see `Timeline`, or error: why there is none) and kernels, all that was recorded: [index into
    names, start, duration], microseconds. With `groups` each call is timed in so many groups, not for `seconds`: ranks
    that exchange something must call alike.
    """
    report: dict[str, Any] = {"layers": layers, "replays": replays, "graphs": {}}
    timelines: dict[str, Timeline] = {}
    said = []
    for name, call in calls.items():
        call()
        with ClockSampler(device) as clocks:
            times = event_times(call, seconds, groups)
        record(call, 1)  # the profiler's first use sets it up
        kernels = record(call, replays)
        names = list(dict.fromkeys(kernel.name for kernel in kernels))
        index = {kernel_name: i for i, kernel_name in enumerate(names)}
        first = kernels[0].start if kernels else 0.0
        held: dict[str, Any] = {
            "unprofiled_ms": statistics.median(times), "clocks": clocks.medians, "names": names,
            "kernels": [
                [index[kernel.name], round(kernel.start - first, 3), round(kernel.end - kernel.start, 3)]
                for kernel in kernels
            ],
        }  # fmt: skip
        report["graphs"][name] = held
        try:
            timelines[name] = analyse(kernels, layers, replays)
            held["timeline"] = asdict(timelines[name])
        except ValueError as error:
            held["error"] = str(error)
        state = ", ".join(f"{value:.0f} {field}" for field, value in clocks.medians.items() if field != "samples")
        parts = [f"{held['unprofiled_ms']:.3f} ms unprofiled", state or "no clocks", held.get("error", "")]
        said.append(f"{name}: " + "; ".join(part for part in parts if part))
    table = side_by_side(timelines) if timelines else "no time line"
    return report, "\n".join([table, *said])


def event_times(call: Callable[[], Any], seconds: float, groups: int | None = None) -> list[float]:
    """Milliseconds of calls queued in groups, so that the GPU does not wait for the host between most of them."""
    times: list[float] = []
    stop = time.monotonic() + seconds
    while time.monotonic() < stop if groups is None else len(times) < 4 * groups:
        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()
        for _ in range(4):
            call()
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        events[-1].synchronize()
        times += [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    return times


def side_by_side(timelines: Mapping[str, Timeline]) -> str:
    """A table of own microseconds a layer, one column of each time line; the last, the step, also with its gaps."""
    names = list(timelines)
    shown = {name: {line.label: line for line in timelines[name].lines} for name in names}
    step = names[-1]
    labels = list(dict.fromkeys(label for name in reversed(names) for label in shown[name]))
    width = max(len(label) for label in [*labels, "everything outside of the layers, a replay"]) + 2
    columns = [*names, "gap before", f"less {names[0]}"]
    head = f"{'us per layer':{width}}" + "".join(f"{name:>18}" for name in columns)

    def row(label: str, values: Sequence[float | None]) -> str:
        cells = "".join(f"{'' if value is None else f'{value:.2f}':>18}" for value in values)
        return f"{label:{width}}{cells}"

    lines = [head]
    for label in labels:
        found = [shown[name].get(label) for name in names]
        own = [None if line is None else line.own_us for line in found]
        last, first = found[-1], found[0]
        more = None if last is None else last.own_us + last.gap_us - (first.own_us + first.gap_us if first else 0.0)
        lines.append(row(label, [*own, None if last is None else last.gap_us, more]))
    held = [timelines[name] for name in names]

    def summary(label: str, of: Callable[[Timeline], float]) -> None:
        values = [of(timeline) for timeline in held]
        lines.append(row(label, [*values, None, values[-1] - values[0]]))

    lines.append("")
    for name in KINDS:
        summary(f"all {name.replace('_', ' ')}", partial(_of_kind, name))
    summary("all gaps", lambda t: sum(line.gap_us for line in t.lines))
    summary("a layer", lambda t: t.layer_us)
    summary("everything outside of the layers, a replay", lambda t: t.outside_us)
    summary("a replay", lambda t: t.span_us)
    layer, whole = held[-1].layer_us / held[0].layer_us, held[-1].span_us / held[0].span_us
    lines.append(f"{step} / {names[0]}: a layer {layer:.4f}, a replay {whole:.4f}")
    launches = held[-1].launches_per_block
    lines.append(
        f"launches a block outside products and attention: {launches[PASSES] + launches[OTHER]:.1f}; gaps a replay: "
        + ", ".join(f"{name} {t.gaps:.0f} (median {t.median_gap_us:.2f} us)" for name, t in timelines.items())
    )
    return "\n".join(lines)


def _of_kind(kind: str, timeline: Timeline) -> float:
    return sum(line.own_us for line in timeline.lines if line.kind == kind)
