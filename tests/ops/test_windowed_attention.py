"""windowed_attention: SDPA and the reference against float64, windows within the ring, merging, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.ops.windowed_attention import merge_by_lse, visible_segments
from ops.op_case import DTYPES, Arguments, Errors, assert_refused, check_registration

LIBRARIES = ("sdpa", "reference")


def arguments(dtype: torch.dtype, visible: int = 9, batch: int = 2, tokens: int = 4) -> Arguments:
    """Slots beyond the visible ones hold NaN: a value that is seen shows itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(batch, tokens, 48), torch.randn(batch, 13, 3, 16), torch.randn(batch, 13, 3, 16)
    k[:, visible:], v[:, visible:] = float("nan"), float("nan")
    return {"q": q.to(dtype), "k_cache": k.to(dtype), "v_cache": v.to(dtype), "num_visible": visible}


def exact(q: Tensor, k_cache: Tensor, v_cache: Tensor, seen: list[int]) -> Tensor:
    queries, keys, values = q.double().unflatten(-1, (3, 16)), k_cache[:, seen].double(), v_cache[:, seen].double()
    weights = torch.exp(torch.einsum("bshd,bthd->bhst", queries, keys) / 4.0)
    return torch.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdim=True), values).flatten(2)


@pytest.mark.parametrize("visible", [1, 9, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, visible: int) -> None:
    """Against torch's attention over a copy of the visible slots alone."""
    a = arguments(dtype, visible)
    want = exact(a["q"], a["k_cache"], a["v_cache"], list(range(visible)))
    heads = (
        x.transpose(1, 2) for x in (a["q"].unflatten(-1, (3, 16)), a["k_cache"][:, :visible], a["v_cache"][:, :visible])
    )
    plain = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    allowed = (plain.double() - want).norm()
    for library in (*LIBRARIES, "auto"):
        got = ops.windowed_attention(**a, backend=library)
        assert got.dtype == dtype and got.shape == (2, 4, 48) and got.is_contiguous()
        assert (got.double() - want).norm() <= 1.25 * allowed + 1e-300


@pytest.mark.parametrize("library", LIBRARIES)
def test_heads_may_be_apart_and_strided(library: str) -> None:
    a = arguments(torch.float32)
    want = ops.windowed_attention(**a, backend=library)
    packed = torch.stack([a["q"].unflatten(-1, (3, 16))] * 3, dim=2)
    assert not packed[:, :, 0].is_contiguous()
    assert same_bits(ops.windowed_attention(**{**a, "q": packed[:, :, 0]}, backend=library), want)


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_queries(library: str) -> None:
    assert ops.windowed_attention(**arguments(torch.float32, tokens=0), backend=library).shape == (2, 0, 48)


@pytest.mark.parametrize("capacity_and_sink", [(13, 3), (13, 0), (9, 4), (8, 7)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_recent_window_at_every_offset_of_the_ring(tokens: int, capacity_and_sink: tuple[int, int]) -> None:
    """The sink and the latest tokens, listed one by one, against the segments; once the ring is full its position may
    be told by the true count or by the slot.
    """
    capacity, sink = capacity_and_sink
    if tokens > capacity - sink:
        tokens = capacity - sink
    torch.manual_seed(0)
    cache = torch.full((2, 1, capacity, 3, 16), float("nan"))
    q = torch.randn(1, tokens, 48)
    for chunk_start in range(0, 4 * capacity, tokens):
        slots = ops.RingPosition(chunk_start, sink).slots(tokens, capacity, "cpu")
        cache[:, :, slots] = torch.randn(2, 1, tokens, 3, 16)
        end = chunk_start + tokens
        visible = min(end, capacity)
        for recent in range(tokens, capacity + 3):
            kept = [p for p in range(max(0, end - (capacity - sink)), end) if p >= min(sink, end)]
            seen = [*range(min(sink, end)), *(p for p in kept if p >= end - recent)]
            want = sorted({p if p < sink else sink + (p - sink) % (capacity - sink) for p in seen})
            starts = {chunk_start, int(slots[0])} if visible == capacity else {chunk_start}
            for start in starts:
                segments = visible_segments(ops.RingPosition(start, sink), tokens, capacity, visible, recent)
                assert [slot for a, b in segments for slot in range(a, b)] == want
                assert len(segments) <= 3 and all(a < b for a, b in segments)
            if recent in (tokens, tokens + 2):
                options: dict[str, Any] = {"ring": ops.RingPosition(chunk_start, sink), "recent": recent}
                true = exact(q, cache[0], cache[1], want)
                for library in LIBRARIES:
                    got = ops.windowed_attention(q, cache[0], cache[1], visible, **options, backend=library)
                    assert (got - true).norm() <= 2e-6 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_merging_by_lse_equals_attention_over_the_union(dtype: torch.dtype, spread: float) -> None:
    """Also where one part outweighs the others by far: scores that exp() alone would overflow."""
    torch.manual_seed(0)
    q = spread * torch.randn(2, 4, 3, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 11, 3, 16, dtype=torch.float64)
    want = reference.windowed_attention(q, k, v, 11)
    parts = []
    for start, stop in ((0, 2), (2, 3), (3, 11)):
        out, lse = reference.windowed_attention_with_lse(q, k[:, start:stop], v[:, start:stop], stop - start)
        parts.append((out.unflatten(-1, (3, 16)).to(dtype), lse.to(torch.promote_types(dtype, torch.float32))))
    merged = merge_by_lse(parts)
    assert merged.dtype == dtype
    limit = {torch.float64: 1e-13, torch.float32: 2e-5 if spread > 1 else 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert (merged.flatten(-2).double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_merging_keeps_its_own_choice_as_attention_does(backend: str) -> None:
    q, (k, v) = torch.randn(1, 4, 48), torch.randn(2, 1, 13, 3, 16)
    options: dict[str, Any] = {"ring": ops.RingPosition(20, 2), "recent": 5}
    want = ops.windowed_attention(q, k, v, 13, **options)
    with ops.use_backend(backend):
        assert torch.equal(ops.windowed_attention(q, k, v, 13, **options), want)


def padded(cache: Tensor, visible: int, count: int) -> Tensor:
    """The visible slots, the last one `count` times."""
    return torch.cat([cache[:, : visible - 1], cache[:, visible - 1 : visible].expand(-1, count, -1, -1)], dim=1)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("visible", "count"), [(9, 5), (2, 511), (1, 7), (13, 1)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_key_that_counts_for_several_equals_them(library: str, visible: int, count: int, spread: float) -> None:
    """Also where that key outweighs the others by far, or they outweigh it."""
    a = arguments(torch.float64, visible)
    a["q"] = spread * a["q"]
    want = reference.windowed_attention(
        a["q"], padded(a["k_cache"], visible, count), padded(a["v_cache"], visible, count), visible - 1 + count
    )
    got = ops.windowed_attention(**a, last_key_count=count, backend=library)
    assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_a_counted_key(dtype: torch.dtype, library: str) -> None:
    """Against float64: at most 1.25 times that of the same library over the repeated key."""
    a = arguments(dtype, 9, tokens=40)
    keys, values = (padded(a[name], 9, 30) for name in ("k_cache", "v_cache"))
    exact = reference.windowed_attention(a["q"].double(), keys.double(), values.double(), 38)
    plain = ops.windowed_attention(a["q"], keys, values, 38, backend=library)
    got = ops.windowed_attention(**a, last_key_count=30, backend=library)
    assert got.dtype == dtype and got.is_contiguous()
    assert (got.double() - exact).norm() <= 1.25 * (plain.double() - exact).norm() + 1e-300


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", (*LIBRARIES, "auto"))
def test_a_count_of_one_has_the_bits_of_none(library: str, dtype: torch.dtype) -> None:
    a = arguments(dtype)
    want = ops.windowed_attention(**a, backend=library)
    assert same_bits(ops.windowed_attention(**a, last_key_count=1, backend=library), want)
    assert not same_bits(ops.windowed_attention(**a, last_key_count=2, backend=library), want)


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]] = {
    "q dims": (lambda a: {"q": a["q"][0]}, ValueError, r"q: got shape \[4, 48\], must be \[2, S, 48\]"),
    "q one dim": (lambda a: {"q": a["q"][0, 0]}, ValueError, r"q: got shape \[48\]"),
    "q width": (lambda a: {"q": a["q"][..., 1:]}, ValueError, r"q: got shape \[2, 4, 47\]"),
    "q batch": (lambda a: {"q": a["q"][:1]}, ValueError, r"q: got shape \[1, 4, 48\]"),
    "dtype": (lambda a: {"k_cache": a["k_cache"].half()}, TypeError, "k_cache: got torch.float16"),
    "meta": (lambda a: {"v_cache": a["v_cache"].to("meta")}, TypeError, "v_cache: got .*on meta"),
    "cache dims": (
        lambda a: {"k_cache": a["k_cache"].flatten(2)}, ValueError, r"k_cache, v_cache: got \[2, 13, 48\] and",
    ),
    "cache shapes": (lambda a: {"v_cache": a["v_cache"][:, 1:]}, ValueError, r"k_cache, v_cache: got .*\[2, 12, 3, 16"),
    "none visible": (lambda a: {"num_visible": 0}, ValueError, "num_visible: got 0, must be from 1 to .* 13"),
    "too many": (lambda a: {"num_visible": 14}, ValueError, "num_visible: got 14, must be from 1"),
    "no ring": (lambda a: {"recent": 5}, ValueError, "ring: got None, must say where the chunk is"),
    "recent": (
        lambda a: {"recent": 3, "ring": ops.RingPosition(5, 2)}, ValueError, "recent: got 3, must be at least .* 4"
    ),
    "count of 0": (lambda a: {"last_key_count": 0}, ValueError, "last_key_count: got 0, must be positive and finite"),
    "count": (lambda a: {"last_key_count": float("nan")}, ValueError, "last_key_count: got nan, must be positive"),
    "count of recent": (
        lambda a: {"last_key_count": 2, "recent": 5, "ring": ops.RingPosition(5, 2)}, ValueError,
        "last_key_count: got 2, must be 1 where `recent` is given",
    ),
    "cursor": (
        lambda a: {"recent": 5, "ring": ops.RingPosition(0, 2, torch.zeros(1, dtype=torch.int32))},
        ValueError, "ring: got a device cursor, must hold an int position",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments(torch.float32)
    assert_refused(ops.windowed_attention, given, change(given), error, message, backends=LIBRARIES)


def test_libraries_that_cannot_serve_say_why() -> None:
    a = arguments(torch.bfloat16)
    for name in ("fa4", "fa3", "cudnn"):
        with pytest.raises(ops.BackendUnavailable, match=f"backend '{name}' can't serve: serves CUDA tensors, not cpu"):
            ops.windowed_attention(**a, backend=name)
    with pytest.raises(ops.BackendUnavailable, match="backend 'cpu' can't serve: attention is left to a library"):
        ops.windowed_attention(**a, backend="cpu")
    with pytest.raises(
        ValueError, match="backend: got 'flash', must be auto or one of fa4, fa3, cudnn, sdpa, reference"
    ):
        ops.windowed_attention(**a, backend="flash")


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments(torch.float32, visible=13)
    samples = [(a["q"], a["k_cache"], a["v_cache"], ranges, "sdpa", 1.0) for ranges in ([0, 9], [0, 2, 5, 9])]
    weighted = [(*samples[0][:-2], library, 3.0) for library in LIBRARIES]
    check_registration("windowed_attention", [*samples, (*samples[0][:-2], "reference", 1.0), *weighted])
