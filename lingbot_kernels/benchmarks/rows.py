"""One measurement as a row of a JSON-lines file: what ran, where, how fast, and against which ceiling."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingbot_kernels.benchmarks.environment import ROOT, Environment
from lingbot_kernels.benchmarks.timing import percentiles
from lingbot_kernels.files import append_text, check_output

OURS = "lingbot_kernels"  # the backend of rows that are of no single op
GREEN, RED, FAILED, ABSENT = "green", "red", "failed", "not installed"
REQUIRED = (
    "bench", "case", "op", "backend", "gpu", "driver", "torch", "triton", "commit",
    "p20_us", "p50_us", "p80_us", "bytes", "ceiling_us", "ratio", "gate",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One op, case and backend. Times in microseconds; None where there is none, above all behind a gate that isn't
    green.

    Attributes:
        case: the shape's name, with what sets a variant apart.
        peer: whether this is another library's or formulation's way of doing the same.
        bytes: activations read and written once.
        ceiling_us: `ceiling`, measured in the same process: a copy of `bytes`, or the bare matrix product.
        ratio: p50_us / ceiling_us.
        wall_us: host time of a call from Python.
        gate: "green", "red", "failed" (it raised) or "not installed"; `note` says why.
        error, plain_error: relative to the float64 oracle: this row's, and the plain formulation's.
        method, calls, samples: how it was timed, see `timing.Timing`.
        precision: of the network that this is part of: "bfloat16" (or another dtype's name), "int8" (its products) or
            "int8_qk" (its products and its attention).
    """

    bench: str
    case: str
    op: str
    backend: str
    peer: bool
    shape: tuple[int, ...]
    dtype: str
    tokens: int
    dim: int
    gate: str
    bytes: int
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    ceiling: str = ""
    ceiling_us: float | None = None
    ratio: float | None = None
    tbps: float | None = None
    tflops: float | None = None
    wall_us: float | None = None
    error: float | None = None
    plain_error: float | None = None
    method: str = ""
    calls: int = 0
    samples: int = 0
    note: str = ""
    precision: str = "bfloat16"

    def timed(self, times_ms: Sequence[float], ceiling_ms: float = 0.0, ceiling: str = "") -> Row:
        """The row with the spread of these milliseconds, held against the ceiling's where that has any."""
        if not times_ms:
            return self
        spread: dict[str, Any] = {f"{name}_us": 1e3 * value for name, value in percentiles(times_ms).items()}
        if ceiling_ms:
            spread |= {"ceiling": ceiling or self.ceiling, "ceiling_us": 1e3 * ceiling_ms}
            spread["ratio"] = spread["p50_us"] / spread["ceiling_us"]
        return dataclasses.replace(self, samples=len(times_ms), calls=1, **spread)

    def to_json(self, environment: Environment | None = None) -> dict[str, Any]:
        row = {**dataclasses.asdict(self), **({} if environment is None else dataclasses.asdict(environment))}
        return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    """Floats with five significant digits: more is noise. An infinite error becomes None, which JSON can say."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    return value


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append to a JSON-lines file, which is made where there is none: all of the rows, or none."""
    append_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; those from before there was a `precision` get the one that they had.

    Raises:
        ValueError: naming the line that is no row, and what it lacks.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        missing = [field for field in REQUIRED if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{path}:{number}: not a row of this bench, lacks {', '.join(missing)}")
        row.setdefault("precision", row.get("dtype", "bfloat16") if row["bench"] == "caching" else "bfloat16")
        rows.append(row)
    return rows


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that measure the same on the same GPU, the last one of each."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        which = (row["op"], row["case"], row["backend"], row.get("peer", False), row.get("precision", "bfloat16"))
        key = (row["gpu"], *which)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def default_path(environment: Environment, bench: str = "kernels") -> Path:
    """bench/results/<bench>-<gpu>.jsonl, in the checkout where there is one, else in the working directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", environment.gpu.lower()).strip("-")
    base = ROOT if (ROOT / "bench").is_dir() else Path.cwd()
    return base / "bench" / "results" / f"{bench}-{slug}.jsonl"


def failure_note(error: BaseException) -> str:
    """An exception in one line, for a row's note."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class RowFile:
    """The rows of one run: each is appended to the file and said in a line as soon as it is there.

    Where the file can't be written any more, the run goes on, and `close` says the rows that are not in it as they
    would stand there.

    Attributes:
        error: why rows are missing in the file; None where none is.

    Args:
        path: of the file; `default_path` of the bench where None.
        say: gets the lines.
        line: a row as one of them.
        more: fields of every row besides a Row's own.

    Raises:
        ValueError: the file can't be written.
    """

    def __init__(
        self,
        environment: Environment,
        bench: str,
        path: Path | None,
        say: Callable[[str], object],
        line: Callable[[Row], str],
        **more: Any,
    ) -> None:
        self.path = path or default_path(environment, bench)
        self.rows: list[dict[str, Any]] = []
        self.error: OSError | None = None
        self._missing: list[dict[str, Any]] = []
        self._environment, self._say, self._line, self._more = environment, say, line, more
        check_output(self.path, append=True)

    def report(self, row: Row) -> None:
        self.rows.append({**row.to_json(self._environment), **self._more})
        self._missing.append(self.rows[-1])
        self._append()
        self._say(self._line(row))

    def close(self) -> None:
        """Say how many rows there are, and where; and those that could not be written."""
        self._append()
        for row in self._missing:
            self._say(json.dumps(row))
        self._say(f"{len(self.rows) - len(self._missing)} rows appended to {self.path}")

    def _append(self) -> None:
        try:
            append_rows(self.path, self._missing)
            self._missing, self.error = [], None
        except OSError as error:
            self.error = error


def format_forward(row: Row) -> str:
    """A row of a whole forward in one line: what, by whom, milliseconds, ratio to the ceiling, gate and note."""
    time = "" if row.p50_us is None else f"{row.p50_us / 1e3:10.3f} ms"
    ratio = "" if row.ratio is None else f"{row.ratio:7.4f}"
    return f"{row.op:24} {row.backend:24} {time:>13} {ratio:>8}  {row.gate}  {row.note}".rstrip()
