"""Checks of rope_cos_sin, qk_norm_rope_kv_write, qk_norm_rope_pack and qkv_unpack_kv_write against the reference.

Not collected by itself: test_kernels.py runs it under the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import DEVICE, DTYPES, EPS, assert_as_good_as, poisoned, randn, same_bits

from lingbot_kernels import reference
from lingbot_kernels.ring import RingPosition
from lingbot_kernels.triton import _rows
from lingbot_kernels.triton import qk_norm_rope_kv_write as prologue
from lingbot_kernels.triton import qk_norm_rope_pack as packing
from lingbot_kernels.triton import qkv_unpack_kv_write as unpacking
from lingbot_kernels.triton import rope_cos_sin as table

BF16 = torch.bfloat16
FULL = [
    *(
        (BF16, heads, head_dim, True)
        for heads, head_dim in [(40, 128), (24, 128), (12, 128), (5, 128), (3, 64), (3, 256)]
    ),
    *((dtype, heads, head_dim, True) for dtype in DTYPES for heads, head_dim in [(5, 96), (2, 128)]),
    *((dtype, 12, 128, False) for dtype in DTYPES),
    (torch.float32, 40, 128, True),
]


@pytest.mark.parametrize("head_dim", [64, 128, 256, 96, 20])
@pytest.mark.parametrize("token_start", [0, 1_000_000 * 1508 + 77, 2**31 - 3, 30_000_000 * 1508])
def test_rope_cos_sin_is_within_one_ulp(head_dim: int, token_start: int) -> None:
    out = poisoned(101, head_dim, dtype=torch.float32)
    table.rope_cos_sin(out, token_start, 1508, 52, 1e4)
    want = reference.rope_cos_sin(101, token_start, 1508, 52, head_dim, 1e4, DEVICE)
    assert (out.view(torch.int32) - want.view(torch.int32)).abs().max() <= 1


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize(("frame_stride", "width"), [(6, 3), (35, 5), (1, 1)])
def test_rope_cos_sin_positions(num_tokens: int, frame_stride: int, width: int) -> None:
    out = poisoned(num_tokens, 128, dtype=torch.float32)
    table.rope_cos_sin(out, 11, frame_stride, width, 500.0)
    want = reference.rope_cos_sin(num_tokens, 11, frame_stride, width, 128, 500.0, DEVICE)
    assert (out.view(torch.int32) - want.view(torch.int32)).abs().max() <= 1


class Chunk:
    """Operands of one prologue; strided: q, k, v are views of one projection, and the caches of one tensor."""

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int,
        head_dim: int,
        batch: int = 1,
        tokens: int = 3,
        capacity: int = 7,
        strided: bool = True,
    ) -> None:
        dim = heads * head_dim
        self.shape = (batch, tokens, dim)
        if strided:
            self.q, self.k, self.v = randn(batch, tokens, 3, dim, dtype=dtype).unbind(2)
            caches = poisoned(batch, capacity, 2, heads, head_dim, dtype=dtype)
            self.k_cache, self.v_cache = caches[:, :, 0], caches[:, :, 1]
        else:
            self.q, self.k, self.v = randn(3, batch, tokens, dim, dtype=dtype).unbind(0)
            self.k_cache, self.v_cache = poisoned(2, batch, capacity, heads, head_dim, dtype=dtype).unbind(0)
        self.q_weight, self.k_weight = (1 + 0.2 * randn(2, dim, seed=1)).to(dtype).unbind(0)
        self.cos_sin = reference.rope_cos_sin(tokens, 1000, 10, 5, head_dim, 1e4, DEVICE)
        self.q_out = poisoned(*self.shape, dtype=dtype)

    def reference(
        self, ring: RingPosition, dtype: torch.dtype, with_q: bool = True, with_v: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(q_out, k_cache, v_cache) of the reference in `dtype`, caches poisoned where nothing is written."""
        q, k, v, q_weight, k_weight = (x.to(dtype) for x in (self.q, self.k, self.v, self.q_weight, self.k_weight))
        table = self.cos_sin.to(dtype) if dtype == torch.float64 else self.cos_sin
        k_cache, v_cache = (torch.full_like(x, float("nan"), dtype=dtype) for x in (self.k_cache, self.v_cache))
        v = v if with_v else None
        if with_q:
            q_out = reference.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, table, k_cache, v_cache, ring, EPS)
            return q_out, k_cache, v_cache
        reference.k_norm_rope_kv_write(k, v, k_weight, table, k_cache, v_cache, ring, EPS)
        return None, k_cache, v_cache

    def check(
        self, ring: RingPosition, config: _rows.RowConfig | None = None, with_q: bool = True, with_v: bool = True
    ) -> None:
        """Launch, then compare what was written, and that nothing else was."""
        poison = self.k_cache.clone()
        q, q_weight, q_out = (self.q, self.q_weight, self.q_out) if with_q else (None, None, None)
        v = self.v if with_v else None
        assert prologue.why_not(q, self.k, v, self.k_cache, self.v_cache) is None
        prologue.qk_norm_rope_kv_write(
            q,
            self.k,
            v,
            q_weight,
            self.k_weight,
            self.cos_sin,
            q_out,
            self.k_cache,
            self.v_cache,
            ring.chunk_start,
            ring.cursor,
            ring.sink,
            EPS,
            config=config,
        )
        slots = ring.slots(self.shape[1], self.k_cache.shape[1], DEVICE)
        others = [i for i in range(self.k_cache.shape[1]) if i not in slots.tolist()]
        plain = self.reference(ring, self.k.dtype, with_q, with_v)
        exact = self.reference(ring, torch.float64, with_q, with_v)
        assert_as_good_as(self.k_cache[:, slots], plain[1][:, slots], exact[1][:, slots])
        assert same_bits(self.k_cache[:, others], poison[:, others])
        assert same_bits(self.v_cache, plain[2] if with_v else poison)
        if with_q:
            assert_as_good_as(self.q_out, plain[0], exact[0])
        else:
            assert self.q_out.isnan().all()


