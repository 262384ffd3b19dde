"""Checks of the int8 product and of the quantising passes against the reference.

Not collected by itself: test_kernels.py runs it under the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from checks import DEVICE, DTYPES, EPS, INTERPRETED, assert_as_good_as, poisoned, randn, same_bits
from kernels_passes import DTYPE_PAIRS, double, modulations

from lingbot_kernels import reference
from lingbot_kernels.reference.rotate_quantize import padded_width
from lingbot_kernels.triton import (
    _rows,
    gated_residual_camera_norm_quantize,
    int8_linear,
    layer_norm_modulate_quantize,
    residual_norm_modulate_quantize,
    rotate_quantize,
)

BF16 = torch.bfloat16
# (dtype, dim, signs, rotate): every dtype on a row with a masked tail, the models' widths in bf16.
ROWS = [(dtype, 200, signs, rotate) for dtype in DTYPES for signs, rotate in ((1, 1), (0, 1), (1, 0))]
ROWS += [(BF16, 5120, 1, 1), (BF16, 5120, 0, 0), (BF16, 1536, 1, 1), (torch.float32, 1536, 1, 1), (BF16, 640, 0, 1)]


def random_signs(dim: int, wanted: bool = True) -> torch.Tensor | None:
    """+-1 for every channel and the padding, or None."""
    if not wanted:
        return None
    return (2 * torch.randint(0, 2, (padded_width(dim),), generator=torch.Generator().manual_seed(9)) - 1).to(
        DEVICE, torch.int8
    )


def row_outputs(batch: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) that nothing has been written to: -128 is no code."""
    codes = torch.full((batch, tokens, padded_width(dim)), -128, dtype=torch.int8, device=DEVICE)
    return codes, poisoned(batch, tokens, dtype=torch.float32)


def assert_codes(
    got: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor], share: float = 1e-3
) -> None:
    """Codes are those of the float64 reference but for single steps in a share of them; scales agree."""
    apart = (got[0].int() - exact[0].int()).abs()
    assert apart.max() <= 1, f"{int((apart > 1).sum())} codes are more than a step off"
    assert apart.float().mean() <= share
    torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "dim", "with_signs", "rotate"), ROWS, ids=str)
def test_rotate_quantize_has_the_bits_of_the_reference(
    dtype: torch.dtype, dim: int, with_signs: int, rotate: int
) -> None:
    x = randn(2, 3, 3, dim, dtype=dtype)[:, :, 1]
    x[0, 1], x[0, 2, 7], x[1, 0, 3], x[1, 2, 9] = 0, float("nan"), float("inf"), 100.0
    signs = random_signs(dim, bool(with_signs))
    codes, scale = row_outputs(2, 3, dim)
    assert rotate_quantize.why_not(x) is None
    rotate_quantize.rotate_quantize(x, signs, bool(rotate), codes, scale)
    want = reference.rotate_quantize(x, signs, bool(rotate))
    assert torch.equal(codes, want[0])
    torch.testing.assert_close(scale, want[1], rtol=0, atol=0, equal_nan=True)
    assert scale[0, 2].isnan() and scale[1, 0].isnan() and scale[0, 1] == 0 and int(scale.isnan().sum()) == 2


# (residual, dtype, dim, per_batch, rotate): every dtype pair on a row with a masked tail.
NORMS = [(*pair, 200, i % 2, 1) for i, pair in enumerate(DTYPE_PAIRS)] + [
    (BF16, BF16, 200, 1, 0),
    (BF16, BF16, 640, 1, 1),
]


@pytest.mark.parametrize(("residual", "dtype", "dim", "per_batch", "rotate"), NORMS, ids=str)
def test_norm_passes(residual: torch.dtype, dtype: torch.dtype, dim: int, per_batch: int, rotate: int) -> None:
    x, delta = randn(2, 2, dim, dtype=residual), randn(2, 2, dim, dtype=dtype, seed=1)
    shift, scale, gate = modulations(3, 2, dim, bool(per_batch))
    signs = random_signs(dim)
    codes = row_outputs(2, 2, dim)
    assert layer_norm_modulate_quantize.why_not(x) is None
    layer_norm_modulate_quantize.layer_norm_modulate_quantize(x, shift, scale, signs, bool(rotate), *codes, EPS)
    assert_codes(codes, reference.layer_norm_modulate_quantize(*double(x, shift, scale), EPS, signs, bool(rotate)))

    x_out, codes = poisoned(2, 2, dim, dtype=residual), row_outputs(2, 2, dim)
    assert residual_norm_modulate_quantize.why_not(x, delta) is None
    residual_norm_modulate_quantize.residual_norm_modulate_quantize(
        x, delta, gate, shift, scale, signs, bool(rotate), x_out, *codes, EPS
    )
    assert_as_good_as(
        x_out, reference.gated_residual(x, delta, gate), reference.gated_residual(*double(x, delta, gate))
    )
    assert_codes(codes, reference.layer_norm_modulate_quantize(*double(x_out, shift, scale), EPS, signs, bool(rotate)))

    cam_scale, cam_shift = (0.3 * randn(2, 2, 2, dim, seed=2)).to(dtype).unbind(0)
    weight, bias = randn(2, dim, seed=4).to(dtype).unbind(0)
    assert gated_residual_camera_norm_quantize.why_not(x, delta) is None
    for camera in ((cam_scale, cam_shift), (None, None)):
        x_out, codes = poisoned(2, 2, dim, dtype=residual), row_outputs(2, 2, dim)
        gated_residual_camera_norm_quantize.gated_residual_camera_norm_quantize(
            x, delta, gate, *camera, weight, bias, signs, bool(rotate), x_out, *codes, EPS
        )
        plain = reference.gated_residual_camera_norm(x, delta, gate, *camera, weight, bias, EPS)[0]
        exact = reference.gated_residual_camera_norm(*double(x, delta, gate, *camera, weight, bias), EPS)[0]
        assert_as_good_as(x_out, plain, exact)
        zero = torch.zeros_like(delta)
        after = double(x_out, zero, None, None, None, weight, bias)
        assert_codes(codes, reference.gated_residual_camera_norm_quantize(*after, EPS, signs, bool(rotate))[1:])


