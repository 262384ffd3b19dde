"""Time estimates, and partitions of a suite for parallel CI jobs by longest processing time first."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_EST_TIME_SECONDS = 300.0
STARTUP_OVERHEAD_SECONDS = 120.0
_PLATFORM_ORDER = ("h100.json", "b200.json", "5090.json")


class BaselineError(ValueError):
    """A baseline file that isn't what the rule needs."""


def load_baselines(path: Path) -> dict[str, float]:
    """Estimate in seconds per scenario of a baseline file, or of a folder with one per platform; missing: none.

    ``estimated_full_test_time_s``, else ``expected_e2e_ms / 1000`` plus the start-up overhead; neither: not listed. In
    a folder the first platform that has a scenario counts: h100, b200, 5090, then by name.
    """
    out: dict[str, float] = {}
    if path.is_dir():
        for file in sorted(path.glob("*.json"), key=lambda p: ([*_PLATFORM_ORDER, p.name].index(p.name), p.name)):
            out = load_baselines(file) | out
        return out
    try:
        data = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError) as e:
        raise BaselineError(f"{path} isn't JSON: {e}") from None
    scenarios = data.get("scenarios", {}) if isinstance(data, dict) else None
    if not isinstance(scenarios, dict):
        raise BaselineError(f"{path}: 'scenarios' must be an object of case id -> scenario")
    forms = (("estimated_full_test_time_s", 1.0, 0.0), ("expected_e2e_ms", 1e-3, STARTUP_OVERHEAD_SECONDS))
    for case_id, scenario in scenarios.items():
        if not isinstance(scenario, dict):
            raise BaselineError(f"{path}: scenario {case_id!r} must be an object")
        for key, scale, offset in ((k, s, o) for k, s, o in forms if scenario.get(k) is not None):
            value = scenario[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise BaselineError(f"{path}: {key} of {case_id!r} must be a finite number >= 0, got {value!r}")
            out.setdefault(case_id, value * scale + offset)
    return out


@dataclass(frozen=True)
class Item:
    """A case or standalone file to be run, with its estimated seconds."""

    kind: str
    name: str
    est_time: float


def partition_count(
    total: float, items: int, *, min_time: float, target_time: float, max_time: float, limit: int
) -> int:
    """How many jobs: towards `target_time` each, none under `min_time` or over `max_time` as far as that can be."""
    count = min(max(1, math.ceil(total / target_time)), max(1, math.floor(total / min_time)))
    return min(max(1, count, math.ceil(total / max_time)), limit, items)


def _by_kind(part: list[Item]) -> dict[str, list[str]]:
    return {kind: [item.name for item in part if item.kind == kind] for kind in ("case", "standalone")}


def plan(suite: str, items: list[Item], **bounds: Any) -> dict[str, Any]:
    """The plan of a suite as JSON data, with the job matrix: longest first, each to the job with the least so far."""
    count = partition_count(sum(i.est_time for i in items), len(items), **bounds)
    parts: list[list[Item]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for item in sorted(items, key=lambda i: (-i.est_time, i.kind, i.name)):
        at = min(range(count), key=lambda p: (loads[p], len(parts[p]), p))
        parts[at].append(item)
        loads[at] += item.est_time
    partitions = [
        {
            "part": i,
            "case_ids": names["case"],
            "standalone_files": names["standalone"],
            "estimated_time": round(load, 1),
        }
        for i, (load, names) in enumerate(zip(loads, map(_by_kind, parts), strict=True))
    ]
    matrix = {"include": [{"part": i} for i in range(count)]}
    return {"suite": suite, "partition_count": count, "partitions": partitions, "matrix": matrix}
