"""Runs the kernel checks: under Triton's interpreter on the CPU, and compiled where there is a GPU.

Triton decides once a process, when it is imported, whether it interprets: each run is a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CHECKS = [
    "kernels_prologue.py",
    "kernels_passes.py",
    "kernels_int8.py",
    "kernels_int8_attention.py",
    "kernels_frames.py",
]


def run_checks(name: str, interpret: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = HERE.parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / name)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-8000:]
    summary = result.stdout.strip().splitlines()[-1]
    assert re.search(r"[1-9]\d* passed", summary) and "skipped" not in summary and "xfailed" not in summary, output


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str) -> None:
    run_checks(name, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name: str) -> None:
    run_checks(name, interpret=False)
