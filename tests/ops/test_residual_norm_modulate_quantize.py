"""residual_norm_modulate_quantize: the bits of its parts, close to float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import STREAMS, Refusals, draw, stream_refusals, vector_refusals, vectors
from ops.op_case import BACKENDS, Arguments, assert_refused, check_registration
from ops.quantize_case import FORMS, SHAPES, assert_close_codes, assert_same_codes, random_signs, signs_refusals

REFUSALS: Refusals = {**stream_refusals(), **vector_refusals("shift", "scale", "gate"), **signs_refusals()}


def arguments(
    shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], per_batch: bool = False
) -> Arguments:  # fmt: skip
    x, delta = draw(shape, stream[0]), draw(shape, stream[1], seed=1)
    return {"x": x, "delta": delta, **vectors(shape, per_batch, "shift", "scale", "gate"), "eps": 1e-6}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_codes(
    signed: bool, rotate: bool, shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], gated: bool
) -> None:
    """x_out of the plain pass, and its norm as layer_norm_modulate_quantize has it."""
    given = arguments(shape, stream, per_batch=gated)
    given["gate"] = given["gate"] if gated else None
    form = {"signs": random_signs(shape[2], signed), "rotate": rotate}
    vectors_, eps = (given["shift"], given["scale"]), given["eps"]
    for backend in BACKENDS:
        x_out, *got = ops.residual_norm_modulate_quantize(**given, **form, backend=backend)
        assert same_bits(x_out, ops.residual_norm_modulate(**given, backend=backend)[0])
        norm = ops.layer_norm_modulate_quantize(x_out, *vectors_, eps, **form, backend=backend)
        assert_same_codes(tuple(got), norm)
        exact = reference.layer_norm_modulate_quantize(x_out.double(), *(v.double() for v in vectors_), eps, **form)
        assert_close_codes(tuple(got), exact)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = {**arguments((2, 5, 48), STREAMS[0]), "signs": random_signs(48)}
    assert_refused(ops.residual_norm_modulate_quantize, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), STREAMS[0])
    names = ("x", "delta", "shift", "scale", "eps", "gate")
    samples = [(*(a[name] for name in names), random_signs(48), True, backend) for backend in BACKENDS]
    check_registration("residual_norm_modulate_quantize", samples)
