"""residual_norm_modulate: both backends against float64, fused equals unfused, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import SHAPES, STREAMS, draw, stream_refusals, vector_refusals, vectors
from ops.op_case import BACKENDS, Arguments, assert_refused, assert_within_rule, check_registration

REFUSALS = {**stream_refusals(), **vector_refusals("shift", "scale", "gate")}


def arguments(
    shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], per_batch: bool = False, gate: bool = True
) -> Arguments:
    given = {"x": draw(shape, stream[0]), "delta": draw(shape, stream[1], 1), "eps": 1e-6}
    given |= vectors(shape, per_batch, "shift", "scale", "gate")
    return given if gate else {**given, "gate": None}


@pytest.mark.parametrize("gate", ["one", "per batch", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", STREAMS)
def test_error_rule(stream: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], gate: str) -> None:
    given = arguments(shape, stream, gate == "per batch", gate != "none")
    assert_within_rule(ops.residual_norm_modulate, reference.residual_norm_modulate, given)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_equals_unfused(backend: str, stream: tuple[torch.dtype, torch.dtype], gate: bool) -> None:
    a = arguments((2, 5, 54), stream, gate=gate)
    x_out, y = ops.residual_norm_modulate(**a, backend=backend)
    x_apart = ops.gated_residual(a["x"], a["delta"], a["gate"], backend=backend)
    y_apart = ops.layer_norm_modulate(x_apart, a["shift"], a["scale"], a["eps"], stream[1], backend=backend)
    assert same_bits(x_out, x_apart) and same_bits(y, y_apart)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 48), (torch.float32, torch.float32))
    assert_refused(ops.residual_norm_modulate, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), (torch.float32, torch.bfloat16))
    head = (a["x"], a["delta"], a["shift"], a["scale"], a["eps"])
    check_registration("residual_norm_modulate", [(*head, a["gate"], "cpu"), (*head, None, "reference")])
