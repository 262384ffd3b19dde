"""attention_output_push: a pure copy to each rank's rows, to the bit; refusals, registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops
from ops.op_case import BACKENDS, DTYPES, check_registration

Arguments = dict[str, Any]


def make(dtype: torch.dtype = torch.float32, splits: tuple[int, ...] = (5, 4, 2), batch: int = 2) -> Arguments:
    """Rank 1's heads, 6 of 18 channels; the rows of uneven ranks are cut from buffers of the longest."""
    torch.manual_seed(0)
    attended = torch.randn(batch, sum(splits), 6).to(dtype)
    buffers = [torch.full((batch, max(splits), 6 * len(splits)), float("nan"), dtype=dtype) for _ in splits]
    outs = [buffer[:, :tokens] for buffer, tokens in zip(buffers, splits, strict=True)]
    return {"attended": attended, "outs": outs, "column": 6 * (len(splits) > 1)}


@pytest.mark.parametrize("splits", [(3,), (4, 4), (5, 4, 2), (3, 0, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_rank_gets_its_tokens(backend: str, dtype: torch.dtype, batch: int, splits: tuple[int, ...]) -> None:
    arguments = make(dtype, splits, batch)
    ops.attention_output_push(**arguments, backend=backend)
    column = arguments["column"]
    for out, piece in zip(arguments["outs"], arguments["attended"].split(splits, dim=1), strict=True):
        assert same_bits(out[:, :, column : column + 6].contiguous(), piece.contiguous())
        assert out[:, :, :column].isnan().all() and out[:, :, column + 6 :].isnan().all()


def test_a_strided_input() -> None:
    arguments = make()
    wide = torch.randn(2, 11, 15)[:, :, 3:9]
    wide.copy_(arguments["attended"])
    expected = make()
    ops.attention_output_push(**expected, backend="cpu")
    ops.attention_output_push(**{**arguments, "attended": wide}, backend="cpu")
    for got, want in zip(arguments["outs"], expected["outs"], strict=True):
        assert same_bits(got.contiguous(), want.contiguous())


def _other(outs: list[Tensor], index: int, out: Tensor) -> list[Tensor]:
    return [*outs[:index], out, *outs[index + 1 :]]


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "dims": (lambda a: {"attended": a["attended"][0]}, ValueError, r"attended: got .*must be \[B, S, D\]"),
    "no outs": (lambda a: {"outs": []}, ValueError, "outs: got none, must be one a rank"),
    "tokens": (lambda a: {"outs": a["outs"][1:]}, ValueError, "outs: got 6 tokens in all, must be attended's 11"),
    "dtype": (lambda a: {"outs": _other(a["outs"], 1, a["outs"][1].half())}, ValueError, "outs: got torch.float16"),
    "batch": (lambda a: {"outs": _other(a["outs"], 1, a["outs"][1][:1])}, ValueError, r"outs: got .*must be \[2, "),
    "column": (lambda a: {"column": 13}, ValueError, "column: got 13, must be from 0 to D - 6 = 12"),
    "expanded": (
        lambda a: {"outs": _other(a["outs"], 0, a["outs"][0][:, :1].clone().expand(-1, 5, -1))}, ValueError,
        r"outs: got strides \(18, 0, 1\), must give each batch and token memory of its own",
    ),
    "shared": (lambda a: {"outs": [a["outs"][0], a["outs"][0][:, :4], a["outs"][2]]}, ValueError, "share memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = make()
    change, error, message = REFUSALS[case]
    arguments |= change(arguments)
    for options in ({}, *({"backend": backend} for backend in BACKENDS)):
        with pytest.raises(error, match=message):
            ops.attention_output_push(**arguments, **options)
    assert all(out.isnan().all() for out in arguments["outs"])


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = make()
    outs = [torch.zeros(out.shape) for out in a["outs"]]
    samples = [(a["attended"], outs, a["column"], backend) for backend in BACKENDS]
    check_registration("attention_output_push", samples)
