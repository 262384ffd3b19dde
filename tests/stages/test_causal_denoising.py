"""The denoising loop: sources of a rollout, random numbers, split context updates, errors, and an endless rollout."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import make_inputs, make_model, ring_bits, same_bits, same_ring, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState
from lingbot_kernels.realtime.side_stream import check_stream, on_side_stream
from lingbot_kernels.stages.schedule import Schedule

CHUNKS = 4


@pytest.fixture(scope="module")
def stage() -> CausalDenoisingStage:
    return CausalDenoisingStage(make_model(small_config(window_frames=8, sink_frames=2)))


def chunk_by_chunk(stage: CausalDenoisingStage, start_frame: int | None = None) -> list[Tensor]:
    state, inputs = RealtimeCausalDiTState(), make_inputs(stage.model.config, CHUNKS)
    return [
        stage.denoise_chunk(state, noise, **inputs.chunk(i), start_frame=start_frame if i == 0 else None)
        for i, noise in enumerate(inputs.noise)
    ]


def as_tensor(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=2)


def as_list(parts: list[Tensor]) -> list[Tensor]:
    return parts


def as_callable(parts: list[Tensor]) -> Callable[[int], Tensor]:
    return lambda index: parts[index]


@pytest.mark.parametrize("form", [as_tensor, as_list, as_callable])
def test_rollout_takes_tensors_sequences_and_callables(stage: CausalDenoisingStage, form: Any) -> None:
    inputs = make_inputs(stage.model.config, CHUNKS)
    got = stage.rollout(
        RealtimeCausalDiTState(), CHUNKS, text=inputs.text, noise=form(inputs.noise), condition=form(inputs.condition),
        camera=form(inputs.camera), renoise=inputs.renoise,
    )  # fmt: skip
    for chunk, want in zip(got, chunk_by_chunk(stage), strict=True):
        assert same_bits(chunk, want)


def test_rollout_hands_out_each_chunk_at_once_and_asks_for_no_later_input(stage: CausalDenoisingStage) -> None:
    inputs, asked = make_inputs(stage.model.config, CHUNKS), []

    def camera(index: int) -> Tensor:
        asked.append(index)
        return inputs.camera[index]

    rollout = stage.rollout(RealtimeCausalDiTState(), CHUNKS, text=inputs.text, camera=camera)
    for index, _ in enumerate(rollout):
        assert asked == list(range(index + 1))


def test_each_chunk_may_have_its_own_text(stage: CausalDenoisingStage) -> None:
    inputs, texts = make_inputs(stage.model.config, 2), [torch.randn(1, 5, 24), torch.randn(1, 2, 24)]
    state = RealtimeCausalDiTState()
    want = [stage.denoise_chunk(state, inputs.noise[i], text=texts[i], renoise=inputs.renoise[i]) for i in range(2)]
    got = stage.rollout(RealtimeCausalDiTState(), 2, text=texts, noise=inputs.noise, renoise=inputs.renoise)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_the_generator_decides_every_random_number(stage: CausalDenoisingStage) -> None:
    text = torch.randn(1, 5, 24)

    def run(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(3)  # torch's own generator moves on meanwhile
        return list(stage.rollout(RealtimeCausalDiTState(), 2, text=text, latent_size=(4, 6), generator=generator))

    first, again, other = run(1), run(1), run(2)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same_bits(a, b) for a, b in zip(first, other, strict=True))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, 3, 4, 6, generator=generator)
    renoise = torch.randn(3, 1, 16, 3, 4, 6, generator=generator)
    assert same_bits(first[0], stage.denoise_chunk(RealtimeCausalDiTState(), noise, text=text, renoise=renoise))


def test_without_a_generator_torchs_own_is_used(stage: CausalDenoisingStage) -> None:
    text, noise = torch.randn(1, 5, 24), torch.randn(1, 16, 3, 4, 6)
    got = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        got.append(stage.denoise_chunk(RealtimeCausalDiTState(), noise, text=text))
    assert same_bits(got[0], got[1]) and not same_bits(got[0], got[2])


def test_a_later_context_update_leaves_what_an_immediate_one_leaves(stage: CausalDenoisingStage) -> None:
    inputs = make_inputs(stage.model.config, CHUNKS)
    at_once, later = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    for i, noise in enumerate(inputs.noise):
        want = stage.denoise_chunk(at_once, noise, **inputs.chunk(i))
        got = stage.denoise_chunk(later, noise, **inputs.chunk(i), update_context=False)
        assert same_bits(got, want) and not same_ring(ring_bits(later), ring_bits(at_once))
        kept = {name: value for name, value in inputs.chunk(i).items() if name != "renoise"}
        stage.update_context(later, got, **kept)
        assert same_ring(ring_bits(later), ring_bits(at_once))
    assert later.stats() == at_once.stats()


def test_rollout_leaves_the_context_update_to_the_caller_where_told(stage: CausalDenoisingStage) -> None:
    inputs, state = make_inputs(stage.model.config, CHUNKS), RealtimeCausalDiTState()
    rollout = stage.rollout(
        state, CHUNKS, text=inputs.text, noise=inputs.noise, condition=inputs.condition, camera=inputs.camera,
        renoise=inputs.renoise, update_context=False,
    )  # fmt: skip
    for i, (chunk, want) in enumerate(zip(rollout, chunk_by_chunk(stage), strict=True)):
        assert same_bits(chunk, want)
        stage.update_context(state, chunk, text=inputs.text, condition=inputs.condition[i], camera=inputs.camera[i])


def test_start_frame_counts_from_where_it_is_told(stage: CausalDenoisingStage) -> None:
    inputs, state = make_inputs(stage.model.config, CHUNKS), RealtimeCausalDiTState()
    assert (state.next_frame, state.chunk_start_frame) == (0, 0)
    rollout = stage.rollout(state, 2, text=inputs.text, noise=inputs.noise, renoise=inputs.renoise, start_frame=41)
    places = [(state.chunk_start_frame, state.next_frame) for _ in rollout]
    assert places == [(41, 44), (44, 47)]
    for chunk in stage.rollout(state, 1, text=inputs.text, noise=inputs.noise[2:], renoise=inputs.renoise[2:]):
        assert (state.chunk_start_frame, state.next_frame) == (47, 50)
        again = stage.denoise_chunk(
            state, inputs.noise[2], text=inputs.text, renoise=inputs.renoise[2], start_frame=47
        )  # the current chunk, once more
        assert same_bits(again, chunk) and state.next_frame == 50
    with pytest.raises(ValueError, match="leaves a gap"):
        stage.denoise_chunk(state, inputs.noise[3], text=inputs.text, start_frame=51)
    with pytest.raises(ValueError, match="goes back"):
        stage.denoise_chunk(state, inputs.noise[3], text=inputs.text, start_frame=44)


def test_no_condition_is_zeros(stage: CausalDenoisingStage) -> None:
    inputs = make_inputs(stage.model.config, 1)
    arguments = {"text": inputs.text, "renoise": inputs.renoise[0]}
    zeros = torch.zeros(1, 20, 3, 4, 6)
    want = stage.denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], condition=zeros, **arguments)
    assert same_bits(stage.denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], **arguments), want)


def test_observe_wraps_each_forward_in_order() -> None:
    seen: list[tuple[str, str, int]] = []

    @contextlib.contextmanager
    def observe(phase: str, index: int) -> Iterator[None]:
        seen.append(("enter", phase, index))
        yield
        seen.append(("leave", phase, index))

    stage = CausalDenoisingStage(make_model(), (1000, 500), observe=observe)
    inputs = make_inputs(stage.model.config, 1, steps=2)
    stage.denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], **inputs.chunk(0))
    events = [("denoise", 0), ("denoise", 1), ("context", -1)]
    assert seen == [(edge, *event) for event in events for edge in ("enter", "leave")]


class CountDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_an_endless_rollout_has_bounded_memory_and_constant_work() -> None:
    stage = CausalDenoisingStage(make_model(small_config(window_frames=8, sink_frames=2)))
    state, generator = RealtimeCausalDiTState(), torch.Generator().manual_seed(0)
    text, rows = torch.randn(1, 5, 24), torch.randn(1, 384, 3, 4, 6)
    rollout = stage.rollout(
        state, 40, text=text, latent_size=(4, 6), camera=lambda i: rows * (i + 1), generator=generator
    )
    sizes, work = [], []
    while True:
        with CountDispatch() as counted:
            chunk = next(rollout, None)
        if chunk is None:
            break
        assert chunk.isfinite().all()
        sizes.append(state.nbytes())
        work.append(counted.calls)
    assert len(sizes) == 40 and state.next_frame == 120
    assert set(sizes) == {sizes[0]}  # the ring is allocated whole at once
    assert all(counts == work[1] for counts in work[1:])
    assert all(stats["entries"] <= 5 for name, stats in state.stats().items() if name in state.runtime_cache)


CFG = small_config()
NOISE = torch.zeros(1, 16, 3, 4, 6)
TEXT = torch.zeros(1, 5, 24)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "noise dtype": ({"noise": NOISE.int()}, TypeError, "noise: got torch.int32, must be a float tensor"),
    "noise type": ({"noise": None}, TypeError, "noise: got NoneType, must be a float tensor"),
    "noise channels": ({"noise": NOISE[:, :8]}, ValueError, r"noise: got shape .*\[B, 16, F, H, W\]"),
    "noise dims": ({"noise": NOISE[0]}, ValueError, r"noise: got shape \[16, 3, 4, 6\]"),
    "renoise": ({"renoise": NOISE.expand(2, *NOISE.shape)}, ValueError, r"renoise: got shape \[2, .*be \[3, 1, 16"),
    "renoise device": (
        {"renoise": torch.zeros(3, *NOISE.shape, device="meta")}, ValueError, "renoise: got .*meta",
    ),
    "renoise type": ({"renoise": [NOISE] * 3}, TypeError, "renoise: got list, must be a float tensor"),
    "condition type": ({"condition": torch.zeros(1, 20, 3, 4, 6).int()}, TypeError, "condition: got torch.int32"),
    "condition": ({"condition": NOISE}, ValueError, r"condition: got shape .*must be \[1, 20, 3, 4, 6\]"),
    "condition device": (
        {"condition": torch.zeros(1, 20, 3, 4, 6, device="meta")}, ValueError, "condition: got .*meta",
    ),
    "text": ({"text": TEXT[:, :, :3]}, ValueError, r"text: got \[1, 5, 3\]"),
    "camera": ({"camera": NOISE}, ValueError, r"camera: got \[1, 16, 3, 4, 6\], must be \[1, 384, 3, 4, 6\]"),
    "chunk too long": (
        {"noise": torch.zeros(1, 16, 16, 4, 6)}, ValueError, r"chunk: got 96 tokens, must be at most .* 90",
    ),
    "start_frame": ({"start_frame": 7}, ValueError, "start: got token 42, which leaves a gap"),
    "context_stream": ({"context_stream": "side"}, TypeError, "context_stream: got str, must be a torch.Stream"),
    "context_stream unused": (
        {"context_stream": torch.Stream(device="cpu"), "update_context": False}, ValueError,
        "context_stream: got one, must be None with update_context=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named_and_leaves_the_session(stage: CausalDenoisingStage, case: str) -> None:
    change, error, message = ERRORS[case]
    stage = CausalDenoisingStage(make_model())
    state, inputs = RealtimeCausalDiTState(), make_inputs(CFG, 1)
    stage.denoise_chunk(state, inputs.noise[0], **inputs.chunk(0))
    before, stats = ring_bits(state), state.stats()
    arguments = {"noise": NOISE, "text": TEXT, **change}
    if "renoise" not in case:  # a stage with fewer steps needs fewer time embeddings, once it runs
        stage = CausalDenoisingStage(stage.model, (1000, 500))
    with pytest.raises(error, match=message):
        stage.denoise_chunk(state, arguments.pop("noise"), **arguments)
    assert same_ring(ring_bits(state), before) and state.stats() == stats
    assert state.runtime_cache["time_embeddings"].max_entries == 5


def test_update_context_needs_a_chunk(stage: CausalDenoisingStage) -> None:
    with pytest.raises(ValueError, match=r"state: got one without a current chunk; call denoise_chunk first"):
        stage.update_context(RealtimeCausalDiTState(), NOISE, text=TEXT)
    with pytest.raises(TypeError, match=r"chunk: got torch.int32, must be a float tensor"):
        stage.update_context(RealtimeCausalDiTState(), NOISE.int(), text=TEXT)


def test_the_time_embeddings_kept_follow_the_schedule(stage: CausalDenoisingStage) -> None:
    state, store = RealtimeCausalDiTState(), []
    for steps in (4, 2, 6):
        other = CausalDenoisingStage(stage.model, [1000 - 100 * step for step in range(steps)])
        other.denoise_chunk(state, NOISE, text=TEXT)
        kept = state.runtime_cache["time_embeddings"]
        store.append((kept.max_entries, kept.stats().entries))
    assert store == [(5, 5), (3, 3), (7, 7)]


def test_a_stream_of_the_cpu_changes_nothing(stage: CausalDenoisingStage) -> None:
    inputs, side = make_inputs(stage.model.config, CHUNKS), torch.Stream(device="cpu")
    state, later = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    rollout = stage.rollout(
        state, CHUNKS, text=inputs.text, noise=inputs.noise, condition=inputs.condition, camera=inputs.camera,
        renoise=inputs.renoise, context_stream=side,
    )  # fmt: skip
    for i, (chunk, want) in enumerate(zip(rollout, chunk_by_chunk(stage), strict=True)):
        assert same_bits(chunk, want)
        got = stage.denoise_chunk(later, inputs.noise[i], **inputs.chunk(i), update_context=False)
        given = {name: value for name, value in inputs.chunk(i).items() if name != "renoise"}
        stage.update_context(later, got, **given, stream=side)
        assert same_bits(got, want) and same_ring(ring_bits(later), ring_bits(state))
    assert state.context_update is None and later.stats() == state.stats()


class FakeStream:
    """Notes what is asked of it; on a build without CUDA the real class can't be made."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self, event: Any = None) -> Any:
        self.log.append(f"event on {self.name}")
        return FakeEvent(self.log)