@pytest.mark.parametrize(("dtype", "heads", "head_dim", "strided"), FULL, ids=str)
def test_full(dtype: torch.dtype, heads: int, head_dim: int, strided: bool) -> None:
    Chunk(dtype, heads, head_dim, strided=strided).check(RingPosition(5, 2))


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim"), [(BF16, 40, 128), (BF16, 12, 128), *((dtype, 5, 96) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("with_v", [True, False])
def test_write_only(dtype: torch.dtype, heads: int, head_dim: int, with_v: bool) -> None:
    Chunk(dtype, heads, head_dim, batch=2, tokens=2).check(RingPosition(5, 2), with_q=False, with_v=with_v)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("with_q", "with_v"), list(itertools.product([True, False], repeat=2)))
def test_every_program_shape(split: bool, rows: int, with_q: bool, with_v: bool) -> None:
    config = _rows.RowConfig(num_warps=1, chunk=128, rows=rows, split=split, streaming=False)
    Chunk(BF16, 3, 64, batch=2, tokens=3).check(RingPosition(5, 1), config, with_q, with_v)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
def test_chunks_beyond_the_row_are_masked(num_warps: int) -> None:
    for dtype in DTYPES:
        chunk = Chunk(dtype, 5, 128, tokens=2)
        chunk.check(RingPosition(5, 2), _rows.word_config(640, chunk.k.element_size(), num_warps))


@pytest.mark.parametrize("chunk_start", [*range(14), 20, 2**31 - 9, 7 * 10**12])
def test_ring_wraps_at_each_offset(chunk_start: int) -> None:
    Chunk(BF16, 2, 64, tokens=3, capacity=7).check(RingPosition(chunk_start, 2))


@pytest.mark.parametrize("chunk_start", [0, 1, 2, 5, 6, 7, 22, 2**31 - 9])
def test_ring_follows_a_device_cursor(chunk_start: int) -> None:
    cursor = torch.tensor([chunk_start], dtype=torch.int32, device=DEVICE)
    Chunk(BF16, 2, 64, tokens=3, capacity=7).check(RingPosition(-1, 2, cursor))


@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (1, 3), (2, 1), (7, 2)])
def test_token_and_batch_counts(tokens: int, batch: int) -> None:
    Chunk(BF16, 3, 64, batch, tokens, capacity=8).check(RingPosition(4, 1))
    Chunk(torch.float32, 3, 64, batch, tokens, capacity=8, strided=False).check(RingPosition(4, 0))


