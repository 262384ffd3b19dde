"""The int8 product on the CPU: exact sums, and the epilogue of the float32 formulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_calls import assert_close, assert_same_bits, int8_linear, under_every_isa
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(1, 1, 1), (3, 7, 5), (4, 64, 64), (33, 130, 70), (5, 5120, 17), (70, 200, 129), (2, 0, 3)]


def operands(rows: int, inputs: int, outputs: int, bias: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    def scales(count: int) -> Tensor:
        return 1e-4 + torch.rand(count, generator=generator) / 100

    shift = None if bias is None else torch.randn(outputs, generator=generator).to(bias)
    return codes(rows, inputs), scales(rows), codes(outputs, inputs), scales(outputs), shift


def product(x: Tensor, w: Tensor) -> Tensor:
    """Exact: a float64 holds every partial sum."""
    return x.double() @ w.double().T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [None, F32, F16, BF16])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_sums_are_exact_and_rounded_as_written(
    dtype: torch.dtype, bias: torch.dtype | None, shape: tuple[int, int, int]
) -> None:
    x, x_scale, w, w_scale, shift = operands(*shape, bias)
    plain = product(x, w).float() * (x_scale[:, None] * w_scale)
    if shift is not None:
        plain = plain + shift.float()
    assert_same_bits(int8_linear(x, x_scale, w, w_scale, shift, False, dtype), plain.to(dtype))


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_fit(code: int) -> None:
    inputs = 2**17 - 1
    x, w = (torch.full((rows, inputs), code, dtype=torch.int8) for rows in (2, 3))
    one = torch.ones(3)
    got = int8_linear(x, one[:2], w, one, None, False, F32)
    assert (got == torch.tensor(float(code * code * inputs), dtype=F32)).all()
    got = int8_linear(x, one[:2], -127 - 0 * w, one, None, False, F32)
    assert (got == torch.tensor(float(code * -127 * inputs), dtype=F32)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_gelu(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, x_scale, w, w_scale, shift = operands(*shape, F32)
    before = product(x, w) * (x_scale.double()[:, None] * w_scale.double()) + shift.double()
    exact = F.gelu(before, approximate="tanh")
    got = int8_linear(x, x_scale, w, w_scale, shift, True, dtype)
    if dtype == F32:
        assert_close(got, exact, 3e-6)
        return
    plain = F.gelu(before.float(), approximate="tanh").to(dtype)
    assert (got.double() - exact).norm() <= 1.25 * (plain.double() - exact).norm() + 1e-300


def test_gelu_over_its_range() -> None:
    values = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -1e4, 1e4, 1e20, -1e20, 1e-20, -1e-30])])
    zero = torch.zeros(1, 1, dtype=torch.int8)
    got = int8_linear(zero, torch.ones(1), zero.expand(len(values), 1), torch.ones(len(values)), values, True, F32)[0]
    exact = F.gelu(values.double(), approximate="tanh")
    assert ((got.double() - exact).abs() <= 2e-6 * exact.abs() + 1e-12).all()


def test_a_nan_scale_reaches_its_row_alone() -> None:
    x, x_scale, w, w_scale, _ = operands(6, 256, 20)
    x[2], x_scale[2] = 0, float("nan")
    x[4], x_scale[4] = 0, 0.0
    for gelu in (False, True):
        got = int8_linear(x, x_scale, w, w_scale, None, gelu, BF16)
        assert got[2].isnan().all() and (got[4] == 0).all() and got[[0, 1, 3, 5]].isfinite().all()


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    x, x_scale, w, w_scale, bias = operands(130, 1000, 300, BF16)
    for gelu in (False, True):
        one = int8_linear(x, x_scale, w, w_scale, bias, gelu, F32, 1)
        for threads in (2, 3, 0):
            assert_same_bits(int8_linear(x, x_scale, w, w_scale, bias, gelu, F32, threads), one)
        for other in under_every_isa(lambda g=gelu: int8_linear(x, x_scale, w, w_scale, bias, g, F32)):
            assert_same_bits(other, one)


def test_refusals() -> None:
    from lingbot_kernels import _C

    x = torch.zeros(1, 2**17, dtype=torch.int8)
    one = torch.ones(1)
    address, scale = x.data_ptr(), one.data_ptr()
    with pytest.raises(RuntimeError, match="int8_linear: inputs must be in"):
        _C.cpu.int8_linear(address, scale, address, scale, 0, scale, 1, 2**17, 1, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="int8_linear: x and w must not be null"):
        _C.cpu.int8_linear(0, scale, address, scale, 0, scale, 1, 128, 1, 0, 0, 0, 0)
