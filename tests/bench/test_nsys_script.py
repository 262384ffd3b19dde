"""`bench/nsys.sh`: says so where nsys is absent; else profiles a capture range and asks for kernel sums by range."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "nsys.sh"


def tools(folder: Path) -> Path:
    """A folder for PATH with the few programs that the script needs, and no nsys."""
    folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "env"):
        found = next(Path(place) / name for place in ("/usr/bin", "/bin") if (Path(place) / name).exists())
        (folder / name).symlink_to(found)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_absent_nsys_is_named_and_exits_with_3(tmp_path):
    run = subprocess.run([str(SCRIPT)], env={"PATH": str(tools(tmp_path / "bin"))}, capture_output=True, text=True)
    assert run.returncode == 3
    assert "nsys" in run.stderr and "not on PATH" in run.stderr and not run.stdout


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_profiles_a_capture_range_and_prints_sums_by_range(tmp_path):
    path = tools(tmp_path / "bin")
    log = tmp_path / "log"
    stub = path / "nsys"
    stub.write_text(f'#!/usr/bin/env bash\necho "$@" >> "{log}"\n')
    stub.chmod(0o755)
    output = tmp_path / "made" / "profile"
    subprocess.run(
        [str(SCRIPT), str(output), "--layers", "2"], env={"PATH": str(path), "PYTHON": "python-of-choice"}, check=True
    )
    profile, *stats = log.read_text().splitlines()
    assert profile.startswith("profile ") and "--capture-range=cudaProfilerApi" in profile
    assert "--trace=cuda,nvtx" in profile and f"--output={output}" in profile
    assert profile.endswith(f"python-of-choice {ROOT}/bench/nsys_chunk.py --layers 2")
    assert "nvtx_kern_sum" in stats[0] and stats[0].endswith(f"{output}.nsys-rep")
    assert output.parent.is_dir()
