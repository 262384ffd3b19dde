"""The table of measured winners in `ops/_winners.py`, regenerated from rows.

It is small, and the same for the same rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lingbot_kernels.benchmarks.rows import GREEN, latest
from lingbot_kernels.files import write_text
from lingbot_kernels.ops import _winners
from lingbot_kernels.ops._winners import AttentionWinners, Winners
from lingbot_kernels.ops.windowed_attention import USUAL

KERNELS = ("cuda", "triton")
ATTENTION = ("fa4", "fa3", "cudnn", "sdpa")
MARGIN = 1.02  # a backend has to be this much faster for a rule of its own
BEGIN, END = "# Begin of the measured table.", "# End of the measured table."

Shape = tuple[str, int, int]  # op, tokens, dim


def ratios(rows: Iterable[dict[str, Any]]) -> dict[Shape, float]:
    """Time of "triton" over time of "cuda", for each op and shape that both serve with a green gate.

    Of repeated measurements the last counts; variants of a case (a wrap, a wider residual) enter as a geometric mean.
    """
    times: dict[tuple[Shape, str], dict[str, float]] = {}
    for row in latest(rows):
        if row["backend"] in KERNELS and row["gate"] == GREEN and row["p50_us"] and not row.get("peer"):
            shape = (row["op"], row["tokens"], row["dim"])
            times.setdefault((shape, row["case"]), {})[row["backend"]] = row["p50_us"]
    logs: dict[Shape, list[float]] = {}
    for (shape, _), by_backend in times.items():
        if len(by_backend) == len(KERNELS):
            logs.setdefault(shape, []).append(math.log(by_backend["triton"] / by_backend["cuda"]))
    return {shape: math.exp(sum(values) / len(values)) for shape, values in sorted(logs.items())}


def decide(measured: dict[Shape, float]) -> Winners:
    """The table: the backend that wins most shapes by default ("cuda" where even), and rules for the others.

    A shape within the margin needs no rule. Where an op's decided shapes agree, one rule covers them all, and every
    shape never measured; else each rule starts at a measured shape, in ascending order, so that no later rule changes
    an earlier shape.
    """
    wanted = {
        shape: "cuda" if ratio > 1 else "triton"
        for shape, ratio in measured.items()
        if max(ratio, 1 / ratio) > MARGIN
    }  # fmt: skip
    votes = list(wanted.values())
    default = "triton" if votes.count("triton") > votes.count("cuda") else "cuda"
    rules: list[tuple[str, int, int, str]] = []
    for op in sorted({shape[0] for shape in wanted}):
        shapes = {shape: backend for shape, backend in wanted.items() if shape[0] == op}
        if len(set(shapes.values())) == 1:
            backend = next(iter(shapes.values()))
            if backend != default:
                rules.append((op, 0, 0, backend))
            continue
        of_op: list[tuple[str, int, int, str]] = []
        for shape, backend in sorted(shapes.items()):
            if Winners(default, tuple(of_op)).pick(*shape) != backend:
                of_op.append((*shape, backend))
        rules += of_op
    return Winners(default, tuple(rules))


def attention_times(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, int, int], dict[str, float]]:
    """(Queries, keys, dim) -> library -> microseconds, of bfloat16 attention that several serve with a green gate."""
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in latest(rows):
        if row["op"] == "windowed_attention" and row.get("dtype") == "bfloat16" and row["backend"] in ATTENTION:
            _, queries, keys, heads, head_dim = row["shape"]
            if row["gate"] == GREEN and row["p50_us"]:
                times.setdefault((queries, keys, heads * head_dim), {})[row["backend"]] = row["p50_us"]
    return {shape: by_library for shape, by_library in sorted(times.items()) if len(by_library) > 1}


def decide_attention(times: dict[tuple[int, int, int], dict[str, float]]) -> AttentionWinners:
    """A rule for each shape at which what would be taken is more than the margin slower than the fastest.

    In ascending order: a rule that starts at a shape changes no shape before it.
    """
    rules: list[tuple[int, int, int, str]] = []
    for shape, by_library in sorted(times.items()):
        best = min(by_library, key=lambda name: by_library[name])
        usual = next((name for name in USUAL if name in by_library), best)
        taken = AttentionWinners(tuple(rules)).pick(*shape) or usual
        if by_library.get(taken, math.inf) > MARGIN * by_library[best]:
            rules.append((*shape, best))
    return AttentionWinners(tuple(rules))


def render(winners: Winners, attention: AttentionWinners, source: str) -> str:
    """The tables' lines as they stand in the file, markers included."""

    def rules(found: Iterable[tuple[Any, ...]]) -> str:
        return "".join(f"        ({', '.join(json.dumps(value) for value in rule)}),\n" for rule in found)

    table = f'CUDA_WINNERS = Winners(default="{winners.default}", rules=())'
    if winners.rules:
        shapes = rules(winners.rules)
        table = f'CUDA_WINNERS = Winners(\n    default="{winners.default}",\n    rules=(\n{shapes}    ),\n)'
    libraries = "ATTENTION_WINNERS = AttentionWinners()"
    if attention.rules:
        libraries = f"ATTENTION_WINNERS = AttentionWinners(\n    rules=(\n{rules(attention.rules)}    ),\n)"
    return f"{BEGIN}\n# {source}\n{table}\n{libraries}\n{END}"


def update(rows: Iterable[dict[str, Any]], path: Path | None = None) -> tuple[Winners, AttentionWinners]:
    """Rewrite the tables between their markers from `rows`, and return them.

    Args:
        path: of the file; the package's own where None.

    Raises:
        ValueError: no row pair to decide by, rows of several GPUs, or a file without markers; nothing is written then.
    """
    path = Path(_winners.__file__) if path is None else path
    rows = [row for row in latest(rows) if row["backend"] in (*KERNELS, *ATTENTION) and row["gate"] == GREEN]
    measured = ratios(rows)
    if not measured:
        raise ValueError("no op has green rows of both cuda and triton for one shape: there is nothing to decide by")
    gpus = sorted({row["gpu"] for row in rows})
    if len(gpus) > 1:
        raise ValueError(f"rows of several GPUs ({', '.join(gpus)}): the table is of one")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: must hold the lines {BEGIN!r} and {END!r} once each")
    newest = max(rows, key=lambda row: row.get("date", ""))
    source = f"{gpus[0]}, torch {newest['torch']}, triton {newest['triton']}, commit {newest['commit']}."
    winners, attention = decide(measured), decide_attention(attention_times(rows))
    before, rest = text.split(BEGIN)
    write_text(path, before + render(winners, attention, source) + rest.split(END)[1])
    return winners, attention
