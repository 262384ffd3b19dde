"""A condition whose sum of products is exponential in its tests is named, not spelt out, in bounded time."""

from __future__ import annotations

import ast
import time

import pytest

from lingbot_kernels.tools._case_parser.conditions import Conditions
from lingbot_kernels.tools.diffusion_case_parser import DiffusionTestCaseVisitor


@pytest.mark.parametrize("tests", [3, 40])
def test_the_parity_of_many_tests(tests: int) -> None:
    conditions = Conditions()
    parity = conditions.atom("test_0()")
    for i in range(1, tests):
        atom = conditions.atom(f"test_{i}()")
        parity = conditions.either(
            conditions.both(parity, conditions.negate(atom)), conditions.both(conditions.negate(parity), atom)
        )
    start = time.process_time()
    text = conditions.describe(parity)
    assert time.process_time() - start < 5
    assert text is not None
    if tests == 3:
        assert text.count(" or ") == 3
    else:
        assert text == "a combination of 40 conditions, the first: test_0()"


def test_a_config_with_such_a_condition_keeps_its_case() -> None:
    toggles = "\n".join(f"if test_{i}():\n    flag = not flag" for i in range(30))
    names = ", ".join(f"test_{i}" for i in range(30))
    source = (
        f"from elsewhere import DiffusionTestCase, {names}\nflag = False\n{toggles}\n"
        "ONE_GPU_CASES = [DiffusionTestCase('a')]\nif flag:\n    ONE_GPU_CASES.append(DiffusionTestCase('b'))\n"
    )
    visitor = DiffusionTestCaseVisitor()
    start = time.process_time()
    visitor.visit(ast.parse(source))
    assert time.process_time() - start < 30
    assert visitor.cases["ONE_GPU_CASES"] == ["a", "b"]
