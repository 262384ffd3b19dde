"""Sessions and models of several ranks, saved, resumed and copied rank by rank."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rollouts import small_int8_qk_model, small_model

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState


def roll(model: Any, state: RealtimeCausalDiTState, first: int, last: int) -> torch.Tensor:
    generator = torch.Generator()
    text = torch.randn(1, 5, 32, generator=generator.manual_seed(1))
    chunks = []
    for index in range(first, last):
        noise = torch.randn(1, 16, 3, 4, 8, generator=generator.manual_seed(10 + index))
        chunks.append(CausalDenoisingStage(model).denoise_chunk(state, noise, text=text, generator=generator))
    return torch.cat(chunks, dim=2)


def shared_model(seed: int = 0, int8_qk: bool = False) -> Any:
    model = small_int8_qk_model(seed=seed) if int8_qk else small_model(seed=seed)
    model.shard_sequence()
    return model


def save_and_resume(folder: str, chunks: int, int8_qk: bool = False) -> tuple[bool, bool]:
    """Whether a session that was resumed, and a copy of it, go on with the bits of the one that was saved."""
    model, state = shared_model(int8_qk=int8_qk), RealtimeCausalDiTState()
    roll(model, state, 0, chunks)
    state.save(folder)
    copied = copy.deepcopy(state)
    want = roll(model, state, chunks, chunks + 2)
    other = shared_model(int8_qk=int8_qk)
    resumed = RealtimeCausalDiTState.load(folder, other)
    same = torch.equal(roll(other, resumed, chunks, chunks + 2), want)
    return same, torch.equal(roll(model, copied, chunks, chunks + 2), want)


def copy_the_model() -> bool:
    model = shared_model()
    copied = copy.deepcopy(model)
    assert copied.shard_group is not model.shard_group and copied.shard_group.ranks == model.shard_group.ranks
    assert copied.shard_group.exchange == model.shard_group.exchange
    want = roll(model, RealtimeCausalDiTState(), 0, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return torch.equal(roll(copied, RealtimeCausalDiTState(), 0, 2), want)


def pickle_the_model() -> str:
    try:
        pickle.dumps(shared_model())
    except TypeError as error:
        return str(error)
    return ""


def load(folder: str, seed: int = 0) -> int:
    return RealtimeCausalDiTState.load(folder, shared_model(seed)).next_frame


@pytest.mark.parametrize(("chunks", "int8_qk"), [(1, False), (5, False), (4, True)], ids=["1", "5", "int8_qk"])
def test_every_rank_goes_on(chunks, int8_qk, pool: Callable[[int], Ranks], tmp_path):
    ranks = pool(2)
    assert ranks.run(save_and_resume, str(tmp_path), chunks, int8_qk) == [(True, True)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0-of-2", "rank-1-of-2"]


def test_ranks_that_can_not_go_on_are_refused_together(pool, tmp_path):
    ranks = pool(2)
    ranks.run(save_and_resume, str(tmp_path), 1)
    assert all("weights: got others" in refused for refused in ranks.refusals(load, str(tmp_path), 1))
    with pytest.raises(ValueError, match="it has rank-0-of-2, rank-1-of-2, a session of several ranks"):
        RealtimeCausalDiTState.load(tmp_path, small_model())
    (tmp_path / "rank-1-of-2" / "session.json").unlink()
    refusals = ranks.refusals(load, str(tmp_path))
    assert all("the saved session" in refused and "without a session.json" in refused for refused in refusals)


def test_a_sharded_model_is_copied_for_the_same_ranks(pool):
    assert pool(2).run(copy_the_model) == [True, True]


def test_a_sharded_model_is_not_pickled(pool):
    assert all("save_pretrained" in refused for refused in pool(2).run(pickle_the_model))


def test_other_ranks_do_not_find_their_part(pool, tmp_path: Path):
    pool(2).run(save_and_resume, str(tmp_path), 1)
    assert all("without a session.json" in refused for refused in pool(3).refusals(load, str(tmp_path)))