@pytest.mark.parametrize(("rows", "num_warps"), [(2, 1), (4, 2), (3, 8)])
def test_quantising_in_every_program_shape(rows: int, num_warps: int) -> None:
    """Rows a program, and chunks that pass the row's end: the same bits, the rotation does not see them."""
    x = randn(1, 5, 640, dtype=BF16)
    one, other = row_outputs(1, 5, 640), row_outputs(1, 5, 640)
    rotate_quantize.rotate_quantize(x, random_signs(640), True, *one)
    config = _rows.RowConfig(num_warps, 256 * num_warps, rows, streaming=False)
    rotate_quantize.rotate_quantize(x, random_signs(640), True, *other, config=config)
    assert torch.equal(one[0], other[0]) and same_bits(one[1], other[1])


def product_case(
    batch: int, tokens: int, columns: int, depth: int, dtype: torch.dtype, saturating: bool
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-128, 128, (batch, tokens, depth), generator=generator).to(torch.int8)
    w = torch.randint(-128, 128, (columns, depth), generator=generator).to(torch.int8)
    if saturating:
        x[:, ::2], w[::3] = -128, -128
    x_scale = torch.rand(batch, tokens, generator=generator) / depth
    w_scale = torch.rand(columns, generator=generator)
    bias = torch.randn(columns, generator=generator).to(dtype)
    return tuple(t.to(DEVICE) for t in (x, x_scale, w, w_scale, bias))


CONFIGS = [
    int8_linear.LinearConfig(64, 128, 128, 4, 3),
    int8_linear.LinearConfig(64, 64, 64, 4, 2, group_m=2),
    int8_linear.LinearConfig(32, 64, 64, 4, 2, tma=False),
]


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "columns", "depth"), [(1, 150, 200, 384), (2, 33, 72, 128), (1, 1, 8, 16)])
@pytest.mark.parametrize("saturating", [False, True])
def test_sums_are_exact(
    config: int8_linear.LinearConfig | None, batch: int, tokens: int, columns: int, depth: int, saturating: bool
) -> None:
    """A sum below 2**24 is a float32: with scales of one the result is the integer itself."""
    x, _, w, _, _ = product_case(batch, tokens, columns, depth, BF16, saturating)
    y = poisoned(batch, tokens, columns, dtype=torch.float32)
    ones = torch.ones(batch, tokens, device=DEVICE), torch.ones(columns, device=DEVICE)
    int8_linear.int8_linear(x, ones[0], w, ones[1], None, None, y, config=config)
    assert torch.equal(y.long(), torch.einsum("bsk,nk->bsn", x.long().cpu(), w.long().cpu()).to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_epilogue(dtype: torch.dtype, activation: str | None, with_bias: bool) -> None:
    x, x_scale, w, w_scale, bias = product_case(2, 40, 136, 300, dtype, False)
    operands = (x, x_scale, w, w_scale, bias if with_bias else None, activation)
    y = poisoned(2, 40, 136, dtype=dtype)
    assert int8_linear.why_not(x, w, dtype) is None
    int8_linear.int8_linear(*operands, y, config=CONFIGS[2])
    plain = reference.int8_linear(*operands, out_dtype=dtype)
    assert_as_good_as(y, plain, reference.int8_linear(*operands, out_dtype=torch.float64))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_may_lie_apart(config: int8_linear.LinearConfig) -> None:
    """Batches and rows with strides of their own, starts and strides that TMA can't read included."""
    x, x_scale, w, w_scale, bias = product_case(2, 20, 48, 96, torch.float32, False)
    want = reference.int8_linear(x, x_scale, w, w_scale, bias, out_dtype=torch.float32)
    for offset, width in ((0, 128), (1, 101)):
        apart = torch.full((2, 40, width), 77, dtype=torch.int8, device=DEVICE)
        apart[:, ::2, offset : offset + 96] = x
        y = poisoned(2, 20, 48, dtype=torch.float32)
        int8_linear.int8_linear(apart[:, ::2, offset : offset + 96], x_scale, w, w_scale, bias, None, y, config=config)
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


def test_a_row_with_a_nan_scale_stays_visible() -> None:
    x, x_scale, w, w_scale, bias = product_case(1, 20, 48, 96, torch.float32, False)
    x[0, 3], x_scale[0, 3] = 0, float("nan")
    y = poisoned(1, 20, 48, dtype=torch.float32)
    int8_linear.int8_linear(x, x_scale, w, w_scale, bias, "gelu_tanh", y, config=CONFIGS[0])
    assert y[0, 3].isnan().all() and int(y.isnan().sum()) == 48


def test_what_cannot_be_served_is_named() -> None:
    x = torch.zeros(1, 1, 16, dtype=torch.int8)
    assert "out_dtype is torch.float64" in str(int8_linear.why_not(x, x[0], torch.float64))
    assert "D is 16400" in str(rotate_quantize.why_not(torch.empty(1, 1, 16400)))
    assert "x is torch.float64" in str(rotate_quantize.why_not(torch.empty(1, 1, 16, dtype=torch.float64)))
