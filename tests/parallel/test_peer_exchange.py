"""The exchange through shared memory, with ranks that are threads: the same bits as one rank, layer after layer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.ops import RingPosition
from lingbot_kernels.parallel import peer_memory
from lingbot_kernels.parallel.peer_exchange import Arrivals, PeerSession, PeerShard
from lingbot_kernels.parallel.sequence_shard import SequenceShard, sequence_splits
from lingbot_kernels.realtime.kv_cache import CacheLayout, Int8KeyValue, KVCache
from lingbot_kernels.ring import ChunkPosition

HEADS, HEAD_DIM, SINK, CAPACITY = 12, 8, 3, 20
DIM = HEADS * HEAD_DIM


class ThreadMemory:
    """What `PeerMemory` is, where the ranks are threads: every rank's tensors by name, and a barrier."""

    nbytes = 0

    def __init__(self, barrier: threading.Barrier) -> None:
        self._barrier = barrier

    def barrier(self) -> None:
        self._barrier.wait(timeout=240)


class ThreadSession:
    """`PeerSession` of one rank, over buffers that all ranks see."""

    def __init__(self, rank: int, rings: list[list[Tensor]], arrivals: Arrivals) -> None:
        self._rank, self._rings, self._arrivals = rank, rings, arrivals

    def everywhere(self, cache: Tensor) -> tuple[Tensor, ...]:
        index = next(i for i, own in enumerate(self._rings[self._rank]) if own is cache)
        return tuple(ring[index] for ring in self._rings)

    def arrivals(self, splits: tuple[int, ...]) -> Arrivals:
        assert splits == tuple(out.shape[1] for out in self._arrivals.outs)
        return self._arrivals