@pytest.mark.parametrize("offset", [2, 6])
def test_rows_that_are_not_aligned_to_16_bytes(offset: int) -> None:
    chunk = Chunk(BF16, 3, 128)
    batch, tokens, dim = chunk.shape
    for name in ("q", "k", "v"):
        shifted = randn(batch, tokens, dim + 10, dtype=BF16, seed=ord(name))[..., offset : offset + dim]
        setattr(chunk, name, shifted)
    chunk.check(RingPosition(5, 2))


def test_odd_offsets_and_strides_are_named() -> None:
    chunk = Chunk(BF16, 3, 128)
    odd = randn(1, 3, 387, dtype=BF16)
    caches = (chunk.k_cache, chunk.v_cache)
    assert "k has strides" in str(prologue.why_not(chunk.q, odd[..., :384], chunk.v, *caches))
    even = randn(1, 3, 386, dtype=BF16)
    assert "v starts at an odd element" in str(prologue.why_not(None, chunk.k, even[..., 1:385], *caches))
    assert "k is torch.float64" in str(prologue.why_not(None, chunk.k.double(), None, *caches))
    assert "D is 16386" in str(packing.why_not(None, torch.empty(1, 1, 16386), torch.empty(1, 1, 16386)))


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "ranks", "with_q", "split"),
    [
        (BF16, 40, 128, 4, True, False),
        (BF16, 12, 128, 2, True, True),
        (BF16, 5, 128, 1, True, False),
        (BF16, 4, 64, 4, False, True),
        *((dtype, 6, 96, 3, with_q, not with_q) for dtype in DTYPES for with_q in (True, False)),
    ],
    ids=str,
)
def test_pack(dtype: torch.dtype, heads: int, head_dim: int, ranks: int, with_q: bool, split: bool) -> None:
    chunk = Chunk(dtype, heads, head_dim, batch=2, tokens=2)
    batch, tokens, dim = chunk.shape
    operands = (chunk.q if with_q else None, chunk.k, chunk.v, chunk.q_weight if with_q else None, chunk.k_weight)
    out = poisoned(ranks, tokens, batch, 2 + with_q, heads // ranks, head_dim, dtype=dtype)
    config = _rows.word_config(dim, chunk.k.element_size())
    config = _rows.RowConfig(config.num_warps, config.chunk, rows=2 if split else 1, split=split)
    assert packing.why_not(*operands[:3]) is None
    packing.qk_norm_rope_pack(*operands, chunk.cos_sin, out, EPS, config=config)
    plain = reference.qk_norm_rope_pack(*operands, chunk.cos_sin, ranks, EPS)
    exact = reference.qk_norm_rope_pack(
        *(None if x is None else x.double() for x in operands), chunk.cos_sin.double(), ranks, EPS
    )
    assert_as_good_as(out, plain, exact)
    assert same_bits(out[:, :, :, -1], plain[:, :, :, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [3, 2])
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(1, 5, 10, 128), (2, 3, 3, 64), (3, 1, 5, 96)])
@pytest.mark.parametrize("chunk_start", [0, 6, 23])
def test_unpack(
    dtype: torch.dtype, parts: int, batch: int, tokens: int, heads: int, head_dim: int, chunk_start: int
) -> None:
    packed = randn(tokens, batch, parts, heads, head_dim, dtype=dtype)
    caches = poisoned(batch, 8, 2, heads, head_dim, dtype=dtype)
    k_cache, v_cache = caches[:, :, 0], caches[:, :, 1]
    want_k, want_v = k_cache.clone(), v_cache.clone()
    ring = RingPosition(chunk_start, 2)
    reference.qkv_unpack_kv_write(packed, want_k, want_v, ring)
    assert unpacking.why_not(packed, k_cache, v_cache) is None
    unpacking.qkv_unpack_kv_write(packed, k_cache, v_cache, chunk_start, None, 2)
    assert same_bits(k_cache, want_k) and same_bits(v_cache, want_v)
    cursor = torch.tensor([chunk_start], dtype=torch.int32, device=DEVICE)
    caches.fill_(float("nan"))
    unpacking.qkv_unpack_kv_write(packed, k_cache, v_cache, -1, cursor, 2)
    assert same_bits(k_cache, want_k) and same_bits(v_cache, want_v)
