"""Ranks that differ, or can't share the model, are refused by name on every rank; none hangs, and all can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import PerRank, Ranks, lose_patience
from rollouts import Case, session, small_model

from lingbot_kernels import CausalDenoisingStage, Int8Recipe, RealtimeCausalDiTState


def join(
    overrides: dict[str, Any],
    seed: int = 0,
    layout: str = "ulysses",
    dtype: Any = torch.float32,
    recipe: Int8Recipe | None = None,
) -> None:
    model = small_model(dtype, seed, **overrides)
    if recipe is not None:
        model.quantize(recipe)
    model.shard_sequence(layout=layout)


def quantized_on_one_rank(this_one: bool) -> None:
    """Ranks that share a model, of which one then quantises it."""
    model = small_model()
    model.shard_sequence()
    if this_one:
        model.quantize()
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 36, 3, 4, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    model(latents, text, 1000.0, state=RealtimeCausalDiTState(), start_frame=0)


def forward(difference: dict[str, Any], later: bool) -> int:
    """One forward, of a fresh session or of one with a chunk behind it, with an argument of one rank's own; returns
    the session's next frame.
    """
    model, state = small_model(), RealtimeCausalDiTState()
    model.shard_sequence()
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 36, 3, 4, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    camera = torch.randn(1, 384, 3, 4, 8, generator=generator)
    arguments = {"latents": latents, "text": text, "timestep": 1000.0, "start_frame": 0, "camera": camera}
    if later:
        model(**arguments, state=state)
        arguments["start_frame"] = 3
    before = state.next_frame
    for name, change in difference.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    try:
        model(**arguments, state=state)
    except (ValueError, TypeError):
        assert state.next_frame == before and (later or state.kv_cache is None)
        raise
    return state.next_frame


def changed(x: torch.Tensor) -> torch.Tensor:
    return x + (torch.arange(x.numel()).view_as(x) == 7)


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:, :4]


def narrow(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, :, :2, :2]


def wider(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x], dim=-1)


def all_name(refusals: list[str], *words: str) -> None:
    for rank, refusal in enumerate(refusals):
        for word in words:
            assert word in refusal, f"rank {rank}: {refusal}"


def last_differs(ranks: Ranks, usual: Any, other: Any) -> PerRank:
    return PerRank([usual] * (ranks.size - 1) + [other])


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"window_frames": 9}, ["config.window_frames", ": 8", ": 9"]),
        ({"num_layers": 1}, ["config.num_layers", ": 2", ": 1", "weights"]),
        ({"eps": 1e-5}, ["config.eps"]),
        ({"num_heads": 8}, ["config.num_heads", ": 12", ": 8"]),
    ],
)
def test_configs_that_differ(ranks: Ranks, difference: dict[str, Any], words: list[str]) -> None:
    refusals = ranks.refusals(join, last_differs(ranks, {}, difference))
    all_name(refusals, "ValueError: the ranks must agree", *words, f"rank {ranks.size - 1}: ")


def test_weights_dtypes_and_layouts_that_differ(ranks: Ranks) -> None:
    all_name(ranks.refusals(join, {}, last_differs(ranks, 0, 1)), "differ in weights (rank")
    dtypes = last_differs(ranks, torch.float32, torch.bfloat16)
    all_name(ranks.refusals(join, {}, 0, "ulysses", dtypes), "dtype", "torch.bfloat16")
    all_name(ranks.refusals(join, {}, 0, last_differs(ranks, "ulysses", "ring")), "layout", "ring")


def test_precisions_that_differ(ranks: Ranks) -> None:
    default, other = Int8Recipe(), Int8Recipe(seed=1)
    refusals = ranks.refusals(join, {}, 0, "ulysses", torch.float32, last_differs(ranks, default, None))
    all_name(refusals, "differ in precision (rank", "Int8Recipe()", "as the dtype")
    refusals = ranks.refusals(join, {}, 0, "ulysses", torch.float32, last_differs(ranks, default, other))
    all_name(refusals, "precision", "Int8Recipe(seed=1)")
    all_name(ranks.refusals(quantized_on_one_rank, last_differs(ranks, False, True)), "precision", "Int8Recipe()")


def test_heads_that_the_ranks_do_not_divide(ranks: Ranks) -> None:
    refusals = ranks.refusals(join, {"dim": 80, "num_heads": 5})
    all_name(refusals, f"ranks: got {ranks.size}, must divide num_heads = 5")


@pytest.mark.parametrize("layout", ["ring", "tensor", ""])
def test_layouts_there_are_not(ranks: Ranks, layout: str) -> None:
    all_name(ranks.refusals(join, {}, 0, layout), f"layout: got {layout!r}, must be one of ulysses")


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "prompt": ({"text": changed}, ["the prompt in text"]),
    "prompt length": ({"text": shorter}, ["text (rank", "[1, 4, 32]"]),
    "start": ({"start_frame": 6}, ["start_frame (rank", ": 6"]),
    "time": ({"timestep": 937.5}, ["timestep (rank", "937.5"]),
    "size": ({"latents": wider, "camera": wider}, ["latents (rank", "[1, 36, 3, 4, 16]"]),
    "type": ({"latents": "none"}, ["latents (rank", "'none'"]),
    "camera": ({"camera": None}, ["camera (rank", "None"]),
    "phase": ({"update_cache_only": True}, ["update_cache_only (rank"]),
}


@pytest.mark.parametrize("later", [False, True], ids=["fresh", "later"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_forwards_that_differ(pool: Callable[[int], Ranks], name: str, later: bool) -> None:
    ranks = pool(3)
    refusals = ranks.refusals(forward, PerRank([{}, DIFFERENCES[name][0], {}]), later)
    all_name(refusals, "the ranks must agree", "rank 1: ", "ranks 0, 2: ", *DIFFERENCES[name][1])
    assert ranks.run(forward, {}, later) == [6 if later else 3] * 3


@pytest.mark.parametrize("name", ["latents", "camera"])
def test_values_that_differ_when_a_session_begins(pool: Callable[[int], Ranks], name: str) -> None:
    refusals = pool(3).refusals(forward, PerRank([{name: changed}, {}, {}]), False)
    all_name(refusals, f"the values of {name} (rank 0: ")


def padding_as_one_key(here: bool) -> torch.Tensor:
    model = small_model()
    model.shard_sequence()
    model.weighted_padding = here
    return next(session(model, Case(grid=(4, 8)), 1, RealtimeCausalDiTState()))


def test_padding_that_differs(pool: Callable[[int], Ranks]) -> None:
    all_name(pool(2).refusals(padding_as_one_key, PerRank([True, False])), "differ in weighted_padding (rank 0: True")
    exact = next(session(small_model(torch.float64), Case(grid=(4, 8)), 1, RealtimeCausalDiTState()))
    for got in pool(2).run(padding_as_one_key, True):
        assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_a_bad_argument_that_all_ranks_have(pool: Callable[[int], Ranks]) -> None:
    for later, start in ((False, -1), (True, 7)):
        all_name(pool(3).refusals(forward, {"start_frame": start}, later), "start")
    all_name(pool(4).refusals(forward, {"latents": narrow, "camera": narrow}, False), "3 tokens over 4 ranks")


def draw(seed: int) -> None:
    model = small_model()
    model.shard_sequence()
    noise, text = torch.zeros(1, 16, 3, 4, 8), torch.zeros(1, 5, 32)
    generator = torch.Generator().manual_seed(seed)
    CausalDenoisingStage(model).denoise_chunk(RealtimeCausalDiTState(), noise, text=text, generator=generator)


def test_generators_that_differ(pool: Callable[[int], Ranks]) -> None:
    ranks = pool(2)
    all_name(ranks.refusals(draw, PerRank([1, 2])), "random generator's state")
    ranks.run(draw, 1)


def new_weights(everywhere: bool) -> None:
    model, state = small_model(), RealtimeCausalDiTState()
    model.shard_sequence()
    next(session(model, Case(grid=(4, 8)), 1, state))
    if everywhere or dist.get_rank() == 1:
        model.load_state_dict(small_model(seed=1).state_dict())
    next(session(model, Case(grid=(4, 8)), 1, RealtimeCausalDiTState()))


def test_weights_loaded_on_one_rank(pool: Callable[[int], Ranks]) -> None:
    all_name(pool(2).refusals(new_weights, False), "differ in weights (rank 0: ")
    pool(2).run(new_weights, True)


def session_of_one_rank() -> None:
    model, state = small_model(), RealtimeCausalDiTState()
    next(session(model, Case(grid=(4, 8)), 1, state))
    model.shard_sequence()
    next(session(model, Case(grid=(4, 8)), 1, state))


def test_a_session_begun_on_one_rank(pool: Callable[[int], Ranks]) -> None:
    all_name(pool(2).refusals(session_of_one_rank), "state: got one that another model")


def in_halves() -> list[torch.Tensor]:
    """Two groups of two ranks, each with a rollout of its own."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = dist.get_rank() // 2
    model = small_model()
    model.shard_sequence(halves[half])
    chunks = list(session(model, Case(grid=(4, 8), chunks=2), half, RealtimeCausalDiTState()))
    try:
        model.shard_sequence(halves[1 - half])
    except ValueError as error:
        assert "this rank belongs to" in str(error)
        return chunks
    raise AssertionError("took a group without this rank")


def test_groups_of_some_ranks(pool: Callable[[int], Ranks]) -> None:
    chunks = pool(4).run(in_halves)
    for rank in range(4):
        truth = session(small_model(torch.float64), Case(grid=(4, 8), chunks=2), rank // 2, RealtimeCausalDiTState())
        for chunk, exact in zip(chunks[rank], truth, strict=True):
            assert (chunk - exact).norm() / exact.norm() <= 1e-5


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match="there is no process group"):
        small_model().shard_sequence()


def silent(missing: int) -> None:
    """The rank `missing` never answers; the others' group gives up."""
    group = dist.new_group()
    lose_patience(group)
    if dist.get_rank() != missing:
        small_model().shard_sequence(group)


def test_a_rank_that_does_not_answer(pool: Callable[[int], Ranks]) -> None:
    ranks = pool(2)
    with pytest.raises(AssertionError, match="rank 0: RuntimeError: sequence sharding: rank 0 of 2 got no answer"):
        ranks.run(silent, 1)