def make_shards(tokens: int, ranks: int, batch: int, dtype: torch.dtype) -> tuple[list[PeerShard], list[list[Tensor]]]:
    splits, barrier = sequence_splits(tokens, ranks), threading.Barrier(ranks)
    own: dict[str, Any] = {"dtype": dtype}
    rings = [[torch.zeros(batch, CAPACITY, HEADS // ranks, HEAD_DIM, **own) for _ in "kv"] for _ in range(ranks)]
    qs = tuple(torch.full((batch, tokens, HEADS // ranks, HEAD_DIM), torch.nan, **own) for _ in range(ranks))
    outs = tuple(torch.full((batch, max(splits), DIM), torch.nan, **own)[:, :count] for count in splits)
    shards = []
    for rank in range(ranks):
        arrivals = Arrivals(ThreadMemory(barrier), qs[rank], qs, outs)  # type: ignore[arg-type]
        session: Any = ThreadSession(rank, rings, arrivals)
        shards.append(PeerShard(splits, rank, None, session=session))
    return shards, rings


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 8), (3, 7), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_do_together_what_one_does_alone(dtype: torch.dtype, ranks: int, tokens: int, batch: int) -> None:
    torch.manual_seed(0)
    shards, rings = make_shards(tokens, ranks, batch, dtype)
    alone = [torch.zeros(batch, CAPACITY, HEADS, HEAD_DIM, dtype=dtype) for _ in "kv"]
    weights = [torch.randn(DIM).to(dtype) for _ in range(2)]
    forwards = [torch.randn(batch, tokens, 3 * DIM).to(dtype) for _ in range(6)]

    def position(forward: int) -> RingPosition:
        return RingPosition(forward * tokens, SINK)  # wraps

    def run(rank: int) -> list[Tensor]:
        shard, results = shards[rank], []
        for i, qkv in enumerate(forwards):
            q, k, v = qkv[:, shard.tokens].chunk(3, dim=-1)
            table = ops.rope_cos_sin(shard.num_tokens, i * tokens + shard.start, 4, 2, HEAD_DIM, 1e4, "cpu")
            if i == 3:  # a context update's last block
                shard.k_norm_rope_kv_write(k, v, weights[1], table, *rings[rank], position(i), 1e-6)
                continue
            q = shard.qk_norm_rope_kv_write(q, k, v, *weights, table, *rings[rank], position(i), 1e-6)
            results.append(shard.exchange_output(q.flatten(2) + rings[rank][0][:, :tokens].flatten(2)).clone())
        return results

    with ThreadPoolExecutor(ranks) as pool:
        shared = list(pool.map(run, range(ranks)))
    expected = []
    for i, qkv in enumerate(forwards):
        q, k, v = qkv.chunk(3, dim=-1)
        table = ops.rope_cos_sin(tokens, i * tokens, 4, 2, HEAD_DIM, 1e4, "cpu")
        if i == 3:
            ops.k_norm_rope_kv_write(k, v, weights[1], table, *alone, position(i), 1e-6)
            continue
        q = ops.qk_norm_rope_kv_write(q, k, v, *weights, table, *alone, position(i), 1e-6)
        expected.append(q + alone[0][:, :tokens].flatten(2))
    for i, want in enumerate(expected):
        assert torch.equal(torch.cat([results[i] for results in shared], dim=1), want), f"forward {i}"
    for part in range(2):
        assert torch.equal(torch.cat([ring[part] for ring in rings], dim=2), alone[part])


@pytest.mark.parametrize(("ranks", "tokens", "batch"), [(2, 8, 1), (3, 7, 2), (4, 9, 1)])
def test_ranks_do_in_int8_together_what_one_does_alone(ranks: int, tokens: int, batch: int) -> None:
    torch.manual_seed(0)
    shards, _ = make_shards(tokens, ranks, batch, torch.bfloat16)
    heads, barrier = HEADS // ranks, threading.Barrier(ranks)

    def ring(heads: int) -> Int8KeyValue:
        k, scale = torch.zeros(batch, CAPACITY, heads, HEAD_DIM, dtype=torch.int8), torch.zeros(batch, heads, CAPACITY)
        return Int8KeyValue(k, scale.transpose(1, 2), torch.zeros(k.shape, dtype=torch.bfloat16))

    rings, alone = [ring(heads) for _ in range(ranks)], ring(HEADS)
    qs = tuple(torch.full((batch, tokens, heads, HEAD_DIM), 77, dtype=torch.int8) for _ in range(ranks))
    scales = tuple(torch.full((batch, tokens, heads), torch.nan) for _ in range(ranks))
    for rank, shard in enumerate(shards):
        memory: Any = ThreadMemory(barrier)
        outs = shard.session.arrivals(shard.splits).outs
        arrivals = Arrivals(memory, qs[rank], qs, outs, scales[rank], scales)
        object.__setattr__(shard, "session", ThreadSession(rank, [list(each) for each in rings], arrivals))
    weights = [torch.randn(DIM).bfloat16() for _ in range(2)]
    forwards = [torch.randn(batch, tokens, 3 * DIM).bfloat16() for _ in range(6)]

    def run(shard: SequenceShard, kv: Int8KeyValue) -> list[tuple[Tensor, ...]]:
        results = []
        for i, qkv in enumerate(forwards):
            own = slice(shard.start, shard.start + shard.num_tokens) if shard.splits else slice(0, tokens)
            q, k, v = qkv[:, own].chunk(3, dim=-1)
            table = ops.rope_cos_sin(tokens, i * tokens, 4, 2, HEAD_DIM, 1e4, "cpu")[own]
            position = ChunkPosition(RingPosition(i * tokens, SINK), CAPACITY)  # wraps
            if i == 3:  # a context update's last block
                shard.k_norm_rope_quantize_kv_write(k, v, weights[1], table, kv, position, 1e-6)
                continue
            codes = shard.qk_norm_rope_quantize_kv_write(q, k, v, *weights, table, kv, position, 1e-6)
            results.append(tuple(x.clone() for x in codes))
            if shard.splits:
                barrier.wait(timeout=20)  # where the output's exchange would stand
        return results

    with ThreadPoolExecutor(ranks) as pool:
        shared = list(pool.map(run, shards, rings))
    for i, want in enumerate(run(SequenceShard(), alone)):
        for part, whole in enumerate(want):
            assert torch.equal(torch.cat([results[i][part] for results in shared], dim=2), whole), f"forward {i}"
    for part, whole in enumerate(alone):
        assert torch.equal(torch.cat([each[part] for each in rings], dim=2), whole)


def test_the_scales_of_a_ring_everywhere() -> None:
    """They are seen as the transpose of what lies in memory, on every rank."""
    session: Any = PeerSession.__new__(PeerSession)
    memory: Any = peer_memory.PeerMemory.__new__(peer_memory.PeerMemory)
    blocks = [torch.zeros(2048, dtype=torch.uint8) for _ in range(2)]
    memory._rank, memory._ranks, memory._block, memory._shared = 0, 2, blocks[0], Blocks(blocks)
    memory._used, memory._everywhere, session._rings = 0, {}, memory
    layout = CacheLayout(1, 1, 2, 8, (1, 1), 6, 0, torch.bfloat16, torch.device("cpu"), torch.int8)
    cache = KVCache(layout, session)
    k, scale, v = (session.everywhere(x) for x in cache.layers[0])
    for own, others in zip(cache.layers[0], (k, scale, v), strict=True):
        assert [(x.shape, x.stride(), x.dtype) for x in others] == [(own.shape, own.stride(), own.dtype)] * 2
    scale[1].fill_(3.0)
    assert blocks[1].count_nonzero() > 0 and not blocks[0].any() and not k[1].any() and not v[1].any()


class Blocks:
    """Two ranks' blocks in one process, where torch's symmetric memory is not."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self.blocks = blocks

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        size = torch.Size(shape).numel()
        return self.blocks[rank].view(dtype)[offset : offset + size].view(shape)


def test_a_tensor_everywhere_whole_and_by_rows() -> None:
    memory = peer_memory.PeerMemory.__new__(peer_memory.PeerMemory)
    blocks = [torch.zeros(1024, dtype=torch.uint8) for _ in range(2)]
    memory._rank, memory._ranks, memory._block, memory._shared = 0, 2, blocks[0], Blocks(blocks)
    memory._used, memory._everywhere = 0, {}
    memory.empty((3,), torch.float32)
    x = memory.empty((1, 4, 6), torch.float32)
    by_rows, whole = memory.everywhere(x, rows=(4, 3)), memory.everywhere(x)
    assert [tuple(y.shape) for y in by_rows] == [(1, 4, 6), (1, 3, 6)]
    assert [tuple(y.shape) for y in whole] == [(1, 4, 6)] * 2
    whole[1].fill_(7.0)
    assert by_rows[1].eq(7).all() and not x.any() and blocks[1].view(torch.float32).count_nonzero() == 24


@pytest.mark.parametrize(("free", "emptied"), [(2**30, 0), (2**20, 1)])
def test_a_block_gets_what_the_allocator_kept_for_reuse(
    monkeypatch: pytest.MonkeyPatch, free: int, emptied: int
) -> None:
    """It comes from the driver, and must not fail on one rank where the memory check counted what is kept as free."""
    symmetric = pytest.importorskip("torch.distributed._symmetric_memory")
    calls: list[str] = []

    def empty(nbytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        calls.append("block")
        return torch.zeros(nbytes, dtype=dtype)

    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", lambda block, group: Blocks([block]))
    monkeypatch.setattr(peer_memory.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(peer_memory.dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(peer_memory, "_timeout", lambda group, device: timedelta(seconds=1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2**36))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    group: Any = None
    memory = peer_memory.PeerMemory(group, torch.device("cuda", 0), 4096)
    assert memory.nbytes == 4096 and calls == ["emptied"] * emptied + ["block"]
