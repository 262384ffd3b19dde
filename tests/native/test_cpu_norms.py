"""Norms, modulation and gated residuals on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_calls import (
    EPS,
    assert_as_good,
    assert_close,
    assert_same_bits,
    gated_residual,
    gated_residual_camera_norm,
    layer_norm64,
    layer_norm_modulate,
    per_batch,
    residual_norm_modulate,
    rms_norm,
    under_every_isa,
)
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]  # residual, compute
DIMS = [5120, 1536, 8192, 1, 15, 17, 63, 100]
SIZES = [(1, 1), (2, 5)]


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def vector(kind: str, batch: int, dim: int, seed: int) -> Tensor | None:
    """A modulation vector: absent, one for the batch, or one each with rows that lie apart."""
    if kind == "none":
        return None
    if kind == "shared":
        return randn(dim, seed=seed)
    return randn(batch, dim + 3, seed=seed)[:, :dim]


def check(actual: Tensor, plain: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    if actual.dtype == F32:
        assert_close(actual, expected, tolerance)
    else:
        assert_as_good(actual, plain, expected)


def modulated(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The plain formulation and the float64 one."""
    scale64, shift64 = per_batch(scale, 0.0), per_batch(shift, 0.0)
    plain = F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale64.float()) + shift64.float()
    return plain.to(dtype), layer_norm64(x) * (1 + scale64) + shift64


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_rms_norm(batch: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    x = randn(batch, tokens, 2 * dim, dtype=dtype)[:, :, dim:]  # rows that lie apart
    weight = 1 + randn(dim, dtype=dtype, seed=1) / 4
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    x32 = x.float()
    plain = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(dtype) * weight
    check(rms_norm(x, weight), plain, expected, 1e-6)


def test_rms_norm_rounds_twice() -> None:
    x = randn(1, 64, 512, dtype=BF16)
    weight = randn(512, dtype=BF16, seed=3)
    x64 = x.double()
    once = (x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt()).to(BF16)
    twice = once * weight
    mismatch = (rms_norm(x, weight) != twice).double().mean()
    assert mismatch < 1e-3  # a tie that float32 sums decide otherwise; rounding once differs in some 20%


@pytest.mark.parametrize(("residual", "compute"), PAIRS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_layer_norm_modulate(
    kind: str, batch: int, tokens: int, dim: int, residual: torch.dtype, compute: torch.dtype
) -> None:
    x = (randn(batch, tokens, dim) * 3 + 1).to(residual)
    shift, scale = vector(kind, batch, dim, 1), vector(kind, batch, dim, 2)
    y = layer_norm_modulate(x, shift, scale, compute)
    if dim == 1 and kind == "none":
        assert (y == 0).all()
        return
    check(y, *modulated(x, scale, shift, compute))


@pytest.mark.parametrize(("residual", "compute"), PAIRS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_residual_norm_modulate(
    kind: str, batch: int, tokens: int, dim: int, residual: torch.dtype, compute: torch.dtype
) -> None:
    x, delta = randn(batch, tokens, dim, dtype=residual), randn(batch, tokens, dim, dtype=compute, seed=9)
    gate, shift, scale = (vector(kind, batch, dim, seed) for seed in (1, 2, 3))
    x_out, y = residual_norm_modulate(x, delta, gate, shift, scale)
    gate64 = per_batch(gate, 1.0)
    expected = x.double() + delta.double() * gate64
    check(x_out, (x.float() + delta.float() * gate64.float()).to(residual), expected, 3e-7)
    assert_same_bits(x_out, gated_residual(x, delta, gate))
    # The norm is of the rounded sum: the same bits as the two ops one after the other.
    assert_same_bits(y, layer_norm_modulate(x_out, shift, scale, compute))


@pytest.mark.parametrize(("residual", "compute"), PAIRS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("kind", ["none", "each"])
def test_gated_residual_camera_norm(
    kind: str, camera: bool, batch: int, tokens: int, dim: int, residual: torch.dtype, compute: torch.dtype
) -> None:
    x, delta = randn(batch, tokens, dim, dtype=residual), randn(batch, tokens, dim, dtype=compute, seed=9)
    gate = vector(kind, batch, dim, 1)
    cam = [randn(batch, tokens, dim, dtype=compute, seed=seed) if camera else None for seed in (20, 30)]
    weight, bias = randn(dim, dtype=compute, seed=5), randn(dim, dtype=compute, seed=6)
    x_out, y = gated_residual_camera_norm(x, delta, gate, *cam, weight, bias)
    gate64 = per_batch(gate, 1.0)
    expected = x.double() + delta.double() * gate64
    plain = x.float() + delta.float() * gate64.float()
    if camera:
        expected = (1 + cam[0].double()) * expected + cam[1].double()
        plain = (1 + cam[0].float()) * plain + cam[1].float()
    else:
        assert_same_bits(x_out, gated_residual(x, delta, gate))
    check(x_out, plain.to(residual), expected, 6e-7)
    plain_y = F.layer_norm(x_out.float(), (dim,), weight.float(), bias.float(), EPS).to(compute)
    if dim > 1:
        check(y, plain_y, layer_norm64(x_out) * weight.double() + bias.double(), 3e-6)
    else:
        assert_same_bits(y, bias.expand_as(y))


@pytest.mark.parametrize(("residual", "compute"), PAIRS)
def test_in_place_residual(residual: torch.dtype, compute: torch.dtype) -> None:
    from lingbot_kernels import _C

    x, delta = randn(1, 3, 77, dtype=residual), randn(1, 3, 77, dtype=compute, seed=2)
    expected = gated_residual(x, delta, None)
    codes = {F32: 0, F16: 1, BF16: 2}
    pointers = (x.data_ptr(), delta.data_ptr(), 0, 0, x.data_ptr())
    _C.cpu.gated_residual(*pointers, *x.shape, codes[residual], codes[compute], 0)
    assert_same_bits(x, expected)


def test_a_large_mean_does_not_cost_the_variance() -> None:
    x = randn(1, 3, 5120) + 1000
    y = layer_norm_modulate(x, None, None, F32)
    assert_close(y, layer_norm64(x), 2e-4)  # x itself is rounded at 3e-5; a one-pass variance is off by 1e-1


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    x, delta = randn(2, 65, 5120), randn(2, 65, 5120, dtype=BF16, seed=1)
    gate, shift, scale = (randn(2, 5120, seed=seed) for seed in (2, 3, 4))
    cam = [randn(2, 65, 5120, dtype=BF16, seed=seed) for seed in (5, 6)]
    weight, bias = (randn(5120, dtype=BF16, seed=seed) for seed in (7, 8))

    def run(threads: int) -> Tensor:
        results = [
            rms_norm(delta, weight, threads),
            layer_norm_modulate(x, shift, scale, BF16, threads),
            *residual_norm_modulate(x, delta, gate, shift, scale, threads),
            *gated_residual_camera_norm(x, delta, gate, *cam, weight, bias, threads),
            gated_residual(x, delta, gate, threads),
        ]
        return torch.cat([r.float().flatten() for r in results])

    one = run(1)
    assert one.isfinite().all()
    for threads in (2, 3, 0):
        assert_same_bits(run(threads), one)
    for other in under_every_isa(lambda: run(0)):
        assert_same_bits(other, one)
