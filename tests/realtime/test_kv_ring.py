"""The K/V ring against a plain list of tokens, over random schedules, and every refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import make_inputs, make_model, ring_bits, same_ring, small_config
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState, RingPosition, ops
from lingbot_kernels.realtime.kv_cache import CacheLayout, KVCache, KVRing

HEAD_DIM = 2


def tagged_write(ring: KVRing, cache: torch.Tensor, start: int, tokens: int, tag: int) -> None:
    """Plan, write V = (token, tag) through the op into the ring's slots, commit."""
    plan = ring.plan(start, tokens)
    v = torch.tensor([[[float(start + i), float(tag)] for i in range(tokens)]], dtype=torch.float64)
    table = ops.rope_cos_sin(tokens, 0, 1, 1, HEAD_DIM, 1e4, "cpu")
    position = RingPosition(plan.first_slot, ring.sink)
    ops.k_norm_rope_kv_write(v, v, v.new_ones(HEAD_DIM), table, torch.empty_like(cache), cache, position, 1e-6)
    ring.commit(plan)
    assert ring.num_visible == plan.num_visible


class RingAgainstList(RuleBasedStateMachine):
    """tokens: all that was ever received, each with the tag of the forward that wrote it last; a few numbers decide
    what of it is visible: the first `sink`, and the latest so that the total is at most `capacity`.
    """

    @initialize(capacity=st.integers(1, 14), data=st.data())
    def begin(self, capacity: int, data: Any) -> None:
        sink = data.draw(st.integers(0, capacity - 1))
        self.ring = KVRing(capacity, sink)
        self.cache = torch.full((1, capacity, 1, HEAD_DIM), float("nan"), dtype=torch.float64)
        self.visible: list[tuple[int, int]] = []
        self.chunk: tuple[int, int] | None = None
        self.tag = 0

    def end(self) -> int:
        assert self.chunk is not None
        return sum(self.chunk)

    def write(self, start: int, tokens: int) -> None:
        self.tag += 1
        tagged_write(self.ring, self.cache, start, tokens, self.tag)
        fresh = {start + i: self.tag for i in range(tokens)}
        kept = [(token, fresh.pop(token, tag)) for token, tag in self.visible] + list(fresh.items())
        while len(kept) > self.ring.capacity:
            del kept[self.ring.sink]
        self.visible, self.chunk = kept, (start, tokens)

    @precondition(lambda self: self.chunk is None)
    @rule(start=st.one_of(st.integers(0, 50), st.integers(0, 2**62)), data=st.data())
    def first(self, start: int, data: Any) -> None:
        self.write(start, data.draw(st.integers(1, self.ring.capacity - self.ring.sink)))

    @precondition(lambda self: self.chunk is not None)
    @rule(data=st.data())
    def advance(self, data: Any) -> None:
        self.write(self.end(), data.draw(st.integers(1, self.ring.capacity - self.ring.sink)))

    @precondition(lambda self: self.chunk is not None)
    @rule()
    def overwrite(self) -> None:
        assert self.chunk is not None
        self.write(*self.chunk)

    @precondition(lambda self: self.chunk is not None)
    @rule(offset=st.integers(-40, 40), data=st.data())
    def refused(self, offset: int, data: Any) -> None:
        assert self.chunk is not None
        limit = self.ring.capacity - self.ring.sink
        start, tokens = self.end() + offset, data.draw(st.integers(-1, limit + 2))
        if 1 <= tokens <= limit and (offset == 0 or (start, tokens) == self.chunk):
            return
        before = dict(vars(self.ring))
        with pytest.raises(ValueError, match=r"chunk: got|start: got"):
            self.ring.plan(start, tokens)
        assert vars(self.ring) == before

    @invariant()
    def the_visible_slots_hold_the_list(self) -> None:
        if self.chunk is None:
            return
        start, tokens = self.chunk
        seen = self.cache[0, : self.ring.num_visible, 0]
        assert sorted(map(tuple, seen.tolist())) == sorted((float(t), float(tag)) for t, tag in self.visible)
        assert self.cache[0, self.ring.num_visible :].isnan().all()
        assert (self.ring.end, self.ring.first_token) == (start + tokens, start)
        # The sink lies in order at the front: the first tokens ever received.
        sink = self.visible[: self.ring.sink]
        assert seen[: len(sink)].tolist() == [[float(t), float(tag)] for t, tag in sink]


