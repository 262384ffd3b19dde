"""A rollout over 2, 3 and 4 ranks against one rank in float64, by the rule for float32: 1e-5 relative."""

from __future__ import annotations

import functools

import pytest
import torch
from ranks import Ranks
from rollouts import Case, rollout
from torch import Tensor

from lingbot_kernels import Int8Recipe
from lingbot_kernels.parallel.sequence_shard import sequence_splits
from lingbot_kernels.quantization import PRODUCTS

CASES = {
    "uneven": Case(),
    "even": Case(grid=(4, 8)),
    "no camera": Case(camera=False, chunks=4),
    "prompt change": Case(prompts=(0, 1), chunks=5),
    "batch of 2": Case(batch=2, chunks=4),
    "batch of 2, even": Case(batch=2, chunks=4, grid=(4, 8)),
    "no sink": Case(overrides=(("sink_frames", 0),), grid=(4, 6)),
    "few tokens": Case(grid=(2, 4)),  # 6: over 4 ranks 2, 2, 1, 1
}


@functools.cache
def alone(case: Case, seeds: tuple[int, ...]) -> list[Tensor]:
    return rollout(case, torch.float64, False, seeds)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(ranks: Ranks, case: Case, dtype: torch.dtype, tolerance: float, seeds: tuple[int, ...] = (1,)) -> None:
    expected = alone(case, seeds)
    got = ranks.run(rollout, case, dtype, True, seeds)
    num_chunks = case.chunks * len(seeds)
    for i, truth in enumerate(expected):
        if i < num_chunks:
            value = got[0][i]
            assert all(torch.equal(value, other[i]) for other in got), f"chunk {i}: the ranks differ"
        else:  # K and V: each rank has its own heads, in order
            value = torch.cat([each[i] for each in got], dim=3)
        assert value.shape == truth.shape
        assert torch.isfinite(value).all()
        assert relative_error(value, truth) <= tolerance, f"output {i}: {relative_error(value, truth):.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_one_rank(ranks: Ranks, case: Case) -> None:
    check(ranks, case, torch.float32, 1e-5)


def test_equals_one_rank_in_float64(ranks: Ranks) -> None:
    """Only the order of sums differs."""
    check(ranks, Case(prompts=(0, 1), batch=2), torch.float64, 1e-12)


def test_two_sessions(ranks: Ranks) -> None:
    """Interleaved sessions give what each gives alone, bit for bit."""
    case = Case(chunks=4)
    check(ranks, case, torch.float32, 1e-5, (1, 2))
    together = ranks.run(rollout, case, torch.float32, True, (1, 2))[0][: 2 * case.chunks]
    for i, seed in enumerate((1, 2)):
        single = ranks.run(rollout, case, torch.float32, True, (seed,))[0][: case.chunks]
        assert all(torch.equal(a, b) for a, b in zip(single, together[i::2], strict=True))


def test_bfloat16_stays_near(ranks: Ranks) -> None:
    """Attention and products round otherwise; nothing else does."""
    case = Case(chunks=4)
    got, truth = ranks.run(rollout, case, torch.bfloat16, True)[0], alone(case, (1,))
    one = rollout(case, torch.bfloat16, False)
    for i in range(case.chunks):
        assert relative_error(got[i], truth[i]) <= 1.25 * relative_error(one[i], truth[i])


def test_int8_over_ranks(ranks: Ranks) -> None:
    """Products are exact, so only attention's rounding differs, and the rare code that it moves by a step."""
    case = Case(chunks=4, recipe=Int8Recipe(products=PRODUCTS))
    got, one, truth = (
        ranks.run(rollout, case, torch.float32, True),
        rollout(case, torch.float32, False),
        alone(Case(chunks=4), (1,)),
    )
    for i in range(case.chunks):
        assert all(torch.equal(got[0][i], other[i]) for other in got), f"chunk {i}: the ranks differ"
        cost = relative_error(one[i], truth[i])
        assert 1e-5 < cost < 0.02 and relative_error(got[0][i], one[i]) <= cost


def test_splits() -> None:
    for ranks in range(1, 9):
        for total in (ranks, ranks + 1, 45, 4524, 4680, 4681):
            splits = sequence_splits(total, ranks)
            assert sum(splits) == total
            assert list(splits) == sorted(splits, reverse=True)
            assert max(splits) - min(splits) == (1 if total % ranks else 0)
            assert splits.count(max(splits)) == (total % ranks or ranks)
    with pytest.raises(ValueError, match="got 3 tokens over 4 ranks"):
        sequence_splits(3, 4)
