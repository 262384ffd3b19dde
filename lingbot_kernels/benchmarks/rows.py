"""One measurement as a row of a JSON-lines file: what ran, where, how fast, and against which ceiling."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import device as Device

from lingbot_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; the folder of site-packages otherwise
GREEN, RED, FAILED, ABSENT = "green", "red", "failed", "not installed"
REQUIRED = (
    "bench", "case", "op", "backend", "gpu", "driver", "torch", "triton", "commit",
    "p20_us", "p50_us", "p80_us", "bytes", "ceiling_us", "ratio", "gate",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where a run took place; the same for all of its rows."""

    gpu: str
    driver: str | None
    torch: str
    cuda: str | None
    triton: str | None
    commit: str
    date: str

    @classmethod
    def collect(cls, device: Device) -> Environment:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {cpu_name()}"
        return cls(
            gpu=gpu,
            driver=driver_version() if device.type == "cuda" else None,
            torch=torch.__version__,
            cuda=torch.version.cuda,
            triton=_triton_version(),
            commit=commit_name(),
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )


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

    def to_json(self, environment: Environment) -> dict[str, Any]:
        row = {**dataclasses.asdict(self), **dataclasses.asdict(environment)}
        return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    """Floats with five significant digits: more is noise. An infinite error becomes None, which JSON can say."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    return value


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append to a JSON-lines file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file.

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
        rows.append(row)
    return rows


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that measure the same on the same GPU, the last one of each."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["gpu"], row["op"], row["case"], row["backend"], row.get("peer", False))
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def default_path(environment: Environment, bench: str = "kernels") -> Path:
    """bench/results/<bench>-<gpu>.jsonl, in the checkout where there is one, else in the working directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", environment.gpu.lower()).strip("-")
    base = ROOT if (ROOT / "bench").is_dir() else Path.cwd()
    return base / "bench" / "results" / f"{bench}-{slug}.jsonl"


def commit_name(root: Path = ROOT) -> str:
    """LINGBOT_KERNELS_COMMIT where it is set; else the commit of the checkout, "-dirty" behind it where tracked files
    differ; else the version.
    """
    if told := os.environ.get("LINGBOT_KERNELS_COMMIT"):
        return told
    if (root / ".git").exists():
        head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
        if head:
            return head + ("-dirty" if _output("git", "-C", str(root), "status", "--porcelain", "-uno") else "")
    return f"v{__version__}"


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where it can't be told."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _output(*command: str) -> str:
    """What a command prints; "" where it fails or is absent."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