RingAgainstList.TestCase.settings = settings(max_examples=60, stateful_step_count=14)
TestRingAgainstList = RingAgainstList.TestCase


@settings(max_examples=150)
@given(data=st.data())
def test_slots_and_segments_of_a_plan_equal_the_list_however_long_the_rollout(data: Any) -> None:
    """Positions far beyond 2**31 tokens: reached by one jump of the bookkeeping, since a rollout can't be run that
    long; the slots are compared with integers of any size.
    """
    capacity = data.draw(st.integers(1, 40))
    sink = data.draw(st.integers(0, capacity - 1))
    received = data.draw(st.one_of(st.integers(0, 3 * capacity), st.integers(2**31 - 50, 2**40), st.integers(0, 2**70)))
    tokens = data.draw(st.integers(1, capacity - sink))
    origin = data.draw(st.integers(0, 2**50))
    ring = KVRing(capacity, sink)
    ring._origin, ring._end, ring._chunk_tokens = origin, origin + received, 0
    if received == 0:
        ring.reset()
    plan = ring.plan(origin + received, tokens)
    slot = [p if p < sink else sink + (p - sink) % (capacity - sink) for p in range(received, received + tokens)]
    assert 0 <= plan.first_slot < capacity
    assert RingPosition(plan.first_slot, sink).slots(tokens, capacity, "cpu").tolist() == slot
    cursor = torch.tensor([plan.first_slot], dtype=torch.int32)
    assert RingPosition(-7, sink, cursor).slots(tokens, capacity, "cpu").tolist() == slot
    assert plan.num_visible == min(received + tokens, capacity)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chunk_start", [0, 1, 5, 11, 12, 100, 2**31 + 5, 2**40 + 3])
def test_the_op_writes_where_the_int_and_the_cursor_say(chunk_start: int, backend: str) -> None:
    sink, capacity, tokens = 2, 13, 6
    x = torch.randn(2, tokens, 8)
    table = ops.rope_cos_sin(tokens, 3, 2, 2, 4, 1e4, "cpu")
    slots = [p if p < sink else sink + (p - sink) % (capacity - sink) for p in range(chunk_start, chunk_start + tokens)]
    small = slots[0]  # the same slots by a start that fits the int32 cursor
    written = []
    for ring in (
        RingPosition(chunk_start, sink),
        RingPosition(small, sink),
        RingPosition(3, sink, torch.tensor([small], dtype=torch.int32)),
    ):
        caches = torch.full((2, 2, capacity, 2, 4), float("nan"))
        ops.k_norm_rope_kv_write(x, x, torch.ones(8), table, *caches, ring, 1e-6, backend=backend)
        assert torch.equal(caches[1][:, slots].flatten(-2), x)
        unwritten = [slot for slot in range(capacity) if slot not in slots]
        assert caches[:, :, unwritten].isnan().all() and not caches[:, :, slots].isnan().any()
        written.append(caches)
    for caches in written[1:]:
        torch.testing.assert_close(caches, written[0], rtol=0, atol=0, equal_nan=True)


