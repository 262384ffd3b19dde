"""Norm + RoPE + K/V write, write-only, pack and unpack on the CPU, against complex products in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_calls import (
    Ring,
    assert_as_good,
    assert_close,
    assert_same_bits,
    norm_rope64,
    norm_rope_plain,
    poison,
    qk_norm_rope_kv_write,
    qk_norm_rope_pack,
    qkv_unpack_kv_write,
    rope_cos_sin,
    under_every_isa,
)
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(40, 128), (12, 128), (3, 6), (2, 10), (5, 24), (1, 320), (2, 606), (7, 2)]


def inputs(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection, the two weights, and a table far from zero."""
    g = torch.Generator().manual_seed(seed)
    dim = heads * head_dim
    q, k, v = (torch.randn(batch, tokens, 3 * dim, generator=g) * 2).to(dtype).split(dim, -1)
    weights = (1 + torch.randn(2, dim, generator=g) / 4).to(dtype)
    return q, k, v, weights[0], weights[1], rope_cos_sin(tokens, 12_345, 12, 4, head_dim)


def check(actual: Tensor, x: Tensor, weight: Tensor, cos_sin: Tensor, heads: int) -> None:
    expected = norm_rope64(x, weight, cos_sin, heads)
    actual = actual.reshape(expected.shape)
    if x.dtype == torch.float32:
        assert_close(actual, expected, 2e-6)
    else:
        assert_as_good(actual, norm_rope_plain(x, weight, cos_sin, heads), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7)])
def test_full(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v, qw, kw, cos_sin = inputs(batch, tokens, heads, head_dim, dtype)
    k_cache, v_cache = poison(2, batch, 11, heads, head_dim, dtype=dtype)
    q_out = qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, k_cache, v_cache, Ring(2, 1, 11))
    check(q_out, q, qw, cos_sin, heads)
    check(k_cache[:, 2 : 2 + tokens], k, kw, cos_sin, heads)
    assert_same_bits(v_cache[:, 2 : 2 + tokens].flatten(2), v)
    for cache in (k_cache, v_cache):
        assert cache[:, :2].isnan().all() and cache[:, 2 + tokens :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_only_is_the_k_and_v_of_the_full_op(dtype: torch.dtype) -> None:
    q, k, v, qw, kw, cos_sin = inputs(2, 5, 6, 20, dtype)
    full = torch.zeros(2, 2, 9, 6, 20, dtype=dtype)
    qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, *full, Ring(6, 3, 9))
    only = torch.zeros_like(full)
    assert qk_norm_rope_kv_write(None, k, v, None, kw, cos_sin, *only, Ring(6, 3, 9)) is None
    assert_same_bits(only, full)
    k_alone = torch.zeros_like(full)
    qk_norm_rope_kv_write(None, k, None, None, kw, cos_sin, k_alone[0], None, Ring(6, 3, 9))
    assert_same_bits(k_alone[0], full[0])


@pytest.mark.parametrize("by_cursor", [False, True])
@pytest.mark.parametrize("sink", [0, 3])
def test_every_ring_offset(sink: int, by_cursor: bool) -> None:
    tokens, capacity = 4, 11
    _, k, v, _, kw, cos_sin = inputs(2, tokens, 2, 12, torch.float32)
    for start in range(2 * capacity + 1):
        cursor = torch.tensor([start], dtype=torch.int32) if by_cursor else None
        ring = Ring(-7 if by_cursor else start, sink, capacity, cursor)
        before = torch.randn(2, 2, capacity, 2, 12)
        caches = before.clone()
        qk_norm_rope_kv_write(None, k, v, None, kw, cos_sin, *caches, ring)
        slots = ring.slots(tokens)
        assert len(set(slots)) == tokens
        check(caches[0][:, slots], k, kw, cos_sin, 2)
        assert_same_bits(caches[1][:, slots].flatten(2), v)
        others = [slot for slot in range(capacity) if slot not in slots]
        assert_same_bits(caches[:, :, others], before[:, :, others])


def test_a_chunk_that_fills_the_sink_too() -> None:
    _, k, v, _, kw, cos_sin = inputs(1, 11, 2, 12, torch.float32)
    caches = poison(2, 1, 11, 2, 12)
    qk_norm_rope_kv_write(None, k, v, None, kw, cos_sin, *caches, Ring(0, 3, 11))
    assert_same_bits(caches[1].flatten(2), v)


