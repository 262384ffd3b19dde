"""A session for which one rank lacks memory is refused on every rank, before any of them allocates; each can go on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ranks import PerRank, Ranks
from rollouts import SMALL, Case, session, small_model

from lingbot_kernels import LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.realtime import memory

NEED = memory.session_memory(LingBotConfig(**SMALL), (3, 5), torch.float32, ranks=2).total


def begin(free: int) -> tuple[int, int]:
    """A session's first chunk where `free` bytes are free: (its next frame, what it keeps)."""
    model, state = small_model(), RealtimeCausalDiTState()
    model.shard_sequence()
    told = memory.free_bytes
    memory.free_bytes = lambda device: free
    try:
        next(session(model, Case(), 1, state))
    except (ValueError, MemoryError):
        assert state.kv_cache is None and state.nbytes() == 0
        raise
    finally:
        memory.free_bytes = told
    return state.next_frame, state.nbytes()


def test_one_rank_is_short(pool: Callable[[int], Ranks]) -> None:
    ranks = pool(2)
    for refusal in ranks.refusals(begin, PerRank([NEED, NEED - 1])):
        assert "the ranks must agree, but differ in memory (rank 0: enough; rank 1: session: needs" in refusal
    (_, first), (_, second) = ranks.run(begin, NEED)
    assert second < first < NEED  # 23 tokens and 22


def test_all_ranks_are_short(pool: Callable[[int], Ranks]) -> None:
    for refusal in pool(2).refusals(begin, NEED - 1):
        assert refusal.startswith("NotEnoughMemory: session: needs")