def test_ring_refuses_a_sink_that_fills_it() -> None:
    for sink in (-1, 4, 5):
        with pytest.raises(ValueError, match=rf"sink: got {sink}, must be from 0 to capacity - 1 = 3"):
            KVRing(4, sink)
    with pytest.raises(ValueError, match="sink_frames is 18, must be < window_frames = 18"):
        small_config(sink_frames=18)


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity", 0), *((name, value) for name in ("capacity", "sink") for value in (-4, 4.0, True, None, "4"))],
    ids=str,
)
def test_ring_names_the_size_that_no_ring_has(name: str, value: object) -> None:
    sizes: dict[str, object] = {"capacity": 8, "sink": 1, name: value}
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got {value!r}, must be "):
        KVRing(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("num_layers", "batch", "heads", "head_dim", "window_frames") for value in (0, -1)),
        *(("grid", grid) for grid in ((0, -1), (0, 2), (-1, -2), (2,))),
        *(("sink_frames", frames) for frames in (-1, 5)),
    ],
    ids=str,
)
def test_a_cache_of_no_size_is_refused_by_name(name: str, value: object) -> None:
    layout = CacheLayout(1, 1, 2, 4, (2, 3), 5, 1, torch.float32, torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got "):
        dataclasses.replace(layout, **{name: value})


def test_cursor_and_int_positions_of_a_cache_are_the_same() -> None:
    layout = CacheLayout(1, 1, 2, 4, (2, 3), 5, 1, torch.float32, torch.device("cpu"))
    cache = KVCache(layout)
    for frame in range(0, 24, 3):
        plan = cache.ring.plan(frame * 6, 18)
        cache.ring.commit(plan)
        by_int, by_cursor = cache.position(plan), cache.device_position(plan)
        assert by_cursor.ring.cursor is not None and by_cursor.ring.cursor.dtype == torch.int32
        slots = by_int.ring.slots(18, 30, "cpu")
        assert torch.equal(by_cursor.ring.slots(18, 30, "cpu"), slots) and by_int.num_visible == by_cursor.num_visible
    assert cache.nbytes() == 2 * 30 * 8 * 4


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "gap": ({"start_frame": 15}, r"start: got token 90, which leaves a gap; must be 72 .* or 54"),
    "rewind": ({"start_frame": 6}, r"start: got token 36, which goes back; must be 72 .* or 54"),
    "inside the chunk": ({"start_frame": 10}, r"start: got token 60, which goes back"),
    "another length in place": ({"start_frame": 9, "frames": 2}, r"chunk: got 12 tokens, must be the 18 it began with"),
    "chunk too large": ({"start_frame": 12, "frames": 7}, r"chunk: got 42 tokens, must be at most .* 36"),
    "batch": ({"start_frame": 12, "batch": 2}, "batch: got 2, must be 1"),
    "grid": ({"start_frame": 12, "size": (4, 8)}, r"grid: got \(2, 4\), must be \(2, 3\)"),
}


@pytest.mark.parametrize("step_index", [0, -1])
@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_leaves_the_session_as_it_was(case: str, step_index: int) -> None:
    change, message = REFUSALS[case]
    model = make_model(small_config(window_frames=8, sink_frames=2))
    stage, state, inputs = CausalDenoisingStage(model), RealtimeCausalDiTState(), make_inputs(model.config, 5)
    for i in range(4):
        stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i))
    before, stats = ring_bits(state), state.stats()
    latents = torch.randn(change.get("batch", 1), 36, change.get("frames", 3), *change.get("size", (4, 6)))
    text = inputs.text.repeat(latents.shape[0], 1, 1)
    with pytest.raises(ValueError, match=message):
        model(
            latents, text, 500.0, state=state, start_frame=change["start_frame"], step_index=step_index,
            update_cache_only=step_index == -1,
        )  # fmt: skip
    assert same_ring(ring_bits(state), before) and state.stats() == stats

    untouched = RealtimeCausalDiTState()
    for i in range(4):
        stage.denoise_chunk(untouched, inputs.noise[i], **inputs.chunk(i))
    got = stage.denoise_chunk(state, inputs.noise[4], **inputs.chunk(4))
    assert torch.equal(got, stage.denoise_chunk(untouched, inputs.noise[4], **inputs.chunk(4)))


def test_a_refused_first_chunk_leaves_a_fresh_session_fresh() -> None:
    model = make_model(small_config(window_frames=5, sink_frames=3, frames_per_chunk=2))
    state = RealtimeCausalDiTState()
    with pytest.raises(ValueError, match=r"chunk: got 24 tokens, must be at most .* 12"):
        model(torch.randn(1, 36, 4, 4, 6), torch.randn(1, 5, 24), 1.0, state=state, start_frame=0)
    assert state.kv_cache is None and state.nbytes() == 0


