"""rms_norm: both backends against float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import SHAPES, draw, stream_refusals, weight_refusals
from ops.op_case import BACKENDS, DTYPES, Arguments, assert_refused, assert_within_rule, check_registration

REFUSALS = {
    **{
        name: case
        for name, case in stream_refusals().items()
        if name in ("x dims", "x one dim", "x integers", "x stride")
    },
    **weight_refusals("weight"),
}


def arguments(shape: tuple[int, int, int], dtype: torch.dtype) -> Arguments:
    return {"x": draw(shape, dtype), "weight": draw(shape[2:], dtype, 1), "eps": 1e-6}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    assert_within_rule(ops.rms_norm, reference.rms_norm, arguments(shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_row_is_read_where_it_lies(backend: str) -> None:
    x, weight = draw((2, 5, 96), torch.bfloat16), draw((48,), torch.bfloat16, 1)
    for part in x.chunk(2, dim=-1):
        got = ops.rms_norm(part, weight, 1e-6, backend=backend)
        assert got.is_contiguous()
        assert same_bits(got, ops.rms_norm(part.contiguous(), weight, 1e-6, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    assert ops.rms_norm(torch.zeros(2, 0, 8), torch.ones(8), 1e-6, backend=backend).shape == (2, 0, 8)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 48), torch.float32)
    assert_refused(ops.rms_norm, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), torch.bfloat16)
    check_registration("rms_norm", [(a["x"], a["weight"], a["eps"], backend) for backend in BACKENDS])
