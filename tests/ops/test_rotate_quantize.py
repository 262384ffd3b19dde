"""rotate_quantize: the same bits from every backend, close to float64, refusals, registration."""

from __future__ import annotations

import math

import pytest
import torch

from lingbot_kernels import ops, reference
from lingbot_kernels.reference.rotate_quantize import hadamard_blocks
from ops.norm_case import Refusals, draw, stream_refusals
from ops.op_case import BACKENDS, DTYPES, Arguments, assert_refused, check_registration
from ops.quantize_case import FORMS, SHAPES, assert_close_codes, assert_same_codes, random_signs, signs_refusals

REFUSALS: Refusals = {
    **{name: case for name, case in stream_refusals().items() if name in ("x dims", "x one dim", "x stride")},
    "x integers": (lambda a: {"x": a["x"].int()}, Exception, "int32"),
    "x no channels": (lambda a: {"x": a["x"][..., :0]}, ValueError, "x: got .*must have one channel or more"),
    **signs_refusals(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_every_backend_has_the_same_bits(
    signed: bool, rotate: bool, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, signs = draw(shape, dtype), random_signs(shape[2], signed)
    got = {backend: ops.rotate_quantize(x, signs, rotate, backend=backend) for backend in BACKENDS}
    assert_same_codes(got["cpu"], got["reference"])
    assert_same_codes(ops.rotate_quantize(x, signs, rotate), got["cpu"])
    assert_close_codes(got["cpu"], reference.rotate_quantize(x.double(), signs, rotate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_stand_for_the_rotated_row(backend: str) -> None:
    """What a product with weights rotated alike relies on: half a step of each row's scale at most."""
    x, signs = draw((2, 3, 200)), random_signs(200)
    codes, row_scale = ops.rotate_quantize(x, signs, backend=backend)
    rotated = hadamard_blocks(torch.nn.functional.pad(x, (0, 56)).double() * signs)
    assert ((codes * row_scale.unsqueeze(-1) - rotated).abs() <= 0.5001 * row_scale.unsqueeze(-1)).all()
    assert (codes.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_lie_apart(backend: str, dtype: torch.dtype) -> None:
    x = draw((2, 6, 400), dtype)[:, 1::2, 77:277]
    got = ops.rotate_quantize(x, random_signs(200), backend=backend)
    assert_same_codes(got, ops.rotate_quantize(x.contiguous(), random_signs(200), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_ordinary_values(backend: str) -> None:
    x = draw((1, 5, 384), torch.bfloat16)
    x[0, 0] = 0
    x[0, 1, 300] = math.nan
    x[0, 2, 7] = math.inf
    x[0, 3, 200] = 1e5
    codes, row_scale = ops.rotate_quantize(x, random_signs(384), backend=backend)
    assert (codes[0, :3] == 0).all() and codes[0, 3, 128:256].abs().min() == 127
    assert row_scale[0, 0] == 0 and row_scale[0, 1:3].isnan().all() and row_scale[0, 3:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48)])
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    codes, row_scale = ops.rotate_quantize(torch.zeros(shape), backend=backend)
    assert codes.shape == (*shape[:2], 128) and row_scale.shape == shape[:2]


def test_float64_is_left_to_the_reference() -> None:
    x = draw((1, 2, 128)).double()
    assert_same_codes(ops.rotate_quantize(x), reference.rotate_quantize(x))
    with pytest.raises(ops.BackendUnavailable, match="float64"):
        ops.rotate_quantize(x, backend="cpu")


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given: Arguments = {"x": draw((2, 5, 48)), "signs": random_signs(48), "rotate": True}
    assert_refused(ops.rotate_quantize, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    x = draw((2, 5, 48))
    samples = [(x, signs, True, backend) for backend in BACKENDS for signs in (None, random_signs(48))]
    check_registration("rotate_quantize", samples)