MODEL_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tensor timestep": ({"timestep": torch.tensor(500.0)}, TypeError, "timestep: got Tensor .*Python float"),
    "nan timestep": ({"timestep": float("nan")}, TypeError, "timestep: got float nan"),
    "start_frame type": ({"start_frame": 1.5}, ValueError, "start_frame: got 1.5, must be an int of 0"),
    "start_frame bool": ({"start_frame": True}, ValueError, "start_frame: got True"),
    "start_frame": ({"start_frame": -1}, ValueError, "start_frame: got -1, must be an int of 0 or more"),
    "step_index": ({"step_index": -2}, ValueError, "step_index: got -2, must be an int of -1 or more"),
    "latents type": ({"latents": torch.zeros(1, 36, 3, 4, 6, dtype=torch.int64)}, TypeError, "latents: got torch.int"),
    "latents list": ({"latents": [1.0]}, TypeError, "latents: got list, must be a float tensor"),
    "latents dims": ({"latents": torch.zeros(36, 3, 4, 6)}, ValueError, r"latents: got shape \[36, 3, 4, 6\]"),
    "latents channels": ({"latents": torch.zeros(1, 16, 3, 4, 6)}, ValueError, r"latents: got .*\[B, 36, F, H, W\]"),
    "latents odd": ({"latents": torch.zeros(1, 36, 3, 5, 6)}, ValueError, "latents: got .*multiples of 1, 2, 2"),
    "latents empty": ({"latents": torch.zeros(1, 36, 0, 4, 6)}, ValueError, r"latents: got \[1, 36, 0, 4, 6\]"),
    "latents device": ({"latents": torch.zeros(1, 36, 3, 4, 6, device="meta")}, ValueError, "latents: got device meta"),
    "text device": ({"text": torch.zeros(1, 5, 24, device="meta")}, ValueError, "text: got device meta"),
    "text batch": ({"text": torch.zeros(2, 5, 24)}, ValueError, r"text: got \[2, 5, 24\], must be \[1, L <= 7, 24\]"),
    "text long": ({"text": torch.zeros(1, 8, 24)}, ValueError, r"text: got \[1, 8, 24\]"),
    "text width": ({"text": torch.zeros(1, 5, 23)}, ValueError, r"text: got \[1, 5, 23\]"),
    "text dims": ({"text": torch.zeros(5, 24)}, ValueError, r"text: got shape \[5, 24\]"),
    "camera shape": ({"camera": torch.zeros(1, 384, 3, 4, 4)}, ValueError, r"camera: got .*\[1, 384, 3, 4, 6\]"),
    "camera type": ({"camera": torch.zeros(1, 384, 3, 4, 6).int()}, TypeError, "camera: got torch.int32"),
}


@pytest.mark.parametrize("case", MODEL_ERRORS)
def test_bad_input_of_a_forward_is_named_and_leaves_the_session(case: str) -> None:
    change, error, message = MODEL_ERRORS[case]
    model = make_model()
    stage, state, inputs = CausalDenoisingStage(model), RealtimeCausalDiTState(), make_inputs(model.config, 1)
    stage.denoise_chunk(state, inputs.noise[0], **inputs.chunk(0))
    before, stats = ring_bits(state), state.stats()
    arguments: dict[str, Any] = {
        "latents": torch.zeros(1, 36, 3, 4, 6), "text": torch.zeros(1, 5, 24), "timestep": 500.0, "start_frame": 3,
        "camera": torch.zeros(1, 384, 3, 4, 6), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        model(arguments.pop("latents"), arguments.pop("text"), arguments.pop("timestep"), state=state, **arguments)
    assert same_ring(ring_bits(state), before) and state.stats() == stats


def test_a_model_without_camera_layers_refuses_a_camera() -> None:
    model = make_model(small_config(camera=False))
    with pytest.raises(ValueError, match=r"camera: got .*must be None: the model has no camera layers"):
        model(
            torch.zeros(1, 36, 3, 4, 6), torch.zeros(1, 5, 24), 1.0, state=RealtimeCausalDiTState(), start_frame=0,
            camera=torch.zeros(1, 384, 3, 4, 6),
        )  # fmt: skip
