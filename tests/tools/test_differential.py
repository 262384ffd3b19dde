"""Generated configs: the parser's answer against really executing them; no difference may go unreported."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import differential
import module_generator


@pytest.mark.parametrize("part", range(4))
def test_generated_modules(part: int) -> None:
    totals = differential.run(modules=60, seed=1000 + part, unresolved=0.06)
    assert not totals.differences, "\n".join(f"{d}\n{text}" for _, d, text in totals.differences)
    assert totals.executed > 0.6 * totals.modules
    assert totals.executed - totals.reported > 0.3 * totals.executed, (
        "too few modules resolve: the comparison says little"
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.sampled_from([0.0, 0.1]), st.integers(1, 4))
def test_small_modules(rng: Random, unresolved: float, statements: int) -> None:
    text = module_generator.generate(rng, unresolved=unresolved, statements=statements)
    outcome = differential.compare(text)
    assert outcome.difference is None, f"{outcome.difference}\n{text}"


def test_comparison_sees_a_lost_case() -> None:
    """The comparison itself: an answer that lacks a case, or has one too many, is a difference."""
    head = "from platform_stub import DiffusionTestCase as C, flag0\nTWO_GPU_CASES = []\n"
    text = head + 'ONE_GPU_CASES = [C("a"), C("b")]\n'
    lost = differential.parse(text.replace(', C("b")', ""))
    assert "lost ['b']" in str(differential.compare(text, parsed=lost).difference)
    spurious = differential.parse(text.replace('C("b")', 'C("b"), C("c")'))
    assert "absent: ['c']" in str(differential.compare(text, parsed=spurious).difference)
    wrong_order = differential.parse(text.replace('C("a"), C("b")', 'C("b"), C("a")'))
    assert "order" in str(differential.compare(text, parsed=wrong_order).difference)
    assert differential.compare(text).difference is None
    conditional = text + 'if flag0():\n    ONE_GPU_CASES.append(C("d"))\n'
    inverted = differential.parse(conditional.replace("if flag0", "if not flag0"))
    assert "condition" in str(differential.compare(conditional, parsed=inverted).difference)
