"""A chunk that fails leaves its session as it was, wherever it fails: done again it has the bits of one that never did.

Memory that nobody wrote holds NaN here (see conftest), so that attention to it would show.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cpu_graphs import graphs_on_cpu
from failures import ERRORS, STRIDE, Interrupt, OutOfMemory, failing
from helpers import make_inputs, make_model, ring_bits, same_bits, same_ring, small_config
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState
from lingbot_kernels.models.lingbot_world import LingBotCrossAttention, LingBotTransformerBlock
from lingbot_kernels.realtime.kv_cache import KVCache
from lingbot_kernels.realtime.runtime_cache import Store
from lingbot_kernels.ring import KVRing

CHUNKS = 4  # inputs, taken in turn
STEADY = 3  # chunks behind a session whose window is full and whose first graph replays come next


class Twins:
    """Two sessions of one model and the same chunks: one that fails, and one that never does.

    A chunk has 12 tokens. The ring's 24 slots, 4 of them pinned, are full after the second; the third evicts.
    """

    def __init__(self, chunks: int = 0, **switches: Any) -> None:
        self.model = make_model(small_config(window_frames=6, sink_frames=1))
        self.stage = CausalDenoisingStage(self.model, timesteps=(1000, 500))
        self.state, self.twin = (RealtimeCausalDiTState(**switches) for _ in range(2))
        self.generators = {state: torch.Generator().manual_seed(7) for state in (self.state, self.twin)}
        self.inputs = make_inputs(self.model.config, CHUNKS, (4, 4), steps=2)
        self.texts = [torch.randn(1, length, 24) for length in (5, 7)]  # a new prompt every second chunk
        self.index = 0
        for _ in range(chunks):
            self.advance()

    def chunk(self, state: RealtimeCausalDiTState, **changes: Any) -> Tensor:
        """The next chunk; the noise between its steps is drawn."""
        given = {**self.inputs.chunk(self.index % CHUNKS), "renoise": None, "text": self.texts[self.index // 2 % 2]}
        noise, generator = self.inputs.noise[self.index % CHUNKS], self.generators[state]
        return self.stage.denoise_chunk(state, noise, **{**given, "generator": generator, **changes})

    def advance(self) -> None:
        """The next chunk in both: the same bits, and the same ring, counts and random numbers after it."""
        assert same_bits(self.chunk(self.state), self.chunk(self.twin))
        assert same_ring(ring_bits(self.state), ring_bits(self.twin))
        assert self.state.stats() == self.twin.stats()
        self.index += 1

    def fail(self, failure: contextlib.AbstractContextManager[Any], error: type[BaseException]) -> bool:
        """Whether the next chunk fails. Nothing of it is left then; it is done again."""
        before, random = self.state.stats(), self.generators[self.state].get_state()
        try:
            with failure:
                self.chunk(self.state)
        except error as raised:
            assert "injected" in str(raised)
            assert self.state.stats() == before
            assert torch.equal(self.generators[self.state].get_state(), random)
            self.advance()
            return True
        self.chunk(self.twin)
        self.index += 1
        return False


def interrupted_everywhere(twins: Callable[[], Twins], stride: int) -> int:
    """Interrupt a chunk at every `stride`-th event, until one ends undisturbed; returns how many were interrupted."""
    for count in itertools.count():
        error = ERRORS[count % len(ERRORS)]
        if not twins().fail(Interrupt(count * stride, error), error):
            return count
    raise AssertionError


def test_a_steady_chunk_interrupted_anywhere() -> None:
    twins = Twins(STEADY)
    assert interrupted_everywhere(lambda: twins, STRIDE) > 1300 // STRIDE


def test_a_first_chunk_interrupted_anywhere() -> None:
    assert interrupted_everywhere(Twins, STRIDE * 5) > 1300 // (STRIDE * 5)


def test_a_chunk_of_a_session_without_caches_interrupted_anywhere() -> None:
    switches = dict.fromkeys(("rope_cache", "time_cache", "camera_cache", "text_cache"), False)
    twins = Twins(STEADY, **switches)
    assert interrupted_everywhere(lambda: twins, STRIDE * 3) > 1300 // (STRIDE * 3)


def test_a_chunk_with_graphs_interrupted_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_on_cpu(monkeypatch)
    twins = Twins(STEADY)
    assert interrupted_everywhere(lambda: twins, STRIDE * 2) > 1300 // (STRIDE * 2)
    assert twins.state.graphs.captures == 2 and twins.state.graphs.replays > 10


def test_chunks_that_warm_up_and_capture_interrupted_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk, with which the window is full: both kinds of forward warm up, and the denoise step captures."""
    graphs_on_cpu(monkeypatch)
    assert interrupted_everywhere(lambda: Twins(1), STRIDE * 8) > 1000 // (STRIDE * 8)
    assert interrupted_everywhere(lambda: Twins(2), STRIDE * 8) > 1000 // (STRIDE * 8)


