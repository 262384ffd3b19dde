"""What a measurement ran on: machine, versions, compiled core. One collector, for reports and for rows."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import device as Device

from lingbot_kernels._version import __version__
from lingbot_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; the folder of site-packages otherwise


def collect() -> dict[str, Any]:
    """The environment of a report, plain data.

    Keys: lingbot_kernels, commit (as `commit_of` tells it), python, platform, cpu, cpu_cores (that this process may
    use), torch, torch_threads, torch_cuda, cudnn, triton, flash_attn_4, fa3_fwd, matplotlib, driver, gpus (name,
    compute capability, bytes), core (None, or version, cpu_isa, cuda, cuda_architectures), core_missing (why there is
    none).
    """
    cuda = torch.cuda.is_available()
    core = _native.core()
    return {
        "lingbot_kernels": __version__,
        "commit": commit_of(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "triton": _triton(),
        "flash_attn_4": _version("flash-attn-4"),
        "fa3_fwd": _version("fa3-fwd"),
        "matplotlib": _version("matplotlib"),
        "driver": driver_version(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "core": None
        if core is None
        else {
            "version": core.version,
            "cpu_isa": core.cpu_isa,
            "cuda": core.compiled_with_cuda,
            "cuda_architectures": core.cuda_architectures,
        },
        "core_missing": _native.why_not_cpu(),
    }


def report_head(device: Device) -> dict[str, Any]:
    """What every report begins with: environment, and the name of the device that was measured."""
    return {"environment": collect(), "device": device_name(device)}


@dataclass(frozen=True)
class Environment:
    """Where a run took place, as its rows say it: the same for all of them."""

    gpu: str
    driver: str | None
    torch: str
    cuda: str | None
    triton: str | None
    commit: str
    date: str

    @classmethod
    def collect(cls, device: Device) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            gpu=torch.cuda.get_device_name(device) if on_gpu else f"CPU {cpu_name()}",
            driver=driver_version() if on_gpu else None,
            torch=torch.__version__,
            cuda=torch.version.cuda,
            triton=_triton(),
            commit=commit_of() or f"v{__version__}",
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def commit_of(root: Path = ROOT) -> str | None:
    """LINGBOT_KERNELS_COMMIT where it is set; else the commit of the checkout at `root`, with "-dirty" behind it where
    tracked files differ from it; None where there is no checkout.
    """
    if told := os.environ.get("LINGBOT_KERNELS_COMMIT"):
        return told
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = head and _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return (head + ("-dirty" if changes else "")) or None


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where it can't be told."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def cpu_name() -> str:
    """The processor's model name, or what else the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> str | None:
    return _version("triton") or _version("pytorch-triton")


def _cudnn() -> str | None:
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    # From version 9 on: major * 10000 + minor * 100 + patch.
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "compute_capability": capability, "bytes": properties.total_memory}


def _output(*command: str) -> str:
    """What a command prints; "" where it fails or is absent."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
