"""What a measurement ran on: machine, versions, compiled core. Plain data, ready for JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from lingbot_kernels._version import __version__
from lingbot_kernels.ops import _native


def collect() -> dict[str, Any]:
    """The environment.

    Keys: lingbot_kernels, commit (None outside a git checkout; "+" at its end: with changes), python, platform, cpu,
    cpu_cores (that this process may use), torch, torch_threads, torch_cuda, cudnn, triton, flash_attn_4, matplotlib,
    driver, gpus (name, compute capability, bytes), core (None, or version, cpu_isa, cuda, cuda_architectures),
    core_missing (why there is none).
    """
    cuda = torch.cuda.is_available()
    core = _native.core()
    return {
        "lingbot_kernels": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "triton": _version("triton"),
        "flash_attn_4": _version("flash-attn-4"),
        "matplotlib": _version("matplotlib"),
        "driver": _driver(),
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


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn() -> str | None:
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    # From version 9 on: major * 10000 + minor * 100 + patch.
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "compute_capability": capability, "bytes": properties.total_memory}


def _output(*command: str) -> str | None:
    """What a program printed, or None where it isn't there or failed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changes else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
