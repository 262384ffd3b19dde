"""int8_linear: exact sums on every backend, the epilogue against float64, refusals, registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lingbot_kernels import ops, reference
from ops.op_case import BACKENDS, DTYPES, Arguments, Errors, assert_refused, check_registration

SHAPES = [(1, 1, 1, 1), (2, 5, 7, 48), (1, 33, 70, 200), (3, 4, 65, 1020)]  # batch, tokens, N, K


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, bias: bool = True) -> Arguments:
    batch, tokens, columns, depth = shape
    generator = torch.Generator().manual_seed(depth)
    x = torch.randint(-128, 128, (batch, tokens, depth), generator=generator).to(torch.int8)
    w = torch.randint(-128, 128, (columns, depth), generator=generator).to(torch.int8)
    return {
        "x": x, "x_scale": torch.rand(batch, tokens, generator=generator) / depth, "w": w,
        "w_scale": torch.rand(columns, generator=generator) / 50,
        "bias": torch.randn(columns, generator=generator).to(dtype) if bias else None,
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("saturating", [False, True])
def test_sums_are_those_of_integers(shape: tuple[int, int, int, int], backend: str, saturating: bool) -> None:
    given = arguments(shape, bias=False)
    if saturating:
        given["x"], given["w"] = torch.full_like(given["x"], -128), torch.full_like(given["w"], -128)
        given["w"][::2] = 127
    given |= {"x_scale": torch.ones_like(given["x_scale"]), "w_scale": torch.ones_like(given["w_scale"])}
    got = ops.int8_linear(**given, out_dtype=torch.float32, backend=backend)
    exact = torch.einsum("bsk,nk->bsn", given["x"].long(), given["w"].long())
    assert exact.abs().max() < 2**24  # what a float32 holds
    assert torch.equal(got.long(), exact)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_error_rule(shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, activation: str | None) -> None:
    given = {**arguments(shape, dtype, bias), "activation": activation}
    got, again = (ops.int8_linear(**given, out_dtype=dtype, backend="cpu") for _ in range(2))
    plain = ops.int8_linear(**given, out_dtype=dtype, backend="reference")
    exact = reference.int8_linear(**given, out_dtype=torch.float64)
    assert got.dtype == plain.dtype == dtype and torch.equal(got, again)
    error, allowed = (got.double() - exact).norm(), (plain.double() - exact).norm()
    assert error <= 1.25 * allowed + 1e-7 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_lie_apart_and_none_at_all(backend: str) -> None:
    given = arguments((2, 5, 7, 48))
    want = ops.int8_linear(**given, backend=backend)
    apart = torch.full((2, 10, 51), 99, dtype=torch.int8)
    apart[:, ::2, 3:] = given["x"]
    assert torch.equal(ops.int8_linear(**{**given, "x": apart[:, ::2, 3:]}, backend=backend), want)
    assert ops.int8_linear(**arguments((2, 0, 7, 48)), backend=backend).shape == (2, 0, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_scale_stays_visible(backend: str) -> None:
    given = arguments((2, 5, 7, 48))
    given["x"][0, 1], given["x_scale"][0, 1] = 0, float("nan")
    got = ops.int8_linear(**given, activation="gelu_tanh", backend=backend)
    assert got[0, 1].isnan().all() and int(got.isnan().sum()) == 7


def test_a_float64_result_has_a_float64_epilogue() -> None:
    given = arguments((1, 4, 9, 48), torch.float64)
    got = ops.int8_linear(**given, activation="gelu_tanh", out_dtype=torch.float64)
    assert torch.equal(got, reference.int8_linear(**given, activation="gelu_tanh", out_dtype=torch.float64))


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]] = {
    "x dtype": (lambda a: {"x": a["x"].int()}, TypeError, r"x: got torch.int32 .*must be int8 \[B, S, K\]"),
    "x dims": (lambda a: {"x": a["x"][0]}, TypeError, r"x: got .*must be int8 \[B, S, K\]"),
    "w depth": (lambda a: {"w": a["w"][:, 1:].contiguous()}, ValueError, r"w: got shape \[7, 47\], must be \[N, 48\]"),
    "w dtype": (lambda a: {"w": a["w"].short()}, TypeError, "w: got torch.int16"),
    "w rows": (lambda a: {"w": a["w"][::2]}, ValueError, "w: got strides"),
    "x_scale shape": (lambda a: {"x_scale": a["x_scale"][:, 1:]}, ValueError, r"x_scale: got shape \[2, 4\], must be"),
    "x_scale dtype": (lambda a: {"x_scale": a["x_scale"].double()}, TypeError, "x_scale: got torch.float64"),
    "w_scale shape": (lambda a: {"w_scale": a["w_scale"][1:]}, ValueError, r"w_scale: got shape \[6\], must be \[7\]"),
    "w_scale dtype": (lambda a: {"w_scale": a["w_scale"].bfloat16()}, TypeError, "w_scale: got torch.bfloat16"),
    "bias shape": (lambda a: {"bias": a["bias"][1:]}, ValueError, r"bias: got shape \[6\], must be \[7\]"),
    "bias dtype": (lambda a: {"bias": a["bias"].int()}, TypeError, "bias: got torch.int32"),
    "activation": (lambda a: {"activation": "relu"}, ValueError, "activation: got 'relu', must be None or 'gelu_tanh'"),
    "out_dtype": (lambda a: {"out_dtype": torch.int32}, (TypeError, ops.BackendUnavailable), "int32"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments((2, 5, 7, 48))
    assert_refused(ops.int8_linear, given, change(given), error, message)


def test_more_channels_than_an_int32_sum_holds() -> None:
    scale = torch.ones(1)
    x, w = torch.zeros(1, 1, 131072, dtype=torch.int8), torch.zeros(1, 131072, dtype=torch.int8)
    with pytest.raises(ValueError, match="x: got 131072 channels, must be from 1 to 131071"):
        ops.int8_linear(x, scale[None], w, scale, None)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a: Any = arguments((2, 5, 7, 48), torch.bfloat16)
    call = (a["x"], a["x_scale"], a["w"], a["w_scale"])
    samples = [(*call, a["bias"], "gelu_tanh", torch.bfloat16, b) for b in BACKENDS]
    check_registration("int8_linear", [*samples, (*call, None, None, torch.float32, "cpu")])
