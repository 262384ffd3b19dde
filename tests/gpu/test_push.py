"""The pushes on the GPU, every rank's memory on this one: the bits of the packed exchange, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from lingbot_kernels import RingPosition, ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# heads, head_dim, ranks, splits, batch, capacity, sink, chunk_start
SHAPES = [
    (40, 128, 4, (9, 9, 9, 8), 1, 96, 20, 71),  # wraps
    (40, 128, 8, (2, 2, 2, 1, 1, 1, 1, 1), 1, 40, 4, 3),
    (24, 128, 3, (5, 5, 5), 2, 40, 8, 0),
    (12, 128, 2, (3, 2), 1, 24, 0, 20),
    (6, 10, 3, (4, 3, 3), 2, 24, 5, 17),  # no 16-byte vectors
    (1, 64, 1, (7,), 1, 20, 3, 15),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("cursor", [False, True])
def test_norm_rope_push(dtype: torch.dtype, shape: tuple, with_q: bool, cursor: bool) -> None:
    heads, head_dim, ranks, splits, batch, capacity, sink, start = shape
    dim, own, tokens = heads * head_dim, heads // ranks, sum(splits)
    qkv = torch.randn(batch, tokens, 3 * dim, device="cuda").to(dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    weights = [torch.randn(dim, device="cuda").to(dtype) for _ in range(2)]
    position = torch.tensor([start], dtype=torch.int32, device="cuda") if cursor else None
    ring = RingPosition(0 if cursor else start, sink, position)

    def nan(*sizes: int) -> list[torch.Tensor]:
        return [torch.full(sizes, float("nan"), device="cuda", dtype=dtype) for _ in range(ranks)]

    q_outs = nan(batch, tokens, own, head_dim) if with_q else []
    k_caches, v_caches = (nan(batch, capacity, own, head_dim) for _ in range(2))
    packed, first = [], 0
    for count in splits:
        part = slice(first, first + count)
        table = ops.rope_cos_sin(count, 1000 + first, 12, 4, head_dim, 10000.0, "cuda")
        shard = (q[:, part] if with_q else None, k[:, part], v[:, part], weights[0] if with_q else None, weights[1])
        ops.qk_norm_rope_push(*shard, table, q_outs, k_caches, v_caches, ring, first, 1e-6, backend="cuda")
        packed.append(ops.qk_norm_rope_pack(*shard, table, ranks, 1e-6, backend="cuda"))
        first += count
    for rank in range(ranks):
        caches = nan(batch, capacity, own, head_dim)[:1] + nan(batch, capacity, own, head_dim)[:1]
        received = torch.cat([shard[rank] for shard in packed])
        expected = ops.qkv_unpack_kv_write(received, caches[0], caches[1], ring, backend="cuda")
        for got, want in zip((k_caches[rank], v_caches[rank]), caches, strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
        if expected is not None:
            assert torch.equal(q_outs[rank], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("cursor", [False, True])
def test_norm_rope_quantize_push(dtype: torch.dtype, shape: tuple, with_q: bool, cursor: bool) -> None:
    """All shards together write the bits of `qk_norm_rope_quantize_kv_write`, and nothing else."""
    heads, head_dim, ranks, splits, batch, capacity, sink, start = shape
    dim, own, tokens = heads * head_dim, heads // ranks, sum(splits)
    q, k, v = torch.randn(batch, tokens, 3 * dim, device="cuda").to(dtype).chunk(3, dim=-1)
    weights = [torch.randn(dim, device="cuda").to(dtype) for _ in range(2)]
    position = torch.tensor([start], dtype=torch.int32, device="cuda") if cursor else None
    ring = RingPosition(0 if cursor else start, sink, position)

    def memory(heads: int, count: int) -> list[list[torch.Tensor]]:
        """Q's codes and scales, K's codes and scales, V."""
        codes = {"dtype": torch.int8, "device": "cuda"}
        nan = float("nan")
        return [
            [torch.full((batch, tokens, heads, head_dim), 77, **codes) for _ in range(count)],
            [torch.full((batch, tokens, heads), nan, device="cuda") for _ in range(count)],
            [torch.full((batch, capacity, heads, head_dim), 77, **codes) for _ in range(count)],
            [torch.full((batch, heads, capacity), nan, device="cuda").transpose(1, 2) for _ in range(count)],
            [torch.full((batch, capacity, heads, head_dim), nan, device="cuda", dtype=dtype) for _ in range(count)],
        ]  # type: ignore[arg-type]

    every, first = memory(own, ranks), 0
    table = ops.rope_cos_sin(tokens, 1000, 12, 4, head_dim, 10000.0, "cuda")
    for count in splits:
        part = slice(first, first + count)
        ops.qk_norm_rope_quantize_push(
            q[:, part] if with_q else None, k[:, part], v[:, part], weights[0] if with_q else None, weights[1],
            table[part], *(every[:2] if with_q else ([], [])), *every[2:], ring, first, 1e-6, backend="cuda",
        )  # fmt: skip
        first += count
    (q_codes,), (q_scale,), (k_cache,), (k_scale,), (v_cache,) = memory(heads, 1)
    rest = (table, k_cache, k_scale, v_cache, ring, 1e-6)
    if with_q:
        q_codes, q_scale = ops.qk_norm_rope_quantize_kv_write(q, k, v, *weights, *rest, backend="cuda")
    else:
        ops.k_norm_rope_quantize_kv_write(k, v, weights[1], *rest, backend="cuda")
    for got, want in zip(every, (q_codes, q_scale, k_cache, k_scale, v_cache), strict=True):
        together = torch.cat(got, dim=2)
        if want.dtype != torch.int8:
            assert torch.equal(together.isnan(), want.isnan())
            together, want = together.nan_to_num(), want.nan_to_num()
        assert torch.equal(together, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1280, 1920, 128, 6])
@pytest.mark.parametrize("splits", [(1131, 1131), (5, 4, 4, 4), (33,), (3, 1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_output_push(dtype: torch.dtype, width: int, splits: tuple[int, ...], batch: int) -> None:
    ranks = len(splits)
    attended = torch.randn(ranks, batch, sum(splits), width, device="cuda").to(dtype)
    buffers = torch.full((ranks, batch, max(splits), ranks * width), float("nan"), device="cuda", dtype=dtype)
    outs = [buffer[:, :count] for buffer, count in zip(buffers, splits, strict=True)]
    for rank in range(ranks):
        ops.attention_output_push(attended[rank], outs, rank * width, backend="cuda")
    whole = torch.cat(list(attended), dim=2)
    for out, want in zip(outs, whole.split(splits, dim=1), strict=True):
        assert torch.equal(out, want)
    for buffer, count in zip(buffers, splits, strict=True):
        assert buffer[:, count:].isnan().all()
