"""What a Chrome trace of torch.profiler says of the library's ranges: host time, GPU time, launches, idle share.

Works on the trace file alone: kernels are attributed to the ranges that were open when they were launched. Kernels
launched programmatically start while the one before still runs; the time that both take is the earlier one's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lingbot_kernels.benchmarks.timeline import ATTENTION, LAUNCH, PRODUCTS, Placed, place, read_kernels
from lingbot_kernels.nvtx import DOMAIN

_PREFIX = f"{DOMAIN}:"
_PARTS = ("embeddings", "self_attn", "camera", "cross_attn", "ffn", "head")  # of a forward
_LAUNCHING = ("cuda_runtime", "cuda_driver")


@dataclass
class Range:
    """One range of the library in a trace, with what ran within it.

    Attributes:
        path: names from the outermost range to this one, e.g. ("chunk", "step 0", "block 3", "ffn", "gated_residual").
        host_us: time between its ends on the host.
        gpu_us: sum of the kernels, copies and fills launched within it; 0 without a GPU.
        launches: how many these are.
        outside: how many of these are neither products nor attention, by their names.
    """

    path: tuple[str, ...]
    host_us: float
    gpu_us: float = 0.0
    launches: int = 0
    outside: int = 0

    @property
    def name(self) -> str:
        return self.path[-1]


@dataclass(frozen=True)
class Sum:
    """Ranges of one kind together: how many, and the totals of their times and launches."""

    calls: int
    host_us: float
    gpu_us: float
    launches: int

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> Sum:
        held = list(ranges)
        return cls(len(held), sum(r.host_us for r in held), sum(r.gpu_us for r in held), sum(r.launches for r in held))


def read_ranges(trace: dict[str, Any]) -> list[Range]:
    """The library's ranges in a Chrome trace, in the order they began.

    Raises:
        ValueError: the trace holds none of them (ranges were off).
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launched: dict[Any, list[Placed]] = defaultdict(list)  # of a launch: one kernel, or all of a replayed graph
    for item in place(read_kernels(trace)):
        launched[item.kernel.launch].append(item)
    launched.pop(None, None)
    threads: dict[Any, list[tuple[float, float, dict[str, Any]]]] = defaultdict(list)
    for event in events:
        own = event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX)
        launch = event.get("cat") in _LAUNCHING and event.get("args", {}).get(LAUNCH) in launched
        if own or launch:
            # An outer range that begins with an inner one comes first.
            threads[event["pid"], event["tid"]].append((float(event["ts"]), -float(event.get("dur", 0)), event))
    found: list[tuple[float, Range]] = []
    for timeline in threads.values():
        opened: list[tuple[float, Range]] = []
        for start, minus_duration, event in sorted(timeline, key=lambda item: item[:2]):
            while opened and opened[-1][0] <= start:
                opened.pop()
            if event.get("cat") in _LAUNCHING:
                # The runtime's call may hold the driver's: both are in the trace, the outer one comes first.
                kernels = launched.pop(event["args"][LAUNCH], [])
                for _, enclosing in opened:
                    enclosing.gpu_us += sum(item.own for item in kernels)
                    enclosing.launches += len(kernels)
                    enclosing.outside += sum(item.kernel.kind not in (PRODUCTS, ATTENTION) for item in kernels)
                continue
            path = (*(opened[-1][1].path if opened else ()), event["name"].removeprefix(_PREFIX))
            opened.append((start - minus_duration, Range(path, -minus_duration)))
            found.append((start, opened[-1][1]))
    if not found:
        raise ValueError(f"trace: holds no range of {DOMAIN}; record it with LINGBOT_KERNELS_NVTX=1")
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def idle_share(trace: dict[str, Any]) -> float | None:
    """Share of the time from the first to the last GPU activity in which the GPU ran nothing; None without any."""
    placed = place(read_kernels(trace))
    if not placed:
        return None
    gaps, own = sum(item.gap for item in placed), sum(item.own for item in placed)
    return gaps / (gaps + own) if gaps + own else None


def phases(ranges: Sequence[Range]) -> dict[str, Sum]:
    """The forwards of a chunk ("step 0" .. "context"), then the parts of a forward over all of them."""
    found = dict.fromkeys(r.name for r in ranges)
    names = [name for name in found if re.fullmatch(r"step \d+|context", name)]
    names += [name for name in _PARTS if name in found]
    return {name: Sum.of(r for r in ranges if r.name == name) for name in names}


def block_launches(ranges: Sequence[Range], ops: Iterable[str], libraries: Iterable[str]) -> dict[str, float] | None:
    """Mean launches a whole block: "all"; "own", those of the library's ops, `libraries` (products and attention that
    it leaves to others) left out; "outside", whatever is neither a product nor attention by its name. None where no
    block ran or nothing was launched.
    """
    blocks = [r for r in ranges if re.fullmatch(r"block \d+", r.name)]
    # The context update's last block ends with its K/V write.
    whole = {r.path for r in ranges if len(r.path) > 1 and r.name == "ffn"}
    blocks = [r for r in blocks if (*r.path, "ffn") in whole]
    total = sum(r.launches for r in blocks)
    if not total:
        return None
    own_names = set(ops) - set(libraries)
    inside = {r.path for r in blocks}
    own = sum(
        r.launches for r in ranges if r.name in own_names and any(r.path[:i] in inside for i in range(len(r.path)))
    )
    outside = sum(r.outside for r in blocks)
    return {"all": total / len(blocks), "own": own / len(blocks), "outside": outside / len(blocks)}


def op_sums(ranges: Sequence[Range], ops: Iterable[str]) -> dict[tuple[str, str], Sum]:
    """(op, phase it ran in, "" outside of any) -> sum, in the order of first use."""
    names = set(ops)
    groups: dict[tuple[str, str], list[Range]] = defaultdict(list)
    for item in ranges:
        if item.name in names:
            groups[item.name, next((p for p in reversed(item.path[:-1]) if p in _PARTS), "")].append(item)
    return {key: Sum.of(group) for key, group in groups.items()}
