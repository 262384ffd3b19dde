"""gated_residual_camera_norm_quantize: the bits of its parts, close to float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import STREAMS, Refusals, draw, stream_refusals, vector_refusals, vectors, weight_refusals
from ops.op_case import BACKENDS, Arguments, assert_refused, check_registration
from ops.quantize_case import FORMS, SHAPES, assert_close_codes, assert_same_codes, random_signs, signs_refusals

REFUSALS: Refusals = {
    **stream_refusals(),
    **vector_refusals("gate"),
    **weight_refusals("weight", "bias"),
    **signs_refusals(),
    "one camera": (lambda a: {"cam_shift": None}, ValueError, "cam_scale, cam_shift: got one of them"),
    "camera shape": (lambda a: {"cam_scale": a["cam_scale"][:1]}, ValueError, r"cam_scale: got .*\[1, 5, 48\]"),
}


def arguments(
    shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], camera: bool = True
) -> Arguments:  # fmt: skip
    residual, compute = stream
    cameras = [draw(shape, compute, seed=seed) if camera else None for seed in (2, 3)]
    return {
        "x": draw(shape, residual), "delta": draw(shape, compute, seed=1), **vectors(shape, camera, "gate"),
        "cam_scale": cameras[0], "cam_shift": cameras[1],
        "weight": draw(shape[2:], compute, seed=4), "bias": draw(shape[2:], compute, seed=5), "eps": 1e-6,
    }  # fmt: skip


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_codes(
    signed: bool, rotate: bool, shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], camera: bool
) -> None:
    """x_out of the plain pass, and its float32 norm quantised."""
    given = arguments(shape, stream, camera)
    form = {"signs": random_signs(shape[2], signed), "rotate": rotate}

    def norm_alone(x_out: torch.Tensor, dtype: torch.dtype) -> Arguments:
        """The arguments for which the residual part does nothing, in a wider dtype."""
        nothing = dict.fromkeys(("gate", "cam_scale", "cam_shift"))
        affine = {name: given[name].to(dtype) for name in ("weight", "bias")}
        wide = x_out.to(dtype)
        return {"x": wide, "delta": torch.zeros_like(wide), **nothing, **affine, "eps": given["eps"]}

    for backend in BACKENDS:
        x_out, *got = ops.gated_residual_camera_norm_quantize(**given, **form, backend=backend)
        assert same_bits(x_out, ops.gated_residual_camera_norm(**given, backend=backend)[0])
        _, y = ops.gated_residual_camera_norm(**norm_alone(x_out, torch.float32), backend=backend)
        assert_same_codes(tuple(got), ops.rotate_quantize(y, **form, backend=backend))
        exact = reference.gated_residual_camera_norm_quantize(**norm_alone(x_out, torch.float64), **form)
        assert_close_codes(tuple(got), exact[1:])


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = {**arguments((2, 5, 48), STREAMS[0]), "signs": random_signs(48)}
    assert_refused(ops.gated_residual_camera_norm_quantize, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments((2, 5, 48), STREAMS[0])
    names = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias", "eps")
    samples = [(*(a[name] for name in names), random_signs(48), True, backend) for backend in BACKENDS]
    check_registration("gated_residual_camera_norm_quantize", samples)
