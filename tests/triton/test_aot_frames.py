"""The video decoder's passes for all architectures: no spills, few registers, wide accesses, few instructions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_aot import MOST_REGISTERS, compile_all


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return compile_all("aot_frames.py")


def test_every_architecture_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    for arch in (80, 90, 100, 120):
        names = {row["name"] for row in compiled.values() if row["arch"] == arch}
        assert names == {"frame_norm_silu_kernel", "frame_pixels_kernel"}


def test_nothing_spills_and_registers_are_bounded(compiled: dict[str, dict[str, Any]]) -> None:
    assert {case: row["spilled_bytes"] for case, row in compiled.items() if row["spilled_bytes"]} == {}
    assert {case: row["registers"] for case, row in compiled.items() if row["registers"] > MOST_REGISTERS} == {}


def test_pixels_move_16_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    for case, row in compiled.items():
        if row["name"] == "frame_norm_silu_kernel":
            narrow = {op: count for op, count in row["accesses"].items() if not re.search(r"\.128$", op)}
            # The two vectors over the channels are loaded by all threads together, a channel or two each.
            assert sum(narrow.values()) <= 2 and all(op.startswith("LDG") for op in narrow), case


def test_arithmetic_stays_below_the_memory_it_hides_behind(compiled: dict[str, dict[str, Any]]) -> None:
    """A thread holds 32 values: 24 instructions a value leave an H100 at its bandwidth, 70 did not."""
    most = {case: row["instructions"] for case, row in compiled.items() if row["arch"] == 90 and "hidden" in case}
    assert max(most.values()) < 24 * 32, most
