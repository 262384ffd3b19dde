"""rope_cos_sin on the CPU: within one float32 ulp of float64 angles, at any frame."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_calls import assert_same_bits, poison, rope_cos_sin, table64, under_every_isa

from lingbot_kernels import _C


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    nearest = expected.float()
    step = torch.nextafter(nearest.abs(), torch.tensor(math.inf)) - nearest.abs()
    return float(((actual.double() - expected).abs() / step.double()).max())


@pytest.mark.parametrize("frame", [0, 17, 1_000_000, 3_000_000_000])
@pytest.mark.parametrize(("frame_stride", "width", "head_dim"), [(12, 4, 128), (35, 7, 6), (15, 5, 10), (6, 6, 320)])
def test_within_an_ulp(frame: int, frame_stride: int, width: int, head_dim: int) -> None:
    tokens = 2 * frame_stride + 3
    out = rope_cos_sin(tokens, frame * frame_stride + 2, frame_stride, width, head_dim)
    assert torch.isfinite(out).all()
    assert ulps(out, table64(tokens, frame * frame_stride + 2, frame_stride, width, head_dim)) <= 1


def test_720p_shape_at_frame_a_million() -> None:
    tokens, frame_stride, width, head_dim = 40, 1508, 52, 128
    start = 1_000_000 * frame_stride + 1490
    out = rope_cos_sin(tokens, start, frame_stride, width, head_dim)
    assert ulps(out, table64(tokens, start, frame_stride, width, head_dim)) <= 1


@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 30])
def test_a_shard_is_a_slice_of_the_whole(tokens: int) -> None:
    whole = rope_cos_sin(60, 24, 12, 4, 16)
    for first in range(60 - tokens + 1):
        assert_same_bits(rope_cos_sin(tokens, 24 + first, 12, 4, 16), whole[first : first + tokens])


@pytest.mark.parametrize("theta", [100.0, 256.0, 1e6])
def test_theta(theta: float) -> None:
    assert ulps(rope_cos_sin(20, 5, 12, 4, 30, theta), table64(20, 5, 12, 4, 30, theta)) <= 1


def test_tokens_before_zero_follow_floor_division() -> None:
    assert ulps(rope_cos_sin(10, -5, 6, 3, 12), table64(10, -5, 6, 3, 12)) <= 1


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    one = rope_cos_sin(4524, 77, 1508, 52, 128, threads=1)
    for threads in (2, 3, 0):
        assert_same_bits(rope_cos_sin(4524, 77, 1508, 52, 128, threads=threads), one)
    for other in under_every_isa(lambda: rope_cos_sin(4524, 77, 1508, 52, 128)):
        assert_same_bits(other, one)


def test_writes_no_more_than_its_rows() -> None:
    out = poison(5, 16)
    _C.cpu.rope_cos_sin(out[1:4].data_ptr(), 3, 0, 12, 4, 16, 10000.0, 0)
    assert out[[0, 4]].isnan().all() and out[1:4].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: 7}, "head_dim must be even"),
        ({4: 0}, "frame_stride and width must be at least 1"),
        ({3: 0}, "frame_stride and width must be at least 1"),
        ({6: -1.0}, "theta must be positive"),
        ({6: math.nan}, "theta must be positive"),
        ({0: 0}, "out must not be null"),
        ({2: 2**63 - 2}, "token_start"),
    ],
)
def test_refusals(change: dict[int, float], message: str) -> None:
    out = poison(4, 16)
    args = [out.data_ptr(), 4, 0, 12, 4, 16, 10000.0, 0]
    for at, value in change.items():
        args[at] = value
    with pytest.raises(RuntimeError, match=f"^rope_cos_sin: .*{message}"):
        _C.cpu.rope_cos_sin(*args)
    assert out.isnan().all()


def test_no_tokens_is_no_work() -> None:
    _C.cpu.rope_cos_sin(0, 0, 0, 12, 4, 16, 10000.0, 0)
