"""Tables of the rows in bench/results, as a page: what was measured is shown, and nothing else."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

_HEADER = "# Every measured row\n\nThe latest of each measurement in `bench/results`, and the pictures drawn from them."
_COLUMNS = ("case", "op", "backend", "p20", "p50", "p80", "ceiling", "p50 / ceiling", "TB/s", "gate", "commit")


def read(folder: Path) -> list[dict[str, Any]]:
    """The latest row of each bench, GPU, case, op, backend and precision, in the order of the files."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row.setdefault("precision", "bfloat16")  # the field came with the second one
            latest[tuple(row.get(key) for key in ("bench", "gpu", "case", "op", "backend", "peer", "precision"))] = row
    return list(latest.values())


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 10_000 else f"{microseconds:.1f} us"


def _cells(row: dict[str, Any]) -> list[str]:
    ratio, rate = row.get("ratio"), row.get("tbps")
    backend = row["backend"] + (f", {row['precision']}" if row["precision"] != "bfloat16" else "")
    return [
        row["case"], row["op"], backend, *(_time(row.get(f"{p}_us")) for p in ("p20", "p50", "p80")),
        _time(row.get("ceiling_us")), "-" if ratio is None else f"{ratio:.3f}", "-" if rate is None else f"{rate:.2f}",
        row["gate"], str(row.get("commit", "-")),
    ]  # fmt: skip


def page(folder: Path, target: Path) -> str:
    """The page's Markdown; pictures are named relative to `target`'s folder."""
    parts, groups = [_HEADER], defaultdict(list)
    for row in read(folder):
        groups[row["bench"], row["gpu"], row.get("torch"), row.get("driver")].append(row)
    for (bench, gpu, torch, driver), rows in groups.items():
        parts.append(f"## {bench}: {gpu}\n\ntorch {torch}" + (f", driver {driver}" if driver else ""))
        lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(_cells(row) for row in rows)]
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines))
    for picture in sorted(folder.glob("*.png")):
        parts.append(f"![{picture.stem}]({Path(os.path.relpath(picture, target.parent)).as_posix()})")
    if len(parts) == 1:
        parts.append("There is no row yet.")
    return "\n\n".join(parts) + "\n"


_PROLOGUE = ("qk_norm_rope_kv_write", "k_norm_rope_kv_write")
_FORWARDS = ("bare_floor", "denoise_step", "context_update", "chunk")


def _table(*lines: tuple[str, ...]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], ("---",) * len(lines[0]), *lines[1:]))


def headline(folder: Path) -> str:
    """What the concept page shows: the prologue's ways in the largest case of a chunk, and the forwards of each
    model, from green rows of ours and of peers.
    """
    green = [row for row in read(folder) if row["gate"] == "green" and row["p50_us"] is not None]
    parts = []
    prologue = [row for row in green if row["op"] in _PROLOGUE and row["case"] == "s4524-d5120"]
    for gpu in dict.fromkeys(row["gpu"] for row in prologue):
        rows = [
            (row["op"], row["backend"], _time(row["p50_us"]), f"{row['ratio']:.2f}")
            for row in prologue
            if row["gpu"] == gpu
        ]
        parts += [
            f"Norm, rotation and cache write of a chunk, 4524 tokens of 5120 channels, {gpu}, against a copy of the "
            "same bytes:",
            _table(("op", "way", "median", "x copy"), *rows),
        ]
    model = [row for row in green if row["bench"] == "model" and row["op"] in _FORWARDS]
    for gpu in dict.fromkeys(row["gpu"] for row in model):
        rows = [
            (row["case"], row["op"].replace("_", " "), row["backend"], _time(row["p50_us"]))
            for row in model
            if row["gpu"] == gpu
        ]
        parts += [
            f"Whole forwards, {gpu}; the bare floor is the same matrix products and attention and nothing else:",
            _table(("case", "forward", "by", "median"), *rows),
        ]
    return "\n\n".join(parts or ["There is no row yet."]) + "\n"


def write(folder: Path, target: Path) -> None:
    """Write measured.md and headline.inc into the folder `target`, where they differ."""
    target.mkdir(exist_ok=True)
    path = target / "measured.md"
    for file, text in ((path, page(folder, path)), (target / "headline.inc", headline(folder))):
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
