"""Rows as int8 codes on the CPU: the bits of the float32 reference, and close to the float64 one."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_calls import (
    assert_same_bits,
    gated_residual_camera_norm,
    gated_residual_camera_norm_quantize,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    residual_norm_modulate,
    residual_norm_modulate_quantize,
    rotate_quantize,
    under_every_isa,
)
from torch import Tensor

from lingbot_kernels import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]  # residual, compute
DIMS = [5120, 1536, 200, 128, 127, 1, 20000]  # the last is longer than what a row keeps between its passes
FORMS = [(False, False), (False, True), (True, False), (True, True)]  # signs, rotation


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_signs(dim: int, given: bool) -> Tensor | None:
    if not given:
        return None
    generator = torch.Generator().manual_seed(dim)
    return (2 * torch.randint(0, 2, (-(-dim // 128) * 128,), generator=generator) - 1).to(torch.int8)


def assert_same_rows(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same codes, and the same bits of scales, NaN where the other is."""
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].isnan(), expected[1].isnan())
    assert_same_bits(got[1].nan_to_num(), expected[1].nan_to_num())


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_rotate_quantize_has_the_references_bits(signed: bool, rotate: bool, dim: int, dtype: torch.dtype) -> None:
    x = randn(2, 5, 2 * dim, dtype=dtype)[:, :, dim:]  # rows that lie apart
    signs = random_signs(dim, signed)
    got = rotate_quantize(x, signs, rotate)
    assert_same_rows(got, reference.rotate_quantize(x.float(), signs, rotate))
    exact = reference.rotate_quantize(x.double(), signs, rotate)
    apart = (got[0].int() - exact[0].int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 1e-3 * apart.numel()
    torch.testing.assert_close(got[1], exact[1], rtol=1e-6, atol=0)
    if not rotate:
        assert (got[0][..., dim:] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rotate", [True, False])
def test_rows_without_ordinary_values(rotate: bool, dtype: torch.dtype) -> None:
    x = randn(1, 7, 300, dtype=dtype)
    x[0, 0] = 0
    x[0, 1, 17] = math.nan
    x[0, 2, 299] = -math.inf
    x[0, 3, 5] = 6e4  # one loud element
    x[0, 4] *= 0
    x[0, 4, 0] = torch.finfo(dtype).smallest_normal
    x[0, 5] = x[0, 5].abs().sign()  # a mean: all of a rotated block but one channel is zero
    signs = random_signs(300, True)
    codes, row_scale = got = rotate_quantize(x, signs, rotate)
    assert_same_rows(got, reference.rotate_quantize(x.float(), signs, rotate))
    assert (codes[0, :3] == 0).all() and row_scale[0, 0] == 0 and row_scale[0, 1:3].isnan().all()
    assert codes[0, 3].abs().max() == 127 and row_scale[0, 3:].isfinite().all()


@pytest.mark.parametrize(("residual", "compute"), PAIRS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("signed", "rotate"), FORMS)
def test_norms_quantise_what_they_would_round(
    signed: bool, rotate: bool, dim: int, residual: torch.dtype, compute: torch.dtype
) -> None:
    """The quantising forms are the plain passes with a float32 y, then rotate_quantize: the same bits."""
    x, delta = 3 * randn(2, 3, dim) + 1, randn(2, 3, dim, dtype=compute, seed=1)
    x = x.to(residual)
    gate, shift, scale = (randn(2, dim + 3, seed=seed)[:, :dim] for seed in (2, 3, 4))
    cam_scale, cam_shift = (randn(2, 3, dim, dtype=compute, seed=seed) for seed in (5, 6))
    weight, bias = (randn(dim, dtype=compute, seed=seed) for seed in (7, 8))
    signs = random_signs(dim, signed)

    got = layer_norm_modulate_quantize(x, shift, scale, signs, rotate)
    assert_same_rows(got, rotate_quantize(layer_norm_modulate(x.float(), shift, scale, F32), signs, rotate))

    x_out, *got = residual_norm_modulate_quantize(x, delta, gate, shift, scale, signs, rotate)
    assert_same_bits(x_out, residual_norm_modulate(x, delta, gate, shift, scale)[0])
    y = layer_norm_modulate(x_out.float(), shift, scale, F32)
    assert_same_rows(tuple(got), rotate_quantize(y, signs, rotate))

    for camera in ((cam_scale, cam_shift), (None, None)):
        x_out, *got = gated_residual_camera_norm_quantize(x, delta, gate, *camera, weight, bias, signs, rotate)
        assert_same_bits(x_out, gated_residual_camera_norm(x, delta, gate, *camera, weight, bias)[0])
        nothing = torch.zeros(2, 3, dim)
        wide = (x_out.float(), nothing, None, None, None, weight.float(), bias.float())
        y = gated_residual_camera_norm(*wide)[1]
        assert_same_rows(tuple(got), rotate_quantize(y, signs, rotate))


@pytest.mark.parametrize("shape", [(0, 3, 200), (2, 0, 200)])
def test_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    codes, row_scale = rotate_quantize(torch.zeros(shape), None, True)
    assert codes.shape == (*shape[:2], 256) and row_scale.shape == shape[:2]


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    x, delta = randn(2, 65, 1536), randn(2, 65, 1536, dtype=BF16, seed=1)
    gate, shift, scale = (randn(2, 1536, seed=seed) for seed in (2, 3, 4))
    signs = random_signs(1536, True)

    def run(threads: int) -> Tensor:
        results = [
            *rotate_quantize(delta, signs, True, threads),
            *rotate_quantize(delta, signs, False, threads),
            *residual_norm_modulate_quantize(x, delta, gate, shift, scale, signs, True, threads),
        ]
        return torch.cat([r.float().flatten() for r in results])

    one = run(1)
    assert one.isfinite().all()
    for threads in (2, 3, 0):
        assert_same_bits(run(threads), one)
    for other in under_every_isa(lambda: run(0)):
        assert_same_bits(other, one)


def test_refusals() -> None:
    from lingbot_kernels import _C

    x = randn(1, 2, 128)
    with pytest.raises(RuntimeError, match="rotate_quantize: codes and row_scale must not be null"):
        _C.cpu.rotate_quantize(x.data_ptr(), 256, 128, 0, 0, 0, 1, *x.shape, 0, 0)