def test_any_strides() -> None:
    heads, head_dim, tokens = 3, 16, 6
    dim = heads * head_dim
    q, k, v, qw, kw, cos_sin = inputs(2, tokens, heads, head_dim, torch.bfloat16)
    packed = [x.contiguous() for x in (q, k, v)]
    spread = torch.full((tokens, 4, dim + 5), 9.0, dtype=torch.bfloat16)  # token-major, batch rows between strangers
    strided = []
    for x in packed:
        view = spread.clone().transpose(0, 1)[1::2, :, :dim]
        view.copy_(x)
        strided.append(view)
    caches = poison(2, 2, 8, heads, head_dim, dtype=torch.bfloat16)
    wide = poison(2, 2, 8, 2, heads, head_dim, dtype=torch.bfloat16)[:, :, :, 1]  # a cache inside a larger buffer
    expected = qk_norm_rope_kv_write(*packed, qw, kw, cos_sin, *caches, Ring(0, 2, 8))
    actual = qk_norm_rope_kv_write(*strided, qw, kw, cos_sin, *wide, Ring(0, 2, 8))
    assert_same_bits(actual, expected)
    assert_same_bits(wide[:, :, :tokens], caches[:, :, :tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5)])
def test_pack_then_unpack(batch: int, tokens: int, with_q: bool, ranks: int, dtype: torch.dtype) -> None:
    heads, head_dim = 8, 20
    q, k, v, qw, kw, cos_sin = inputs(batch, tokens, heads, head_dim, dtype)
    if not with_q:
        q = qw = None
    full = poison(2, batch, 9, heads, head_dim, dtype=dtype)
    q_out = qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, *full, Ring(7, 2, 9))
    packed = qk_norm_rope_pack(q, k, v, qw, kw, cos_sin, heads, ranks)
    assert packed.isfinite().all()
    for rank in range(ranks):
        mine = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        if with_q:
            expected = q_out.unflatten(-1, (heads, head_dim))[:, :, mine]
            assert_same_bits(packed[rank, :, :, 0].transpose(0, 1), expected)
        caches = poison(2, batch, 9, heads // ranks, head_dim, dtype=dtype)
        qkv_unpack_kv_write(packed[rank], *caches, Ring(7, 2, 9))
        assert_same_bits(caches, full[:, :, :, mine])


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    heads, head_dim, tokens = 40, 128, 61
    q, k, v, qw, kw, cos_sin = inputs(1, tokens, heads, head_dim, torch.bfloat16)

    def run(threads: int) -> Tensor:
        caches = torch.zeros(2, 1, 64, heads, head_dim, dtype=torch.bfloat16)
        q_out = qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, *caches, Ring(40, 2, 64), threads)
        packed = qk_norm_rope_pack(q, k, v, qw, kw, cos_sin, heads, 4, threads)
        return torch.cat([q_out.flatten(), caches.flatten(), packed.flatten()])

    one = run(1)
    for threads in (2, 5, 0):
        assert_same_bits(run(threads), one)
    for other in under_every_isa(lambda: run(0)):
        assert_same_bits(other, one)


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (Ring(0, 9, 9), r"ring.sink must be in \[0, ring.capacity\)"),
        (Ring(0, -1, 9), "ring.sink"),
        (Ring(-1, 2, 9), "chunk_start"),
        (Ring(0, 2, 9, torch.tensor([-3], dtype=torch.int32)), "cursor"),
        (Ring(5, 6, 9), "larger than ring.capacity - ring.sink"),
    ],
)
def test_a_refused_ring_leaves_the_cache(ring: Ring, message: str) -> None:
    _, k, v, _, kw, cos_sin = inputs(1, 5, 2, 12, torch.float32)
    caches = poison(2, 1, 9, 2, 12)
    with pytest.raises(RuntimeError, match=f"^qk_norm_rope_kv_write: .*{message}"):
        qk_norm_rope_kv_write(None, k, v, None, kw, cos_sin, *caches, ring)
    with pytest.raises(RuntimeError, match=f"^qkv_unpack_kv_write: .*{message}"):
        qkv_unpack_kv_write(torch.zeros(5, 1, 2, 2, 12), *caches, ring)
    assert caches.isnan().all()


def test_refusals_by_name() -> None:
    q, k, v, qw, kw, cos_sin = inputs(1, 2, 2, 12, torch.float32)
    caches = poison(2, 1, 9, 2, 12)
    with pytest.raises(RuntimeError, match="q needs q_weight"):
        qk_norm_rope_kv_write(q, k, v, None, kw, cos_sin, *caches, Ring(0, 2, 9))
    with pytest.raises(RuntimeError, match="v needs v_cache"):
        qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, caches[0], None, Ring(0, 2, 9))
    with pytest.raises(RuntimeError, match="head_dim must be even"):
        qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, *poison(2, 1, 9, 8, 3), Ring(0, 2, 9))
    with pytest.raises(RuntimeError, match="ranks must divide heads"):
        qk_norm_rope_pack(q, k, v, qw, kw, cos_sin, 2, 3)
    assert caches.isnan().all()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int) -> None:
    q, k, v, qw, kw, cos_sin = inputs(batch, tokens, 2, 12, torch.float32)
    caches = poison(2, max(batch, 1), 9, 2, 12)
    qk_norm_rope_kv_write(q, k, v, qw, kw, cos_sin, *caches, Ring(0, 2, 9))
    qk_norm_rope_pack(q, k, v, qw, kw, cos_sin, 2, 2)
    assert caches.isnan().all()
