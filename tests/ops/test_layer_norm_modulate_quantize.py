"""layer_norm_modulate_quantize: the bits of its two halves, close to float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch

from lingbot_kernels import ops, reference
from ops.norm_case import Refusals, draw, stream_refusals, vector_refusals, vectors
from ops.op_case import BACKENDS, DTYPES, Arguments, assert_refused, check_registration
from ops.quantize_case import FORMS, SHAPES, assert_close_codes, assert_same_codes, random_signs, signs_refusals

REFUSALS: Refusals = {
    **{name: case for name, case in stream_refusals().items() if name.startswith("x ") and name != "x narrower"},
    **vector_refusals("shift", "scale"),
    **signs_refusals(),
}


def arguments(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, per_batch: bool = False) -> Arguments:
    return {"x": draw(shape, dtype), **vectors(shape, per_batch, "shift", "scale"), "eps": 1e-6}


@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_codes(
    signed: bool, rotate: bool, shape: tuple[int, int, int], dtype: torch.dtype, per_batch: bool
) -> None:  # fmt: skip
    """The float32 y of the plain pass, quantised: it is not rounded in between."""
    given, form = arguments(shape, dtype, per_batch), {"signs": random_signs(shape[2], signed), "rotate": rotate}
    wide = {**given, "x": given["x"].float()}
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    for backend in BACKENDS:
        got = ops.layer_norm_modulate_quantize(**given, **form, backend=backend)
        y = ops.layer_norm_modulate(**wide, backend=backend)
        assert_same_codes(got, ops.rotate_quantize(y, **form, backend=backend))
        assert_close_codes(got, reference.layer_norm_modulate_quantize(**exact, **form))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_ordinary_values(backend: str) -> None:
    given = arguments((1, 3, 256), torch.bfloat16)
    given["shift"] = torch.zeros(256)
    given["x"][0, 0] = 3.0  # a constant row: its norm is zero
    given["x"][0, 1, 5] = float("nan")
    codes, row_scale = ops.layer_norm_modulate_quantize(**given, backend=backend)
    assert (codes[0, :2] == 0).all() and row_scale[0, 0] == 0 and row_scale[0, 1].isnan()
    assert codes[0, 2].abs().max() == 127 and row_scale[0, 2].isfinite()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = {**arguments((2, 5, 48)), "signs": random_signs(48)}
    assert_refused(ops.layer_norm_modulate_quantize, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48))
    samples = [(a["x"], a["shift"], a["scale"], 1e-6, random_signs(48), True, backend) for backend in BACKENDS]
    check_registration("layer_norm_modulate_quantize", samples)
