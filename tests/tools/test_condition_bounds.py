"""Conditions with many tests: named where they can't be spelt out, reported where not all their values can be tried."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lingbot_kernels.tools._case_parser.conditions import Cube, describe
from lingbot_kernels.tools._case_parser.results import Options, parse_config

LISTS = {"ONE_GPU_CASES": "1-gpu"}


def parity(tests: int) -> set[Cube]:
    """Every way in which an odd number of tests holds."""
    return {
        frozenset((f"test_{i}()", bool(bits >> i & 1)) for i in range(tests))
        for bits in range(2**tests)
        if bits.bit_count() % 2
    }


@pytest.mark.parametrize("tests", [3, 9])
def test_the_parity_of_many_tests(tests: int) -> None:
    start = time.process_time()
    text = describe(parity(tests), {}, {f"test_{i}()": i for i in range(tests)})
    assert time.process_time() - start < 5
    assert text is not None
    if tests == 3:
        assert text.count(" or ") == 3
    else:
        assert text == "a combination of 9 conditions, the first: test_0()"


def test_a_condition_says_no_test_twice() -> None:
    order = {"a": 0, "b": 1, "c": 2}
    cubes = {frozenset({("a", True), ("b", v), ("c", w)}) for v in (True, False) for w in (True, False)}
    assert describe(cubes, {}, order) == "a"
    assert describe({frozenset({("a", True)}), frozenset({("a", False), ("b", True)})}, {}, order) == "a or b"
    assert describe({frozenset({("a", True)}), frozenset({("a", False)})}, {}, order) is None
    product = frozenset({("x() == 1", False), ("x() == 2", True)})
    assert describe({product}, {}, {}) == "x() == 2"


def test_a_config_with_such_a_condition_keeps_its_case(tmp_path: Path) -> None:
    toggles = "\n".join(f"if test_{i}():\n    flag = not flag" for i in range(30))
    names = ", ".join(f"test_{i}" for i in range(30))
    config = tmp_path / "cases.py"
    config.write_text(
        f"from elsewhere import DiffusionTestCase, {names}\nflag = False\n{toggles}\n"
        "ONE_GPU_CASES = [DiffusionTestCase('a')]\nif flag:\n    ONE_GPU_CASES.append(DiffusionTestCase('b'))\n"
    )
    start = time.perf_counter()
    parsed = parse_config(config, LISTS, Options("DiffusionTestCase", "id", timeout=5))
    assert time.perf_counter() - start < 60
    assert [c.id for c in parsed.suites["1-gpu"]] == ["a", "b"]
    a, b = parsed.suites["1-gpu"]
    assert a.condition is None and b.condition == "a combination of 30 conditions, the first: test_0()"
    assert parsed.stopped and "combinations" in parsed.stopped[0].reason
