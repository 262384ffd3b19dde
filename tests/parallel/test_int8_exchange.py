"""Self-attention with Q and K in int8 over ranks: codes, scales and V arrive as one rank has them, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cpu_graphs import graphs_on_cpu
from helpers import bits, same_bits
from ranks import Ranks
from rollouts import Case, session, small_int8_qk_model, small_model
from torch import Tensor

from lingbot_kernels import Int8Recipe, RealtimeCausalDiTState, ops
from lingbot_kernels.parallel import int8_exchange, peer_memory, shard_group
from lingbot_kernels.parallel.sequence_shard import SequenceShard, sequence_splits
from lingbot_kernels.parallel.shard_group import PEER_MEMORY, ShardGroup
from lingbot_kernels.realtime.kv_cache import CacheLayout, Int8KeyValue, KVCache, ring_parts
from lingbot_kernels.realtime.memory import session_memory
from lingbot_kernels.ring import KVRing

CASE = Case(chunks=4, prompts=(0, 1))  # 45 tokens per chunk; the third evicts, with a new prompt
LAYOUT = CacheLayout(1, 2, 2, 64, (1, 1), 18, 3, torch.bfloat16, torch.device("cpu"), torch.int8)


def of_heads(x: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's part of [B, tokens, heads, ...]."""
    return x.unflatten(2, (ranks, -1))[:, :, rank]


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "ranks", "batch"), [(4, 64, 2, 2), (3, 128, 3, 1), (10, 64, 2, 1)])
def test_what_is_packed_arrives(heads: int, head_dim: int, ranks: int, batch: int, with_q: bool) -> None:
    """Scales that are NaN or zero too; Q's codes lie as attention takes them, with odd heads for a rank as well."""
    codes = [torch.randint(-127, 128, (batch, 7, heads, head_dim), dtype=torch.int8) for _ in "qk"]
    scales = [torch.rand(batch, 7, heads) for _ in "qk"]
    scales[0][0, 3, 0], scales[1][0, 2, -1] = torch.nan, 0.0
    v = torch.randn(batch, 7, 3 * heads * head_dim).bfloat16().chunk(3, dim=-1)[2]
    q, k = zip(codes, scales, strict=True)
    sent, start = [], 0
    for tokens in sequence_splits(7, ranks):
        own_q, own_k = ([x[:, start : start + tokens] for x in pair] for pair in (q, k))
        sent.append(
            int8_exchange.pack(tuple(own_q) if with_q else None, tuple(own_k), v[:, start : start + tokens], ranks)
        )
        start += tokens
    for rank in range(ranks):
        arrived = torch.cat([each[rank] for each in sent])
        its_q, its_k, its_v = int8_exchange.unpack(arrived, heads // ranks, head_dim, with_q)
        assert all(same_bits(got, of_heads(want, rank, ranks)) for got, want in zip(its_k, k, strict=True))
        assert same_bits(its_v, of_heads(v.unflatten(-1, (heads, head_dim)), rank, ranks))
        assert (its_q is not None) == with_q
        if its_q is not None:
            assert all(same_bits(got, of_heads(want, rank, ranks)) for got, want in zip(its_q, q, strict=True))
            ops.int8_attention(*its_q, its_k[0].contiguous(), its_k[1], its_v.contiguous(), 7)


def write(heads: int, shard: SequenceShard, on_device: bool) -> list[Tensor]:
    """Of five chunks of 7 tokens, every second one without Q, in a ring of 18 slots: Q's codes and scales, the ring."""
    cache, ring = KVCache(dataclasses.replace(LAYOUT, heads=heads // shard.ranks)), KVRing(18, 3)
    generator, found = torch.Generator().manual_seed(5), []
    for x in cache.tensors():
        x.zero_()
    for index in range(5):
        x = torch.randn(2, 7, 3 * 64 * heads, generator=generator).bfloat16()
        weights = torch.rand(2, 64 * heads, generator=generator).bfloat16()
        table = torch.randn(7, 64, generator=generator)[shard.tokens]
        plan = ring.plan(7 * index, 7)
        ring.commit(plan)
        position = cache.with_slots(cache.device_position(plan) if on_device else cache.position(plan), 7)
        q, k, v = x[:, shard.tokens].chunk(3, dim=-1)
        kv = cache.layers[0]
        assert isinstance(kv, Int8KeyValue)
        if index % 2:
            shard.k_norm_rope_quantize_kv_write(k, v, weights[1], table, kv, position, 1e-6)
        else:
            found += shard.qk_norm_rope_quantize_kv_write(q, k, v, *weights, table, kv, position, 1e-6)
    return found + list(kv)


def has_the_bits_of_one_rank(on_device: bool) -> list[bool]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    got = write(2 * ranks, SequenceShard(sequence_splits(7, ranks), rank, dist.group.WORLD), on_device)
    want = write(2 * ranks, SequenceShard(), on_device)
    return [same_bits(x, of_heads(y, rank, ranks)) for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize("on_device", [False, True], ids=["position", "cursor"])
def test_a_batch_of_uneven_chunks_around_the_ring(ranks: Ranks, on_device: bool) -> None:
    assert ranks.run(has_the_bits_of_one_rank, on_device) == [[True] * 9] * ranks.size


def rollout(ranks: int, shared: bool, graphs: bool = False) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """The chunks of a session, the bits of its last ring by part, and how many graphs were replayed."""
    model, state = small_int8_qk_model(ranks), RealtimeCausalDiTState()
    if shared:
        model.shard_sequence()
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            graphs_on_cpu(patch)
        chunks = list(session(model, CASE, 1, state))
    assert state.kv_cache is not None
    plan = session_memory(model.config, (3, 5), torch.bfloat16, ranks=ranks if shared else 1, recipe=model.recipe)
    assert state.stats()["kv_cache"]["bytes"] == plan.kv_cache
    ring = {name: bits(x) for name, x in ring_parts(state.kv_cache.layers[-1]).items()}
    return chunks, ring, state.graphs.replays


def test_a_session_has_the_bits_of_one_rank(ranks: Ranks) -> None:
    """With eviction, a new prompt and context updates; then with graphs, whose cursor is on the device."""
    want, ring, _ = rollout(ranks.size, False)
    for graphs in (False, True):
        for rank, (chunks, its_ring, replays) in enumerate(ranks.run(rollout, ranks.size, True, graphs)):
            assert (replays > 0) == graphs
            assert all(same_bits(a, b) for a, b in zip(chunks, want, strict=True))
            assert all(torch.equal(its_ring[name], of_heads(x, rank, ranks.size)) for name, x in ring.items())


def quantized_when_shared() -> Tensor:
    model = small_model(torch.bfloat16, dim=256, num_heads=4, residual_dtype="bfloat16")
    model.shard_sequence()
    model.quantize(small_int8_qk_model().recipe)
    return next(session(model, CASE, 1, RealtimeCausalDiTState()))


def test_a_shared_model_can_be_quantized(pool: Callable[[int], Ranks]) -> None:
    want = next(session(small_int8_qk_model(), CASE, 1, RealtimeCausalDiTState()))
    assert all(same_bits(got, want) for got in pool(2).run(quantized_when_shared))


@pytest.mark.parametrize("asked", [False, True])
def test_ranks_write_to_int8_rings_of_others_where_asked_to(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """Where GPUs reach each other's memory, Q and K in int8 are exchanged by a collective all the same, and said so,
    unless the switch says otherwise.
    """
    if asked:
        monkeypatch.setenv(peer_memory.SWITCH, peer_memory.WITH_INT8)
    group: Any = ShardGroup()
    group.exchange, group._group = PEER_MEMORY, object()
    monkeypatch.setattr(shard_group, "PeerSession", lambda found, layout: (found, layout))
    assert group.ring_memory(LAYOUT) == ((group._group, LAYOUT) if asked else None)
    for recipe, exchange in (
        (Int8Recipe(), PEER_MEMORY),
        (Int8Recipe(attention="int8_qk"), PEER_MEMORY if asked else "all-to-all (Q and K are in int8)"),
    ):
        model: Any = small_model(torch.bfloat16, dim=256, num_heads=4)
        model.shard_group = group
        model.quantize(recipe)
        assert group.exchange == exchange
    group._group = None
    monkeypatch.delenv(peer_memory.SWITCH, raising=False)
    assert copy.deepcopy(group)._int8_push == asked
