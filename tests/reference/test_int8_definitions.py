"""The rotation, the codes and the int8 product, against their definitions written another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lingbot_kernels import reference
from lingbot_kernels.reference.rotate_quantize import hadamard_blocks, quantize_rows

EPS = 1e-6


def sylvester(order: int) -> torch.Tensor:
    """H of the given order in float64: H[i, j] = -1 to the number of bits that i and j share."""
    shared = torch.tensor([[(i & j).bit_count() for j in range(order)] for i in range(order)])
    return 1.0 - 2.0 * (shared % 2)


def test_rotation_is_the_hadamard_matrix_of_every_block() -> None:
    x = torch.randn(3, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = sylvester(128).double() / 128**0.5
    want = torch.cat([block @ matrix for block in x.split(128, dim=1)], dim=1)
    torch.testing.assert_close(hadamard_blocks(x), want)
    torch.testing.assert_close(hadamard_blocks(hadamard_blocks(x)), x)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("with_signs", [True, False])
@pytest.mark.parametrize("width", [1, 40, 128, 200])
def test_codes_are_within_half_a_step_of_the_rotated_row(width: int, with_signs: bool, rotate: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=generator)
    padded = -(-width // 128) * 128
    signs = (2 * torch.randint(0, 2, (padded,), generator=generator) - 1).to(torch.int8) if with_signs else None
    codes, scale = reference.rotate_quantize(x, signs, rotate)
    assert (codes.dtype, codes.shape) == (torch.int8, (2, 3, padded))
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 3))
    row = F.pad(x, (0, padded - width)) * (1 if signs is None else signs)
    if rotate:
        row = torch.cat([b @ sylvester(128).double() for b in row.split(128, dim=-1)], dim=-1) / 128**0.5
    torch.testing.assert_close(scale, (row.abs().amax(-1) / 127).float())
    assert codes.abs().amax(-1).eq(127).all()
    assert (codes - row / scale.double().unsqueeze(-1)).abs().max() <= 0.5 + 1e-4
    if not rotate:
        assert not codes[..., width:].any()


def test_every_operation_is_rounded_for_itself() -> None:
    x = torch.randn(1, 400, 128, generator=torch.Generator().manual_seed(6))
    codes, scale = reference.rotate_quantize(x, None, rotate=False)
    amax = x.abs().amax(-1).double()
    inverse = (127 / amax).float()  # a quotient of float32 values, rounded by way of float64, is rounded correctly
    assert torch.equal(scale, (amax / 127).float())
    assert torch.equal(codes, (x.double() * inverse.double().unsqueeze(-1)).float().round().to(torch.int8))


def test_ties_go_to_even_codes() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.5, -126.5]).view(1, 1, -1)
    codes, scale = reference.rotate_quantize(x, None, rotate=False)
    assert codes[0, 0, :6].tolist() == [127, 0, 2, -2, 4, -126]
    assert scale.item() == 1.0


@pytest.mark.parametrize("rotate", [True, False])
def test_zero_tiny_and_unusable_rows(rotate: bool) -> None:
    x = torch.randn(1, 6, 200, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    x[0, 1, 7], x[0, 2, 7], x[0, 3, 7] = float("nan"), float("inf"), -float("inf")
    x[0, 4] *= 2.0**-125
    codes, scale = reference.rotate_quantize(x, None, rotate)
    assert not codes[0, :5].any() and codes[0, 5].any()
    assert scale[0, 0] == 0 and scale[0, 4] == 0 and scale[0, 1:4].isnan().all() and scale[0, 5] > 0
    w, w_scale = torch.ones(3, 256, dtype=torch.int8), torch.ones(3)
    y = reference.int8_linear(codes, scale, w, w_scale, None, out_dtype=torch.float32)
    assert y[0, 1:4].isnan().all() and not y[0, 0].any() and y[0, 5].isfinite().all()


def test_codes_in_float32_are_those_of_float64_but_for_rare_single_steps() -> None:
    x = torch.randn(1, 200, 1536, generator=torch.Generator().manual_seed(2))
    codes, _ = reference.rotate_quantize(x)
    exact, _ = reference.rotate_quantize(x.double())
    apart = (codes.int() - exact.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 1e-3


def test_passes_quantise_the_row_before_it_is_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    x, delta, cam_scale, cam_shift = torch.randn(4, 2, 5, 200, generator=generator).bfloat16()
    shift, scale, gate = torch.randn(3, 2, 200, generator=generator)
    weight, bias = torch.randn(2, 200, generator=generator).bfloat16()
    signs = (2 * torch.randint(0, 2, (256,), generator=generator) - 1).to(torch.int8)

    codes, row_scale = reference.layer_norm_modulate_quantize(x, shift, scale, EPS, signs, True)
    y = F.layer_norm(x.float(), (200,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    want, want_scale = quantize_rows(y, signs, True)
    torch.testing.assert_close(row_scale, want_scale)
    assert (codes != want).float().mean() <= 1e-3

    x_out, codes, row_scale = reference.residual_norm_modulate_quantize(x, delta, shift, scale, EPS, gate, signs, True)
    assert torch.equal(x_out, reference.gated_residual(x, delta, gate))
    after = reference.layer_norm_modulate_quantize(x_out, shift, scale, EPS, signs, True)
    assert torch.equal(codes, after[0]) and torch.equal(row_scale, after[1])

    camera = (x, delta, gate, cam_scale, cam_shift, weight, bias, EPS)
    x_out, codes, row_scale = reference.gated_residual_camera_norm_quantize(*camera, signs, True)
    assert torch.equal(x_out, reference.gated_residual_camera_norm(*camera)[0])
    y = F.layer_norm(x_out.float(), (200,), weight.float(), bias.float(), eps=EPS)
    want, want_scale = quantize_rows(y, signs, True)
    torch.testing.assert_close(row_scale, want_scale)
    assert (codes != want).float().mean() <= 1e-3


@pytest.mark.parametrize("saturating", [False, True])
def test_int8_linear_is_exact_up_to_one_rounding(saturating: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (2, 3, 517), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (7, 517), dtype=torch.int8, generator=generator)
    if saturating:
        x, w = torch.full_like(x, -128), torch.full_like(w, 127)
    sums = (x.long().unsqueeze(-2) * w.long()).sum(-1)
    one = torch.ones(2, 3), torch.ones(7)
    assert torch.equal(reference.int8_linear(x, one[0], w, one[1], None, out_dtype=torch.float64), sums.double())
    x_scale, w_scale = torch.rand(2, 3, generator=generator), torch.rand(7, generator=generator)
    bias = torch.randn(7, generator=generator).bfloat16()
    exact = sums * x_scale.double().unsqueeze(-1) * w_scale.double() + bias.double()
    got = reference.int8_linear(x, x_scale, w, w_scale, bias)
    assert got.dtype == torch.bfloat16
    assert ((got - exact).abs() <= 1.001 * 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    exact = F.gelu(1e-3 * sums * x_scale.double().unsqueeze(-1) * w_scale.double() + bias, approximate="tanh")
    got = reference.int8_linear(x, 1e-3 * x_scale, w, w_scale, bias, "gelu_tanh", torch.float32)
    torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)


def test_int8_linear_refuses_another_activation() -> None:
    x, one = torch.ones(1, 1, 8, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="activation: got 'relu', must be one of"):
        reference.int8_linear(x, one, x[0], one[0], None, "relu")
