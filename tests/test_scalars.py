"""Numbers that people pass: what is exact is taken exactly, what only looks like a number is refused by name."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingbot_kernels.scalars import as_count, as_counts, as_real, as_reals

EXACT = [3, 2.5, np.float16(0.1), np.float32(0.1), np.float64(0.1), np.int8(-3), np.uint64(2**63), Fraction(1, 4)]
NO_NUMBER = [True, np.bool_(True), None, "1", b"1", torch.tensor(1.0), np.array([1.0]), 1j, [1.0], {1: 2}]


@pytest.mark.parametrize("value", EXACT, ids=lambda value: f"{type(value).__name__}")
def test_exact_numbers_are_taken_exactly(value):
    taken = as_real("shift", value)
    assert type(taken) in (int, float) and taken == value


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"^shift: got .*must be a finite number"):
        as_real("shift", value)
    with pytest.raises(ValueError, match=r"^num_chunks: got .*must be an int of 1 or more"):
        as_count("num_chunks", value, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float16("nan")])
def test_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"^shift: got"):
        as_real("shift", value)


@pytest.mark.parametrize(
    "values", [torch.tensor([1.0]), 1.0, None, "1,2", {0.5: 1}, [True], ["1"], [torch.tensor(1.0)]]
)
def test_what_is_no_sequence_of_numbers_is_refused(values):
    with pytest.raises(TypeError, match=r"^timesteps: got"):
        as_reals("timesteps", values)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=16), max_size=8))
def test_vectors_of_any_precision_are_read_exactly(values):
    for dtype in (np.float16, np.float32, np.float64):
        assert as_reals("sigmas", np.array(values, dtype)) == tuple(values)
    assert as_reals("sigmas", values) == as_reals("sigmas", tuple(values)) == as_reals("sigmas", iter(values))


@given(st.integers(), st.integers())
def test_counts_are_taken_from_their_least_value_on(value, least):
    if value >= least:
        assert as_count("n", value, least) == value
    else:
        with pytest.raises(ValueError, match=rf"n: got .*, must be an int of {least} or more"):
            as_count("n", value, least)


def test_numpy_integers_are_counts():
    assert type(as_count("n", np.int32(7), 0)) is int


def test_long_values_are_not_printed_whole():
    with pytest.raises(TypeError) as refused:
        as_real("shift", "9" * 10**6)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "values",
    [4, "44", None, (4,), (4, 4, 4), [], torch.tensor([4, 4]), {4, 5}],
    ids=lambda value: f"{type(value).__name__}"[:9] + str(len(value) if isinstance(value, (list, tuple)) else ""),
)
def test_another_number_of_counts_is_refused_by_name(values):
    with pytest.raises(TypeError, match=r"^grid: got .*, must be \(rows, columns\)$"):
        as_counts("grid", values, 1, "(rows, columns)")


@pytest.mark.parametrize("values", [(0, 4), (4, 0), (0, -1), (2.0, 4), (True, 4), (4, "4")], ids=str)
def test_counts_are_each_refused_as_one_is(values):
    with pytest.raises(ValueError, match=r"^grid: got .*, must be an int of 1 or more$"):
        as_counts("grid", values, 1, "(rows, columns)")
    assert as_counts("grid", [np.int64(2), 3], 1, "(rows, columns)") == (2, 3)
