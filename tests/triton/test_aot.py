"""Every kernel compiled for sm_90 at the tuned shapes: no spills, few enough registers, 16-byte accesses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Registers of a thread that still leave room for the threads that hide the latency of HBM: 512 of an SM's 65536 / 128.
MOST_REGISTERS = 128
# Vectors of a float32 stream's 16-bit neighbours are 8 bytes: a thread then has the same elements of both.
WIDE = re.compile(r"\.128$")
HALF_WIDE = re.compile(r"\.(128|64)$")


def compile_all(program: str) -> dict[str, dict[str, Any]]:
    """case -> what it compiled to; by a process of its own, since this one may interpret kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = HERE.parent.parent
    paths = [str(root), str(root / "bench"), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(HERE / program)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]
    return {row["case"]: row for row in map(json.loads, result.stdout.splitlines())}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return compile_all("aot_launches.py")


def test_every_kernel_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    modules = {path.stem for path in (HERE.parent.parent / "lingbot_kernels" / "triton").glob("[a-z]*.py")}
    # in aot_int8.py and aot_frames.py
    elsewhere = {name for name in modules if "quantize" in name or "int8" in name or name.startswith("frame_")}
    assert {row["name"].removesuffix("_kernel") for row in compiled.values()} == modules - elsewhere


def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert {case: row["spilled_bytes"] for case, row in compiled.items() if row["spilled_bytes"]} == {}


def test_registers_are_bounded(compiled: dict[str, dict[str, Any]]) -> None:
    assert {case: row["registers"] for case, row in compiled.items() if row["registers"] > MOST_REGISTERS} == {}


def test_rows_move_16_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    narrow = {}
    for case, row in compiled.items():
        allowed = HALF_WIDE if "float32" in case else WIDE
        found = {opcode: count for opcode, count in row["accesses"].items() if not allowed.search(opcode)}
        if "cursor" in case:
            assert found.pop("LDG.E") == 1  # the cursor itself
        if case == "rope_cos_sin":
            assert found.pop("LDG.E.64") == 1  # frequencies
            assert found.pop("STG.E") == 2  # an angle a thread: a warp's cosines, and its sines, are 128 bytes together
        if found:
            narrow[case] = found
        assert any(opcode.startswith("STG") for opcode in row["accesses"])
    assert narrow == {}
