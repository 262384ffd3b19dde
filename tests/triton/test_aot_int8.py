"""The int8 product and the quantising passes compiled for all architectures: no spills, tensor cores, wide accesses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_aot import HERE, MOST_REGISTERS, compile_all

# Shared memory a program may have, bytes: CUDA C programming guide, technical specifications by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 65536  # of a multiprocessor
PRODUCTS = ("int8_linear_kernel", "int8_attention_kernel")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return compile_all("aot_int8.py")


def test_every_architecture_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    names = {arch: {row["name"] for row in compiled.values() if row["arch"] == arch} for arch in SHARED}
    modules = {path.stem for path in (HERE.parent.parent / "lingbot_kernels" / "triton").glob("[a-z]*.py")}
    eight_bit = {f"{name}_kernel" for name in modules if "quantize" in name or "int8" in name}
    assert eight_bit and names == dict.fromkeys(SHARED, eight_bit)


def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert {case: row["spilled_bytes"] for case, row in compiled.items() if row["spilled_bytes"]} == {}


def test_programs_fit_a_multiprocessor(compiled: dict[str, dict[str, Any]]) -> None:
    too_large = {
        case: (row["registers"], row["num_warps"], row["shared_bytes"])
        for case, row in compiled.items()
        if row["registers"] * 32 * row["num_warps"] > REGISTERS or row["shared_bytes"] > SHARED[row["arch"]]
    }
    assert too_large == {}


def test_products_run_on_tensor_cores(compiled: dict[str, dict[str, Any]]) -> None:
    products = [row for row in compiled.values() if row["name"] in PRODUCTS]
    assert products
    for row in products:
        assert row["tensor_core"]["IGMMA" if row["arch"] == 90 else "IMMA"], row["case"]


def test_passes_leave_room_to_hide_latency(compiled: dict[str, dict[str, Any]]) -> None:
    passes = {case: row for case, row in compiled.items() if row["name"] not in PRODUCTS}
    assert {case: row["registers"] for case, row in passes.items() if row["registers"] > MOST_REGISTERS} == {}
    for case, row in passes.items():
        # A thread has four or eight neighbours: four bytes of codes and signs at a time, eight or more of values.
        narrow = {opcode for opcode in row["accesses"] if not re.search(r"\.(128|64)$|^(LDG\.E\.EL|STG\.E)$", opcode)}
        assert narrow == set(), case
