"""gated_residual_camera_norm: both backends against float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.norm_case import SHAPES, STREAMS, draw, stream_refusals, vector_refusals, vectors, weight_refusals
from ops.op_case import BACKENDS, Arguments, assert_refused, assert_within_rule, check_registration

REFUSALS = {
    **stream_refusals(),
    **vector_refusals("gate"),
    **weight_refusals("weight", "bias"),
    "scale alone": (lambda a: {"cam_shift": None}, ValueError, "cam_scale, cam_shift: got one of them, must be both"),
    "shift alone": (lambda a: {"cam_scale": None}, ValueError, "cam_scale, cam_shift: got one of them"),
    "cam_scale shape": (lambda a: {"cam_scale": a["cam_scale"][:1]}, ValueError, r"cam_scale: got .*\[1, 5, 48\]"),
    "cam_shift dtype": (lambda a: {"cam_shift": a["cam_shift"].half()}, TypeError, "cam_shift: got torch.float16"),
    "cam_shift meta": (lambda a: {"cam_shift": a["cam_shift"].to("meta")}, TypeError, "cam_shift: got .*on meta"),
    "cam_scale sliced": (
        lambda a: {"cam_scale": draw((2, 6, 48))[:, 1:]}, ValueError, "cam_scale: got strides .*must be contiguous",
    ),
}  # fmt: skip


def arguments(
    shape: tuple[int, int, int], stream: tuple[torch.dtype, torch.dtype], per_batch: bool = False, gate: bool = True,
    camera: bool = True,
) -> Arguments:  # fmt: skip
    branch = stream[1]
    given = {"x": draw(shape, stream[0]), "delta": draw(shape, branch, 1), **vectors(shape, per_batch, "gate")}
    given |= {"weight": draw(shape[2:], branch, 2), "bias": draw(shape[2:], branch, 3), "eps": 1e-6}
    given |= {name: draw(shape, branch, 4 + i) if camera else None for i, name in enumerate(("cam_scale", "cam_shift"))}
    return given if gate else {**given, "gate": None}


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("gate", ["one", "per batch", "none"])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("stream", STREAMS)
def test_error_rule(
    stream: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], gate: str, camera: bool
) -> None:
    given = arguments(shape, stream, gate == "per batch", gate != "none", camera)
    assert_within_rule(ops.gated_residual_camera_norm, reference.gated_residual_camera_norm, given)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_camera_it_is_the_residual_and_the_norm(
    backend: str, stream: tuple[torch.dtype, torch.dtype]
) -> None:
    a = arguments((2, 5, 54), stream, camera=False)
    x_out, y = ops.gated_residual_camera_norm(**a, backend=backend)
    assert same_bits(x_out, ops.gated_residual(a["x"], a["delta"], a["gate"], backend=backend))
    want = torch.nn.functional.layer_norm(x_out.float(), (54,), a["weight"].float(), a["bias"].float(), 1e-6)
    assert (y.float() - want).norm() <= (1e-6 if stream[1] == torch.float32 else 4e-3) * want.norm()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 48), (torch.float32, torch.float32))
    assert_refused(ops.gated_residual_camera_norm, given, change(given), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    samples = []
    for backend, camera in (("cpu", True), ("reference", False)):
        a = arguments((2, 5, 48), (torch.float32, torch.bfloat16), camera=camera, gate=camera)
        names = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias", "eps")
        samples.append((*(a[name] for name in names), backend))
    check_registration("gated_residual_camera_norm", samples)