# Named steps, before and after each.


# (where, calls in a chunk of two steps and the context update, of two blocks)
STEPS = {
    "block": (LingBotTransformerBlock, "forward", 6),
    "cache": (Store, "get_or_compute", 12),
    "refilled camera": (LingBotTransformerBlock, "camera_modulation", 2),
    "refilled text": (LingBotCrossAttention, "project_text", 2),
    "position": (KVCache, "position", 3),
    "commit": (KVRing, "commit", 3),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("chunks", [0, 2, 4], ids=["first", "evicting", "steady, new prompt"])
def test_each_step_in_turn(step: str, after: bool, chunks: int) -> None:
    twins, (owner, name, calls) = Twins(chunks), STEPS[step]
    for nth in range(calls):
        twins = Twins(chunks)
        error = ERRORS[nth % len(ERRORS)]
        assert twins.fail(failing(owner, name, nth, after, error), error)
        twins.advance()


@pytest.mark.parametrize("chunks", [0, 3])
def test_each_allocation_in_turn(chunks: int) -> None:
    twins = Twins(chunks)
    for count in itertools.count():
        if not twins.fail(OutOfMemory(count * STRIDE), torch.OutOfMemoryError):
            break
        twins = twins if chunks else Twins()
    assert count > 300 // STRIDE


def test_hooks_and_observers() -> None:
    twins = Twins(STEADY)

    def hook(*_: object) -> None:
        raise RuntimeError("injected")

    for module in (twins.model, twins.model.blocks[1], twins.model.blocks[1].ffn, twins.model.head):
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            assert twins.fail(contextlib.closing(_Removed(register(hook))), RuntimeError)
    for phase, index in (("denoise", 0), ("denoise", 1), ("context", -1)):

        @contextlib.contextmanager
        def observe(*seen: object, at: tuple[str, int] = (phase, index)) -> Iterator[None]:
            yield
            if seen == at:
                raise RuntimeError("injected")

        before, twins.stage.observe = twins.stage.observe, observe
        assert twins.fail(_Reset(twins.stage, before), RuntimeError)


class _Removed:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


class _Reset(contextlib.ExitStack):
    def __init__(self, stage: CausalDenoisingStage, observe: Any) -> None:
        super().__init__()
        self.callback(setattr, stage, "observe", observe)


# What a session may do next.


def stopped(twins: Twins, at: int = 2, **changes: Any) -> None:
    """The next chunk fails in the block that is run as number `at`."""
    with failing(LingBotTransformerBlock, "forward", at), pytest.raises(RuntimeError):
        twins.chunk(twins.state, **changes)


def test_a_failed_chunk_that_evicted_nothing_leaves_a_session_that_takes_any_other() -> None:
    twins = Twins(1)
    stopped(twins)
    assert twins.state.unfinished is None and twins.state.next_frame == 3
    twins.index = 0
    again = [twins.chunk(state, start_frame=0) for state in (twins.state, twins.twin)]  # the current chunk once more
    assert same_bits(*again)
    stopped(twins, start_frame=3)
    longer = torch.randn(1, 16, 5, 4, 4)
    given = {"text": twins.texts[0], "renoise": torch.zeros(1, *longer.shape)}
    again = [twins.stage.denoise_chunk(state, longer, **given) for state in (twins.state, twins.twin)]
    assert same_bits(*again)


def test_a_failed_chunk_that_evicted_must_be_done_again_first() -> None:
    twins = Twins(STEADY)
    stopped(twins)
    assert twins.state.unfinished == (9, 3)
    shorter = torch.randn(1, 16, 2, 4, 4)
    for changed in ({"start_frame": 6}, {"start_frame": 6, "update_context": False}):
        with pytest.raises(ValueError, match=r"start_frame: got 6 for 3 frames, must be 9 for 3: a forward of that"):
            twins.chunk(twins.state, **changed)
    with pytest.raises(ValueError, match="start_frame: got 9 for 2 frames, must be 9 for 3"):
        twins.stage.denoise_chunk(twins.state, shorter, text=twins.texts[0])
    latents = torch.cat([twins.inputs.noise[0], twins.inputs.condition[0]], 1)
    with pytest.raises(ValueError, match=r"must be 9 for 3.*or call state\.dispose\(\) to start again"):
        twins.model(latents, twins.texts[0], 0.0, state=twins.state, start_frame=6, update_cache_only=True)
    stopped(twins, at=1)  # fails again, and stays as it is
    assert twins.state.unfinished == (9, 3)
    twins.advance()
    assert twins.state.unfinished is None
    twins.advance()


def test_a_failed_chunk_may_give_way_to_a_session_that_starts_again() -> None:
    twins = Twins(STEADY)
    stopped(twins)
    twins.state.dispose()
    assert twins.state.unfinished is None
    twins.index = 0
    fresh = RealtimeCausalDiTState()
    twins.generators |= {fresh: torch.Generator().manual_seed(1), twins.state: torch.Generator().manual_seed(1)}
    assert same_bits(twins.chunk(twins.state), twins.chunk(fresh))


def test_a_first_chunk_that_fails_leaves_a_fresh_session() -> None:
    twins = Twins()
    stopped(twins, at=5)
    state = twins.state
    assert (state.kv_cache, state.nbytes(), state.unfinished) == (None, 0, None)
    other = make_model(small_config(num_layers=1), seed=3)
    given, fresh = make_inputs(other.config, 1, (4, 8), batch=2), RealtimeCausalDiTState()
    chunks = [
        CausalDenoisingStage(other).denoise_chunk(each, given.noise[0], **given.chunk(0)) for each in (state, fresh)
    ]
    assert same_bits(*chunks)


@pytest.mark.parametrize("at", [0, 1])
def test_a_context_update_of_its_own_that_fails_is_done_again(at: int) -> None:
    twins = Twins(STEADY)
    chunks = [twins.chunk(state, update_context=False) for state in (twins.state, twins.twin)]
    assert same_bits(*chunks)
    given = {"text": twins.texts[0], "condition": twins.inputs.condition[0], "camera": twins.inputs.camera[0]}
    before = twins.state.stats()
    with failing(LingBotTransformerBlock, "forward", at, True, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        twins.stage.update_context(twins.state, chunks[0], **given)
    assert twins.state.stats() == before
    twins.index += 1
    with pytest.raises(ValueError, match="start_frame: got 12 for 3 frames, must be 9 for 3"):
        twins.chunk(twins.state)
    for state in (twins.state, twins.twin):
        twins.stage.update_context(state, chunks[0], **given)
    twins.advance()


@pytest.mark.parametrize("own", [True, False], ids=["generator", "torch's own"])
def test_a_rollout_that_fails_is_taken_up_with_the_same_random_numbers(own: bool) -> None:
    twins = Twins()
    outputs = []
    for fails in (False, True):
        torch.manual_seed(11)
        generator = torch.Generator().manual_seed(5) if own else None
        state, chunks = RealtimeCausalDiTState(), []

        def rollout(count: int, state: Any = state, generator: Any = generator) -> Iterator[Tensor]:
            return twins.stage.rollout(state, count, text=twins.texts[0], latent_size=(4, 4), generator=generator)

        chunks += rollout(2)
        if fails:
            for at in (0, 3, 5):
                with (
                    failing(LingBotTransformerBlock, "forward", at, False, torch.OutOfMemoryError),
                    pytest.raises(torch.OutOfMemoryError),
                ):
                    list(rollout(3))
        chunks += rollout(3)
        outputs.append(chunks)
    assert len(outputs[0]) == 5 and all(same_bits(a, b) for a, b in zip(*outputs, strict=True))


def test_a_failed_forward_of_the_model_itself() -> None:
    """Steps that the caller makes are all or nothing one by one."""
    twins = Twins(STEADY)
    given = {"camera": twins.inputs.camera[0], "start_frame": 9}
    latents = torch.cat([twins.inputs.noise[0], twins.inputs.condition[0]], 1)

    def step(state: RealtimeCausalDiTState, index: int) -> Tensor | None:
        return twins.model(latents, twins.texts[0], 900.0 - index, state=state, step_index=index, **given)

    for index in range(2):
        before = twins.state.stats()
        with failing(LingBotTransformerBlock, "forward", 1, True, RuntimeError), pytest.raises(RuntimeError):
            step(twins.state, index)
        assert twins.state.stats() == before and twins.state.next_frame == (9 if index == 0 else 12)
        got, want = step(twins.state, index), step(twins.twin, index)
        assert got is not None and want is not None and same_bits(got, want)
    assert same_ring(ring_bits(twins.state), ring_bits(twins.twin)) and twins.state.stats() == twins.twin.stats()


def test_half_written_text_and_camera_are_never_taken_for_whole() -> None:
    """A refill in place that fails halfway: neither the old key nor the new one finds what is left."""
    twins = Twins(2)
    assert twins.state.crossattn_cache is not None
    buffers = [id(x) for pair in twins.state.crossattn_cache.layers for x in pair]
    with failing(LingBotCrossAttention, "project_text", 1), pytest.raises(RuntimeError):
        twins.chunk(twins.state)
    assert twins.state.crossattn_cache is None
    twins.advance()
    assert [id(x) for pair in twins.state.crossattn_cache.layers for x in pair] == buffers  # what a graph reads
