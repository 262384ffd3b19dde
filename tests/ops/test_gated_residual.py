"""gated_residual: both backends against float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import SHAPES, STREAMS, draw, stream_refusals, vector_refusals, vectors
from ops.op_case import BACKENDS, Arguments, assert_refused, assert_within_rule, check_registration

REFUSALS = {**stream_refusals(), **vector_refusals("gate")}


def arguments(
    shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], per_batch: bool = False, gate: bool = True
) -> Arguments:
    given = {"x": draw(shape, stream[0]), "delta": draw(shape, stream[1], 1), **vectors(shape, per_batch, "gate")}
    return given if gate else {**given, "gate": None}


@pytest.mark.parametrize("gate", ["one", "per batch", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", STREAMS)
def test_error_rule(stream: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], gate: str) -> None:
    given = arguments(shape, stream, gate == "per batch", gate != "none")
    assert_within_rule(ops.gated_residual, reference.gated_residual, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_keep_their_values_and_no_tokens_are_fine(backend: str) -> None:
    given = arguments((2, 5, 48), (torch.float32, torch.bfloat16))
    before = {name: value.clone() for name, value in given.items()}
    out = ops.gated_residual(**given, backend=backend)
    assert all(same_bits(given[name], value) for name, value in before.items())
    assert out.data_ptr() != given["x"].data_ptr()
    empty = arguments((2, 0, 48), (torch.float32, torch.float32))
    assert ops.gated_residual(**empty, backend=backend).shape == (2, 0, 48)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 48), (torch.float32, torch.float32))
    assert_refused(ops.gated_residual, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), (torch.float32, torch.bfloat16))
    check_registration("gated_residual", [(a["x"], a["delta"], a["gate"], b) for b in BACKENDS])
    check_registration("gated_residual", [(a["x"], a["delta"], None, b) for b in BACKENDS])