class FakeEvent:
    device = FakeStream.device

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait(self, stream: FakeStream) -> None:
        self.log.append(f"{stream.name} waits for the event")

    def synchronize(self) -> None:
        self.log.append("the host waits for the event")


def test_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events and waits; tests/gpu shows what comes of it."""
    log: list[str] = []
    main, side, state = FakeStream("main", log), FakeStream("side", log), RealtimeCausalDiTState()
    current = [main]

    @contextlib.contextmanager
    def run_on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", run_on)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    state.wait_for_context()
    assert log == []
    for end in (state.wait_for_context, state.dispose):
        with on_side_stream(state, side):
            log.append(f"work on {current[-1].name}")
        end()
        end()
    assert log == [
        "side waits for main", "work on side", "event on side", "main waits for the event",
        "side waits for main", "work on side", "event on side", "the host waits for the event",
    ]  # fmt: skip

    del log[:]
    other = FakeStream("other", log)
    with on_side_stream(state, side):
        pass
    with pytest.raises(ZeroDivisionError), on_side_stream(state, other):
        raise ZeroDivisionError
    assert log == [
        "side waits for main", "event on side", "other waits for main", "other waits for the event", "event on other",
    ]  # fmt: skip
    assert state.context_update is not None
    with pytest.raises(ValueError, match=r"stream: got one of cuda:0, must be of the model's device, cpu"):
        check_stream("stream", side, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"stream: got one of cuda:0, must be of the model's device, cuda:1"):
        check_stream("stream", side, torch.device("cuda", 1))
    assert check_stream("stream", side, torch.device("cuda", 0)) is side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_noise_is_taken_at_its_value(stage: CausalDenoisingStage, dtype: torch.dtype) -> None:
    """The sampler works in float32 from it: the same bits as from the widened noise."""
    inputs = make_inputs(CFG, 1)
    noise, rest = inputs.noise[0].to(dtype), inputs.chunk(0)
    got = stage.denoise_chunk(RealtimeCausalDiTState(), noise, **rest)
    wide = stage.denoise_chunk(RealtimeCausalDiTState(), noise.float(), **rest)
    assert got.dtype == torch.float32 and torch.equal(got, wide)


ROLLOUT_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({}, "latent_size: got None, must be"),
    "short noise": ({"noise": NOISE}, "noise: got 3 frames, must hold 3 for chunk 1 as well"),
    "short list": ({"noise": [NOISE]}, "noise: got 1 .*chunk 1"),
    "short camera": (
        {"latent_size": (4, 6), "camera": torch.zeros(1, 384, 5, 4, 6)}, "camera: got 5 frames, must hold 3 for chunk 1"
    ),
    "text callable gives none": ({"latent_size": (4, 6), "text": lambda i: None}, "text: got None, must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROLLOUT_ERRORS)
def test_rollout_names_the_source_at_the_chunk_that_has_it(stage: CausalDenoisingStage, case: str) -> None:
    change, message = ROLLOUT_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        list(stage.rollout(RealtimeCausalDiTState(), 2, **{"text": TEXT, **change}))


# Schedules.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "linear"}, "schedule: got 'linear', must be 'continuous', 'official'"),
        ({"timesteps": ()}, "times: got none, must be one or more"),
        ({"timesteps": (1001,)}, "timesteps: got 1001, must be from 0 to 1000"),
        ({"timesteps": (1000, -1)}, "timesteps: got -1"),
        ({"timesteps": (0,), "schedule": "official"}, "timesteps: got 0, whose warped time is in no entry"),
        ({"shift": 0}, "shift: got 0, must be positive"),
        ({"sigmas": (0.5,)}, r"sigmas, noise_sigmas: got 1 and 0, must be 4 and 3 for 4 times"),
        ({"timesteps": (5.0,), "sigmas": (1.5,)}, "sigmas: got 1.5, must be finite and from 0 to 1"),
        ({"timesteps": (float("nan"),), "sigmas": (1.0,)}, "times: got nan"),
        ({"noise_sigmas": (0.1, 0.2, 0.3)}, "noise_sigmas: got them without sigmas, must come together"),
        (
            {"schedule": Schedule((900.0,), (0.9,), ()), "sigmas": (0.9,)},
            "sigmas: got them with a Schedule, which has its own; must be None",
        ),
        ({"schedule": Schedule((900.0,), (0.9,), ()), "noise_sigmas": ()}, "noise_sigmas: got them with a Schedule"),
    ],
)
def test_schedule_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalDenoisingStage(make_model(), **arguments)


def test_a_schedule_object_is_taken_as_it_is() -> None:
    schedule = Schedule((900.0, 300.0), (0.9, 0.3), (0.35,))
    assert CausalDenoisingStage(make_model(), schedule=schedule).schedule is schedule
