"""merge_segments: both backends against float64, attention over a union, refusals, registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import ops, reference
from ops.op_case import BACKENDS, DTYPES, assert_refused, assert_within_rule, check_registration

Arguments = dict[str, Any]


def make(dtype: torch.dtype = torch.float32, count: int = 3, batch: int = 2, tokens: int = 5) -> Arguments:
    torch.manual_seed(0)
    return {
        "segments": torch.randn(count, batch, tokens, 3, 16).to(dtype),
        "lse": 2 * torch.randn(count, batch, 3, tokens) + torch.arange(3.0)[:, None],
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, count: int) -> None:
    assert_within_rule(ops.merge_segments, reference.merge_segments, make(dtype, count))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_parts_becomes_attention_over_all(backend: str) -> None:
    q, k, v = (torch.randn(2, 3, tokens, 16) for tokens in (5, 24, 24))
    parts, sums = [], []
    for keys, values in zip(k.chunk(3, dim=2), v.chunk(3, dim=2), strict=True):
        scores = q @ keys.mT / 4
        parts.append((scores.softmax(-1) @ values).transpose(1, 2))
        sums.append(scores.logsumexp(-1))
    got = ops.merge_segments(torch.stack(parts), torch.stack(sums), backend=backend)
    whole = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(got, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_far_apart(backend: str) -> None:
    a = make()
    got = ops.merge_segments(
        a["segments"].transpose(0, 1).contiguous().transpose(0, 1), a["lse"].transpose(0, 1).clone().transpose(0, 1),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got, ops.merge_segments(**a, backend=backend))
    a["lse"][1] += 200  # the others' weights vanish
    assert torch.equal(ops.merge_segments(**a, backend=backend), a["segments"][1].flatten(-2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    assert ops.merge_segments(**make(tokens=0), backend=backend).shape == (2, 0, 48)


REFUSALS: dict[str, tuple[Callable[[Arguments], dict[str, Tensor]], type[Exception], str]] = {
    "dims": (lambda a: {"segments": a["segments"][0]}, ValueError, r"segments: got .*must be \[1 to 64 segments, B"),
    "none": (lambda a: {"segments": a["segments"][:0]}, ValueError, "segments: got .*1 to 64"),
    "integers": (lambda a: {"segments": a["segments"].int()}, (TypeError, ops.BackendUnavailable), "int32"),  # type: ignore[dict-item]
    "heads": (
        lambda a: {"segments": a["segments"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError,
        "segments: got strides .*heads must be contiguous",
    ),
    "lse shape": (
        lambda a: {"lse": a["lse"][:2]}, ValueError, r"lse: got shape \[2, 2, 3, 5\], must be \[3, 2, 3, 5\]",
    ),
    "lse dtype": (lambda a: {"lse": a["lse"].half()}, TypeError, "lse: got torch.float16"),
    "lse meta": (lambda a: {"lse": a["lse"].to("meta")}, TypeError, "lse: got .*on meta"),
    "lse stride": (lambda a: {"lse": a["lse"].mT.contiguous().mT}, ValueError, "lse: got inner stride 3, must be 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = make()
    change, error, message = REFUSALS[case]
    assert_refused(ops.merge_segments, arguments, change(arguments), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = make()
    check_registration("merge_segments", [(a["segments"], a["lse"], backend) for backend in BACKENDS])
