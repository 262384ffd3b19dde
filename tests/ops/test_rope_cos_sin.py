"""rope_cos_sin: the table for any frame, into any buffer, by both backends; refusals, registration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops
from ops.op_case import BACKENDS, assert_refused, check_registration

ARGUMENTS: dict[str, Any] = {
    "num_tokens": 40, "token_start": 100, "frame_stride": 15, "width": 5, "head_dim": 24, "theta": 1e4, "device": "cpu",
}  # fmt: skip


def exact(num_tokens: int, token_start: int, frame_stride: int, width: int, head_dim: int, theta: float) -> Tensor:
    """float64, entry by entry from the formula."""
    rows = []
    spatial = 2 * (head_dim // 6)
    for n in range(token_start, token_start + num_tokens):
        frame, rest = divmod(n, frame_stride)
        places = zip((head_dim - 2 * spatial, spatial, spatial), (frame, *divmod(rest, width)), strict=True)
        angles = [place * theta ** (-2 * i / channels) for channels, place in places for i in range(channels // 2)]
        rows.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("frame", [0, 7, 1023, 1_000_000, 2**31 // 15 + 3])
@pytest.mark.parametrize("head_dim", [6, 10, 24, 64, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_one_ulp_of_the_formula(backend: str, head_dim: int, frame: int) -> None:
    arguments = {**ARGUMENTS, "head_dim": head_dim, "token_start": frame * 15 + 4}
    got = ops.rope_cos_sin(**arguments, backend=backend)
    del arguments["device"]
    want = exact(**arguments)
    assert got.dtype == torch.float32 and got.shape == (40, head_dim) and got.is_contiguous()
    ulp = torch.finfo(torch.float32).eps * want.abs().clamp(min=2.0**-126)
    if frame <= 1_000_000:
        # 1e-9: the last bit of an angle of a million radians in float64, seen where cos or sin crosses zero.
        assert ((got - want).abs() <= ulp + 1e-9).all()
    else:
        assert ((got - want).abs() <= ulp + 1e-7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_is_a_slice_of_the_chunk(backend: str) -> None:
    whole = ops.rope_cos_sin(**ARGUMENTS, backend=backend)
    shard = ops.rope_cos_sin(**{**ARGUMENTS, "token_start": 113, "num_tokens": 20}, backend=backend)
    assert same_bits(shard, whole[13:33])
    assert ops.rope_cos_sin(**{**ARGUMENTS, "num_tokens": 0}, backend=backend).shape == (0, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_filled_and_returned(backend: str) -> None:
    out = torch.full((40, 24), float("nan"))
    assert ops.rope_cos_sin(**ARGUMENTS, out=out, backend=backend) is out
    assert same_bits(out, ops.rope_cos_sin(**ARGUMENTS, backend=backend))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "num_tokens": ({"num_tokens": -1}, "num_tokens, token_start: got -1, 100, must be 0 or more"),
    "token_start": ({"token_start": -1}, "num_tokens, token_start: got 40, -1"),
    "frame_stride": ({"frame_stride": 0}, "frame_stride, width: got 0, 5, must be positive"),
    "width": ({"width": 4}, "frame_stride, width: got 15, 4, must be positive, width a divisor"),
    "odd": ({"head_dim": 25}, "head_dim: got 25, must be even"),
    "wide": ({"head_dim": 258}, "head_dim: got 258, must be even and from 2 to 256"),
    "none": ({"head_dim": 0}, "head_dim: got 0"),
    "theta": ({"theta": 0.0}, "theta: got 0.0, must be positive"),
    "out shape": ({"out": torch.zeros(39, 24)}, r"out: got torch.float32 \[39, 24\], must be .*\[40, 24\]"),
    "out dtype": ({"out": torch.zeros(40, 24).double()}, "out: got torch.float64"),
    "out stride": ({"out": torch.zeros(24, 40).mT}, "out: got torch.float32"),
    "out device": ({"out": torch.zeros(40, 24, device="meta")}, "out: got device meta, must be cpu"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, message = REFUSALS[case]
    assert_refused(ops.rope_cos_sin, ARGUMENTS, change, ValueError, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    check_registration("rope_cos_sin", [(torch.zeros(40, 24), 100, 15, 5, 24, 1e4, backend) for backend in BACKENDS])
