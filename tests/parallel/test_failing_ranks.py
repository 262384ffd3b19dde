"""A forward that fails on all ranks, on one, or with a rank that is gone: sessions stay as they were, or say what to
do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from failures import failing
from ranks import Ranks, lose_patience
from rollouts import small_int8_qk_model, small_model
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.models.lingbot_world import LingBotTransformerBlock
from lingbot_kernels.parallel.sequence_shard import SequenceShard

CHUNKS = 5  # the window of 8 frames is full with the third
PLACES = {"block": (LingBotTransformerBlock, "forward"), "exchange": (SequenceShard, "exchange_output"),
          "gather": (SequenceShard, "gather"), "commit": (RealtimeCausalDiTState, "commit")}  # fmt: skip


def failing_at(place: str, nth: int, here: bool = True) -> contextlib.AbstractContextManager[None]:
    return failing(*PLACES[place], nth, error=torch.OutOfMemoryError, here=here)


class Session:
    """Chunk after chunk of two steps; noise and the noise between the steps are drawn."""

    def __init__(self, group: dist.ProcessGroup | None = None, int8_qk: bool = False) -> None:
        self.model: CausalLingBotTransformer = small_int8_qk_model() if int8_qk else small_model()
        self.model.shard_sequence(group)
        self.stage = CausalDenoisingStage(self.model, timesteps=(1000, 500))
        self.generator = torch.Generator().manual_seed(4)
        self.text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(5))
        self.state = RealtimeCausalDiTState()

    def chunk(self) -> Tensor:
        return next(self.stage.rollout(self.state, 1, text=self.text, latent_size=(6, 10), generator=self.generator))


def with_failures(place: str, nth: int, int8_qk: bool = False, chunks: int = CHUNKS) -> bool:
    """Every chunk but one fails on every rank and is done again; whether all of it has the bits of a run without."""
    plain, failed = Session(int8_qk=int8_qk), Session(int8_qk=int8_qk)
    for index in range(chunks):
        if index:
            before = failed.state.stats()
            with failing_at(place, nth), pytest.raises(torch.OutOfMemoryError, match="injected"):
                failed.chunk()
            if failed.state.stats() != before:
                return False
        if not torch.equal(failed.chunk(), plain.chunk()):
            return False
    rings = [[x for pair in each.state.kv_cache.layers for x in pair] for each in (plain, failed)]  # type: ignore
    return all(torch.equal(a, b) for a, b in zip(*rings, strict=True))


@pytest.mark.parametrize(("place", "nth"), [("block", 1), ("exchange", 2), ("gather", 1), ("commit", 0), ("commit", 2)])
def test_a_chunk_that_fails_on_every_rank_is_done_again(pool: Callable[[int], Ranks], place: str, nth: int) -> None:
    assert pool(2).run(with_failures, place, nth) == [True, True]


def test_a_chunk_with_int8_attention_is_done_again(pool: Callable[[int], Ranks]) -> None:
    assert pool(2).run(with_failures, "exchange", 2, True, 4) == [True, True]


def on_one_rank(nth: int) -> list[str]:
    """The third chunk's forward `nth` succeeds on rank 0 and fails on rank 1, when all is exchanged; then the ranks
    call again until the chunk is there, at most twice. Returns what they were told.
    """
    plain, session, rank = Session(), Session(), dist.get_rank()
    for _ in range(2):
        plain.chunk(), session.chunk()
    told = []
    with failing_at("commit", nth, here=rank == 1):
        if rank == 1:
            with pytest.raises(torch.OutOfMemoryError):
                session.chunk()
        for _ in range(2):
            try:
                got = session.chunk()
            except ValueError as error:
                told.append(str(error))
            else:
                if torch.equal(got, plain.chunk()):
                    told.append("the chunk")
                break
    return told


@pytest.mark.parametrize("nth", [0, 1])
def test_a_step_that_fails_on_one_rank_takes_the_chunk_back_on_all(pool: Callable[[int], Ranks], nth: int) -> None:
    for refusal, outcome in pool(2).run(on_one_rank, nth):
        assert "the ranks must agree, but differ in" in refusal and outcome == "the chunk"


def finished_on_one_rank() -> list[str]:
    """Rank 1 fails as the chunk's last forward ends: to rank 0 it is finished."""
    session, told = Session(), []
    session.chunk()
    with failing_at("commit", 2, here=dist.get_rank() == 1), contextlib.suppress(torch.OutOfMemoryError):
        session.chunk()
    state = torch.Generator().manual_seed(4).get_state()
    for _ in range(2):
        session.generator.set_state(state)  # alike on both: that the positions differ is what is to be told
        try:
            session.chunk()
        except ValueError as error:
            told.append(str(error))
    session.state.dispose()
    session.chunk()
    return told


def test_a_chunk_that_is_finished_on_some_ranks_only_says_what_to_do(pool: Callable[[int], Ranks]) -> None:
    for told in pool(2).run(finished_on_one_rank):
        assert len(told) == 2
        for message in told:
            assert "state.next_frame (rank 0: 6; rank 1: 3)" in message
            assert message.endswith("state.dispose() on every rank starts again")


def with_a_dead_rank() -> str:
    """Rank 1 is gone after the first chunk; what rank 0 is told, twice."""
    group = dist.new_group()
    session = Session(group)
    session.chunk()
    lose_patience(group)
    if dist.get_rank() == 1:
        with failing_at("exchange", 1), contextlib.suppress(RuntimeError):  # injected; or rank 0 has given up first
            session.chunk()
        return ""
    before, random, told = session.state.stats(), session.generator.get_state(), []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            session.chunk()
        told.append(str(error.value))
        assert session.state.stats() == before
        assert torch.equal(session.generator.get_state(), random)
    return told[1]


def test_a_rank_that_dies_within_a_forward(pool: Callable[[int], Ranks]) -> None:
    told, _ = pool(2).run(with_a_dead_rank)
    assert "got no answer from another rank" in told
