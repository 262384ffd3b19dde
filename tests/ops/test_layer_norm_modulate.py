"""layer_norm_modulate: both backends against float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import SHAPES, STREAMS, draw, stream_refusals, vector_refusals, vectors
from ops.op_case import BACKENDS, Arguments, assert_refused, assert_within_rule, check_registration

REFUSALS = {
    **{name: case for name, case in stream_refusals().items() if name.startswith("x ") and name != "x narrower"},
    **vector_refusals("shift", "scale"),
    "widened": (
        lambda a: {"x": a["x"].bfloat16(), "out_dtype": torch.float32}, TypeError, "out_dtype: got torch.float32, must",
    ),
}  # fmt: skip


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, per_batch: bool = False) -> Arguments:
    return {"x": draw(shape, dtype), **vectors(shape, per_batch, "shift", "scale"), "eps": 1e-6}


@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", STREAMS)
def test_error_rule(stream: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], per_batch: bool) -> None:
    given = arguments(shape, stream[0], per_batch)

    def exact(out_dtype: torch.dtype, **wide: torch.Tensor) -> torch.Tensor:
        return reference.layer_norm_modulate(**wide)

    assert_within_rule(ops.layer_norm_modulate, exact, {**given, "out_dtype": stream[1]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_streams_dtype_is_the_default(backend: str) -> None:
    given = arguments((2, 5, 48), torch.bfloat16)
    got = ops.layer_norm_modulate(**given, backend=backend)
    assert same_bits(got, ops.layer_norm_modulate(**given, out_dtype=torch.bfloat16, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_costs_no_accuracy(backend: str) -> None:
    """Two passes: a variance from E[x^2] - E[x]^2 would lose every digit here."""
    given = arguments((1, 3, 512), torch.float32)
    given["x"] += 1000.0
    exact = reference.layer_norm_modulate(**{n: v.double() if n != "eps" else v for n, v in given.items()})
    got = ops.layer_norm_modulate(**given, backend=backend)
    assert (got - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 48), torch.float32)
    assert_refused(ops.layer_norm_modulate, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), torch.float32)
    samples = [(a["x"], a["shift"], a["scale"], a["eps"], torch.bfloat16, backend) for backend in BACKENDS]
    check_registration("layer_norm_modulate", samples)
