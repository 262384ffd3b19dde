"""Checks of the norm and residual passes against the reference.

Not collected by itself: test_kernels.py runs it under the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from checks import DTYPES, EPS, assert_as_good_as, poisoned, randn, same_bits

from lingbot_kernels import reference
from lingbot_kernels.triton import (
    _rows,
    gated_residual,
    gated_residual_camera_norm,
    layer_norm_modulate,
    residual_norm_modulate,
    rms_norm,
)

BF16 = torch.bfloat16
DIMS = [5120, 1536, 640, 200]
DTYPE_PAIRS = [(t, t) for t in DTYPES] + [(torch.float32, BF16), (torch.float32, torch.float16)]
# (residual, dtype, dim): every dtype pair on a row with a masked tail, every width in bf16.
CASES = [(*pair, 200) for pair in DTYPE_PAIRS] + [(BF16, BF16, dim) for dim in DIMS[:3]] + [(torch.float32, BF16, 1536)]


def modulations(count: int, batch: int, dim: int, per_batch: bool) -> list[torch.Tensor]:
    """`count` vectors as the model slices them: [D] rows, or [B, D] strided views of [B, count, D]."""
    return list(randn(batch, count, dim, seed=3).unbind(1)) if per_batch else list(randn(count, dim, seed=3).unbind(0))


def double(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [1, 2])
def test_rms_norm(dtype: torch.dtype, dim: int, rows: int) -> None:
    x = randn(2, 3, 2, dim, dtype=dtype)[:, :, 1]
    weight = (1 + 0.2 * randn(dim, seed=1)).to(dtype)
    y = poisoned(2, 3, dim, dtype=dtype)
    config = _rows.word_config(dim, x.element_size())
    assert rms_norm.why_not(x) is None
    rms_norm.rms_norm(x, weight, y, EPS, config=_rows.RowConfig(config.num_warps, config.chunk, rows))
    assert_as_good_as(y, reference.rms_norm(x, weight, EPS), reference.rms_norm(x.double(), weight.double(), EPS))


@pytest.mark.parametrize(("residual", "dtype", "dim"), CASES, ids=str)
@pytest.mark.parametrize("per_batch", [False, True])
def test_layer_norm_modulate(residual: torch.dtype, dtype: torch.dtype, dim: int, per_batch: bool) -> None:
    x = (randn(2, 3, dim) + 3).to(residual)
    shift, scale = modulations(2, 2, dim, per_batch)
    y = poisoned(2, 3, dim, dtype=dtype)
    assert layer_norm_modulate.why_not(x, y) is None
    layer_norm_modulate.layer_norm_modulate(x, shift, scale, y, EPS)
    plain = reference.layer_norm_modulate(x, shift, scale, EPS, dtype)
    assert_as_good_as(y, plain, reference.layer_norm_modulate(*double(x, shift, scale), EPS))


@pytest.mark.parametrize(("residual", "dtype", "dim"), CASES, ids=str)
@pytest.mark.parametrize(("per_batch", "with_gate"), [(False, True), (True, True), (True, False)])
def test_residual_norm_modulate(
    residual: torch.dtype, dtype: torch.dtype, dim: int, per_batch: bool, with_gate: bool
) -> None:
    x, delta = randn(2, 3, dim, dtype=residual), randn(2, 3, dim, dtype=dtype, seed=1)
    shift, scale, gate = modulations(3, 2, dim, per_batch)
    gate = gate if with_gate else None
    x_out, y = poisoned(2, 3, dim, dtype=residual), poisoned(2, 3, dim, dtype=dtype)
    assert residual_norm_modulate.why_not(x, delta) is None
    residual_norm_modulate.residual_norm_modulate(x, delta, gate, shift, scale, x_out, y, EPS)
    plain = reference.residual_norm_modulate(x, delta, shift, scale, EPS, gate)
    exact_x = reference.gated_residual(*double(x, delta, gate))
    assert_as_good_as(x_out, plain[0], exact_x)
    exact_y = reference.layer_norm_modulate(*double(x_out, shift, scale), EPS)
    assert_as_good_as(y, reference.layer_norm_modulate(x_out, shift, scale, EPS, dtype), exact_y)


@pytest.mark.parametrize(("residual", "dtype", "dim"), CASES, ids=str)
@pytest.mark.parametrize(("per_batch", "with_gate", "camera"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_gated_residual_camera_norm(
    residual: torch.dtype, dtype: torch.dtype, dim: int, per_batch: int, with_gate: int, camera: int
) -> None:
    x, delta = randn(2, 3, dim, dtype=residual), randn(2, 3, dim, dtype=dtype, seed=1)
    (gate,) = modulations(1, 2, dim, bool(per_batch))
    cam_scale, cam_shift = (0.3 * randn(2, 2, 3, dim, seed=2)).to(dtype).unbind(0)
    weight, bias = randn(2, dim, seed=4).to(dtype).unbind(0)
    operands = (x, delta, gate if with_gate else None, *((cam_scale, cam_shift) if camera else (None, None)))
    x_out, y = poisoned(2, 3, dim, dtype=residual), poisoned(2, 3, dim, dtype=dtype)
    assert gated_residual_camera_norm.why_not(x, delta) is None
    gated_residual_camera_norm.gated_residual_camera_norm(*operands, weight, bias, x_out, y, EPS)
    plain = reference.gated_residual_camera_norm(*operands, weight, bias, EPS)
    exact = reference.gated_residual_camera_norm(*double(*operands, weight, bias), EPS)
    assert_as_good_as(x_out, plain[0], exact[0])
    norm = (None, None, None, weight, bias)  # of the rounded x_out: a sum with nothing
    zero = torch.zeros_like(delta)
    plain_y = reference.gated_residual_camera_norm(x_out, zero, *norm, EPS)[1]
    exact_y = reference.gated_residual_camera_norm(*double(x_out, zero, *norm), EPS)[1]
    assert_as_good_as(y, plain_y, exact_y)


@pytest.mark.parametrize(("rows", "num_warps"), [(2, 1), (4, 2), (2, 4), (4, 8)])
def test_passes_in_every_program_shape(rows: int, num_warps: int) -> None:
    """Rows a program, and chunks that pass the row's end; all give the bits of one row a program."""
    x, delta = randn(2, 3, 640, dtype=BF16), randn(2, 3, 640, dtype=BF16, seed=1)
    shift, scale, gate = modulations(3, 2, 640, True)
    outputs = []
    for config in (None, _rows.RowConfig(num_warps, 256 * num_warps, rows, streaming=False)):
        x_out, y, z, camera_x, camera_y = (poisoned(2, 3, 640, dtype=BF16) for _ in range(5))
        residual_norm_modulate.residual_norm_modulate(x, delta, gate, shift, scale, x_out, y, EPS, config=config)
        layer_norm_modulate.layer_norm_modulate(x, shift, scale, z, EPS, config=config)
        gated_residual_camera_norm.gated_residual_camera_norm(
            x, delta, gate, delta, x, x[0, 0], x[0, 1], camera_x, camera_y, EPS, config=config
        )
        outputs.append((x_out, y, z, camera_x, camera_y))
    for one, other in zip(*outputs, strict=True):
        assert other.isfinite().all()
        assert (one != other).float().mean() <= 1e-3  # the sums' order differs
    assert same_bits(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize(("residual", "dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 3, 5120), (2, 3, 1536), (3, 1, 200), (2, 5, 640)])
@pytest.mark.parametrize(("per_batch", "with_gate"), [(0, 1), (1, 1), (0, 0)])
def test_gated_residual(
    residual: torch.dtype, dtype: torch.dtype, batch: int, tokens: int, dim: int, per_batch: int, with_gate: int
) -> None:
    x, delta = randn(batch, tokens, dim, dtype=residual), randn(batch, tokens, dim, dtype=dtype, seed=1)
    gate = modulations(2, batch, dim, bool(per_batch))[1] if with_gate else None
    x_out = poisoned(batch, tokens, dim, dtype=residual)
    assert gated_residual.why_not(x, delta) is None
    gated_residual.gated_residual(x, delta, gate, x_out)
    assert_as_good_as(
        x_out, reference.gated_residual(x, delta, gate), reference.gated_residual(*double(x, delta, gate))
    )


def test_other_dtypes_are_named() -> None:
    x = randn(1, 2, 64)
    assert gated_residual.why_not(x, x) is None
    assert "delta is torch.float64" in str(gated_residual.why_not(x, x.double()))
    assert "D is 20000" in str(layer_norm_modulate.why_not(torch.empty(1, 1, 20000), x))
