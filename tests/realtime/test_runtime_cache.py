"""Stores: what is counted, what is kept, and that nothing stale is ever handed out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import NUMERICS, heads_for, make_inputs, make_model, ring_bits, same_bits, same_ring, small_config
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.realtime.runtime_cache import RuntimeCache, Store, TensorIdentity, tensor_bytes

SWITCHES = ("rope_cache", "time_cache", "camera_cache", "text_cache")


def counts(state: RealtimeCausalDiTState) -> dict[str, tuple[int, int]]:
    return {name: (store.hits, store.misses) for name, store in state.runtime_cache.stats().items()}


def since(state: RealtimeCausalDiTState, before: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name: (h - before[name][0], m - before[name][1]) for name, (h, m) in counts(state).items()}


def test_hits_and_misses_of_each_chunk() -> None:
    model = make_model()
    stage, state, inputs = CausalDenoisingStage(model), RealtimeCausalDiTState(), make_inputs(model.config, 8)
    for i, noise in enumerate(inputs.noise):
        before = counts(state)
        stage.denoise_chunk(state, noise, **inputs.chunk(i))
        assert since(state, before) == {
            "rope": (4, 1),
            "time_embeddings": (5, 0) if i else (0, 5),
            "camera_modulation": (4, 1),
            "text": (5, 0) if i else (4, 1),
        }
    stats = state.stats()
    assert {name: stats[name]["entries"] for name in counts(state)} == {
        "rope": 1, "time_embeddings": 5, "camera_modulation": 1, "text": 1,
    }  # fmt: skip
    cfg, tokens = model.config, 18
    ring = 2 * cfg.num_layers * cfg.window_frames * 6 * cfg.dim * 4
    assert stats["kv_cache"]["bytes"] == ring
    assert stats["rope"]["bytes"] == tokens * cfg.head_dim * 4
    assert stats["time_embeddings"]["bytes"] == 5 * (6 * cfg.num_layers + 2) * cfg.dim * 4
    assert stats["camera_modulation"]["bytes"] == 2 * cfg.num_layers * tokens * cfg.dim * 4
    assert stats["text"]["bytes"] == 2 * cfg.num_layers * cfg.text_len * cfg.dim * 4
    assert state.nbytes() == ring + sum(stats[name]["bytes"] for name in counts(state))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("off", [*SWITCHES, "all"])
def test_every_cache_off_gives_the_same_bits(off: str, numerics: str) -> None:
    dtype, residual, recipe = NUMERICS[numerics]
    cfg = small_config(window_frames=7, sink_frames=2, residual_dtype=residual, **heads_for(recipe))
    model = make_model(cfg, dtype, recipe=recipe)
    stage, inputs = CausalDenoisingStage(model), make_inputs(model.config, 4, batch=2)
    switches = dict.fromkeys(SWITCHES if off == "all" else (off,), False)
    with_caches, without = RealtimeCausalDiTState(), RealtimeCausalDiTState(**switches)
    for i, noise in enumerate(inputs.noise):
        want = stage.denoise_chunk(with_caches, noise, **inputs.chunk(i))
        assert same_bits(stage.denoise_chunk(without, noise, **inputs.chunk(i)), want)
    assert same_ring(ring_bits(without), ring_bits(with_caches))
    stores = dict(zip(SWITCHES, without.runtime_cache, strict=True))
    for switch, name in stores.items():
        store = without.runtime_cache[name]
        if switch in switches:
            assert (store.hits, store.misses, store.nbytes()) == (0, 20, 0)
        else:
            assert store.hits > 0


class Session:
    """One chunk after another; a fresh session tells what a stale entry would change."""

    def __init__(self, model: CausalLingBotTransformer, **stage: Any) -> None:
        self.model, self.stage, self.state = model, CausalDenoisingStage(model, **stage), RealtimeCausalDiTState()
        self.inputs = make_inputs(model.config, 4)

    def chunk(self, i: int, **changes: Any) -> Tensor:
        noise = changes.pop("noise", self.inputs.noise[i])
        return self.stage.denoise_chunk(self.state, noise, **{**self.inputs.chunk(i), **changes})


def replayed(session: Session, chunks: list[dict[str, Any]]) -> list[Tensor]:
    """The same chunks in a session whose every cache is off: what is right."""
    state = RealtimeCausalDiTState(**dict.fromkeys(SWITCHES, False))
    return [
        session.stage.denoise_chunk(state, session.inputs.noise[i], **{**session.inputs.chunk(i), **changes})
        for i, changes in enumerate(chunks)
    ]


def test_a_changed_schedule_misses_and_gives_what_the_new_one_gives() -> None:
    model = make_model()
    session = Session(model)
    session.chunk(0)
    session.stage = CausalDenoisingStage(model, timesteps=(1000, 821, 642, 321), shift=10.0)
    before = counts(session.state)
    got = session.chunk(1)
    # Step 0 is told 1000 by both, and the context update 0: exactly these two may be reused.
    assert since(session.state, before)["time_embeddings"] == (2, 3)
    off = RealtimeCausalDiTState(**dict.fromkeys(SWITCHES, False))
    CausalDenoisingStage(model).denoise_chunk(off, session.inputs.noise[0], **session.inputs.chunk(0))
    assert same_bits(got, session.stage.denoise_chunk(off, session.inputs.noise[1], **session.inputs.chunk(1)))


def test_more_steps_than_entries_keep_steps_plus_one() -> None:
    model = make_model()
    state, inputs = RealtimeCausalDiTState(time_entries=1), make_inputs(model.config, 2, steps=7)
    stage = CausalDenoisingStage(model, timesteps=(1000, 900, 800, 700, 600, 500, 400))
    for i in range(2):
        stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i))
    store = state.runtime_cache["time_embeddings"]
    assert (store.hits, store.misses, len(list(store.values()))) == (8, 8, 8)


def test_neighbouring_float_times_and_steps_never_share_an_entry() -> None:
    model = make_model()
    state, inputs = RealtimeCausalDiTState(), make_inputs(model.config, 1)
    latents = torch.cat([inputs.noise[0], inputs.condition[0]], 1)
    store = state.runtime_cache["time_embeddings"]
    for time, step, misses in [
        (833.0, 2, 1), (833.0, 2, 1), (833.0000000000001, 2, 2), (833.0, 1, 3), (0.0, 0, 4), (0.0, -1, 5), (0.0, 0, 5),
    ]:  # fmt: skip
        model(latents, inputs.text, time, state=state, start_frame=0, step_index=step)
        assert store.misses == misses


def overwrite(x: Tensor) -> Tensor:
    return x.mul_(-1.5).add_(0.25)


@pytest.mark.parametrize("name", ["camera", "text"])
@pytest.mark.parametrize("how", ["new tensor", "in place", "through a view", "resized storage", "set_", "data"])
def test_a_changed_camera_or_text_never_hits_a_stale_entry(name: str, how: str) -> None:
    session = Session(make_model())
    value = (session.inputs.camera[0] if name == "camera" else session.inputs.text).clone()
    changed = overwrite(value.clone())
    first = value.clone()
    store = "camera_modulation" if name == "camera" else "text"
    # The same chunk is denoised twice in place: only the argument differs, so the ring can't tell them apart.
    given = value
    session.chunk(0, **{name: given})
    if how == "new tensor":
        given = changed.clone()
    elif how == "in place":
        overwrite(given)
    elif how == "through a view":
        overwrite(given.view(-1)[:])
    elif how == "resized storage":
        given.resize_(given.numel() * 4).resize_(changed.shape).copy_(changed)
    elif how == "set_":
        given.set_(changed.clone())
    else:
        given.data = changed.clone()
    assert torch.equal(given, changed)
    before = counts(session.state)
    got = session.chunk(0, **{name: given}, start_frame=0)
    assert since(session.state, before)[store] == (4, 1)
    want = replayed(session, [{name: changed}])[0]
    assert same_bits(got, want) and not same_bits(got, replayed(session, [{name: first}])[0])


@pytest.mark.parametrize("name", ["camera", "text"])
def test_a_tensor_at_a_reused_address_never_hits(name: str) -> None:
    """The entry holds its tensor, so that the address can't come back while the entry lives; where a caller takes the
    storage itself back (as a pinned staging buffer does), the tensor object differs.
    """
    session = Session(make_model())
    shape = (session.inputs.camera[0] if name == "camera" else session.inputs.text).shape
    store = "camera_modulation" if name == "camera" else "text"
    generator = torch.Generator().manual_seed(5)
    address, seen = None, 0
    for _ in range(20):
        given = torch.randn(shape, generator=generator)
        seen += given.data_ptr() == address
        address = given.data_ptr()
        before = counts(session.state)
        got = session.chunk(0, **{name: given}, start_frame=0)
        assert since(session.state, before)[store] == (4, 1)
        assert same_bits(got, replayed(session, [{name: given}])[0])
        del given
    assert seen == 0

    buffer = torch.empty(torch.Size(shape).numel())
    for _ in range(2):
        given = buffer.view(shape)
        given.normal_(generator=generator)
        alias = torch.empty(0).set_(given.untyped_storage(), 0, shape)  # same address, its own version counter
        before = counts(session.state)
        got = session.chunk(0, **{name: alias}, start_frame=0)
        assert since(session.state, before)[store] == (4, 1)
        assert same_bits(got, replayed(session, [{name: given.clone()}])[0])


def test_inference_tensors_are_never_taken_for_unchanged() -> None:
    session = Session(make_model())
    with torch.inference_mode():
        camera, text = session.inputs.camera[0].clone(), session.inputs.text.clone()
        session.chunk(0, camera=camera, text=text)
        overwrite(camera)
        overwrite(text)
        got = session.chunk(0, camera=camera, text=text, start_frame=0)
    assert same_bits(got, replayed(session, [{"camera": camera.clone(), "text": text.clone()}])[0])
    key = TensorIdentity(camera)
    assert key != key and key != TensorIdentity(camera)


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)])
def test_a_session_goes_in_and_out_of_inference_mode(order: tuple[bool, ...]) -> None:
    model = make_model(small_config(window_frames=6, sink_frames=1))
    session, texts = Session(model), [torch.randn(1, 5, 24) for _ in order]
    want = replayed(session, [{"text": text} for text in texts])
    for i, inference in enumerate(order):
        with torch.inference_mode(inference):
            got = session.chunk(i, text=texts[i])
        assert same_bits(got, want[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, noise: (model, noise.repeat(2, 1, 1, 1, 1)), r"batch: got 2, must be 1"),
        (lambda model, noise: (model, noise.transpose(3, 4).contiguous()), r"grid: got \(3, 2\), must be \(2, 3\)"),
        (lambda model, noise: (model.to(torch.float64), noise), r"dtype: got torch.float64, must be torch.float32"),
        (lambda model, noise: (model.to("meta"), noise.to("meta")), r"device: got meta, must be cpu"),
    ],
    ids=["batch", "grid", "dtype", "device"],
)
def test_another_layout_is_refused_and_nothing_changes(change: Callable[..., Any], message: str) -> None:
    model = make_model()
    session = Session(model)
    session.chunk(0)
    before, ring, stored = counts(session.state), ring_bits(session.state), session.state.nbytes()
    model, noise = change(model, session.inputs.noise[1])
    text = session.inputs.text.to(noise.device).repeat(noise.shape[0], 1, 1)
    with pytest.raises(ValueError, match=message):
        CausalDenoisingStage(model).denoise_chunk(session.state, noise, text=text)
    assert (counts(session.state), session.state.nbytes(), session.state.next_frame) == (before, stored, 3)
    assert same_ring(ring_bits(session.state), ring)


def test_another_model_or_other_weights_are_refused() -> None:
    session = Session(make_model())
    session.chunk(0)
    ring = ring_bits(session.state)
    other = make_model(seed=1)
    noise, arguments = session.inputs.noise[1], session.inputs.chunk(1)
    with pytest.raises(ValueError, match="state: got one that another model"):
        CausalDenoisingStage(other).denoise_chunk(session.state, noise, **arguments)
    assert same_ring(ring_bits(session.state), ring) and session.state.next_frame == 3
    session.chunk(1)
    session.model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state: got one that another model"):
        session.chunk(2)
    session.state.dispose()
    got = session.chunk(0)
    assert same_bits(got, CausalDenoisingStage(other).denoise_chunk(
        RealtimeCausalDiTState(), session.inputs.noise[0], **session.inputs.chunk(0)
    ))  # fmt: skip


@pytest.mark.parametrize("numerics", ["float32", "bfloat16 in float32", "int8", "int8_qk"])
def test_two_interleaved_sessions_equal_each_alone(numerics: str) -> None:
    dtype, residual, recipe = NUMERICS[numerics]
    cfg = small_config(window_frames=7, sink_frames=2, residual_dtype=residual, **heads_for(recipe))
    model = make_model(cfg, dtype, recipe=recipe)
    stages = (CausalDenoisingStage(model), CausalDenoisingStage(model, schedule="official"))
    inputs = (make_inputs(model.config, 4, (4, 6), seed=1), make_inputs(model.config, 4, (2, 8), batch=2, seed=2))

    def run(which: int, state: RealtimeCausalDiTState, i: int) -> Tensor:
        return stages[which].denoise_chunk(state, inputs[which].noise[i], **inputs[which].chunk(i))

    alone = []
    for which in range(2):
        state = RealtimeCausalDiTState()
        alone.append([run(which, state, i) for i in range(4)])
    states = (RealtimeCausalDiTState(), RealtimeCausalDiTState())
    for i in range(4):
        for which in (0, 1) if i % 2 else (1, 0):
            assert same_bits(run(which, states[which], i), alone[which][i])


def test_dispose_frees_everything_twice_and_the_state_starts_again() -> None:
    session = Session(make_model())
    first = session.chunk(0).clone()
    session.chunk(1)
    assert session.state.kv_cache is not None and session.state.crossattn_cache is not None
    tensors: list[Tensor] = [x for layer in session.state.kv_cache.layers for x in layer]
    tensors += [x for layer in session.state.crossattn_cache.layers for x in layer]
    for name in ("rope", "time_embeddings", "camera_modulation"):
        for value in session.state.runtime_cache[name].values():
            found = getattr(value, "layers", value)
            tensors += [found] if isinstance(found, Tensor) else [
                x for item in found for x in (item if isinstance(item, tuple) else (item,))
            ]  # fmt: skip
    expected = session.state.nbytes()
    assert sum(x.numel() * x.element_size() for x in tensors) == expected
    camera = session.inputs.camera[1]
    references = [weakref.ref(x) for x in tensors] + [weakref.ref(camera)]
    session.inputs.camera[1] = torch.zeros_like(camera)
    del tensors, camera, value, found
    session.state.dispose()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert (session.state.nbytes(), session.state.next_frame, session.state.kv_cache) == (0, 0, None)
    session.state.dispose()
    assert same_bits(session.chunk(0), first)


def test_a_disposed_state_serves_another_model_and_grid() -> None:
    session = Session(make_model())
    session.chunk(0)
    session.state.dispose()
    other = make_model(small_config(num_layers=1), torch.bfloat16, seed=3)
    inputs = make_inputs(other.config, 1, (2, 2), batch=2)
    got = CausalDenoisingStage(other).denoise_chunk(session.state, inputs.noise[0], **inputs.chunk(0))
    fresh = RealtimeCausalDiTState()
    assert same_bits(got, CausalDenoisingStage(other).denoise_chunk(fresh, inputs.noise[0], **inputs.chunk(0)))


def test_the_prompt_is_replaced_and_self_attention_keeps_its_history() -> None:
    session = Session(make_model())
    session.chunk(0)
    assert session.state.kv_cache is not None
    layers = session.state.kv_cache.layers
    tokens = 18
    history = [x[:, :tokens].clone() for layer in layers for x in layer]
    session.chunk(1, text=torch.randn(1, 3, 24))
    assert session.state.kv_cache.layers is layers
    assert all(
        torch.equal(a, b[:, :tokens]) for a, b in zip(history, (x for layer in layers for x in layer), strict=True)
    )
    assert counts(session.state)["text"] == (8, 2)


# The stores on their own.


def test_store_evicts_the_least_recently_used_and_counts() -> None:
    store, made = Store(2), []

    def get(key: str) -> str:
        return store.get_or_compute(key, lambda: made.append(key) or key * 2)

    assert [get(key) for key in "abacab"] == ["aa", "bb", "aa", "cc", "aa", "bb"]
    assert made == ["a", "b", "c", "b"]
    assert (store.hits, store.misses, list(store.values())) == (2, 4, ["aa", "bb"])
    store.resize(1)
    assert list(store.values()) == ["bb"]
    store.clear()
    assert (store.hits, store.misses, list(store.values())) == (0, 0, [])


def test_store_keeps_nothing_where_computing_fails_or_it_is_off() -> None:
    store = Store(1)
    store.get_or_compute("old", lambda: 1)
    with pytest.raises(ZeroDivisionError):
        store.get_or_compute("new", lambda: 1 // 0)
    assert store.get_or_compute("new", lambda: 2) == 2 and store.stats().entries == 1
    off = Store(1, enabled=False)
    assert [off.get_or_compute("a", lambda: 1), off.get_or_compute("a", lambda: 2)] == [1, 2]
    assert (off.hits, off.misses, off.stats().entries) == (0, 2, 0)


def test_store_hands_the_evicted_value_to_refill_or_computes_anew() -> None:
    store = Store(1)
    first = store.get_or_compute("a", lambda: [1], lambda held: pytest.fail("nothing is evicted yet"))
    refilled = store.get_or_compute("b", lambda: [2], lambda held: [*held, 3] if held is first else None)
    assert refilled == [1, 3]
    assert store.get_or_compute("c", lambda: [4], lambda held: None) == [4]


def test_store_makes_room_before_it_computes() -> None:
    store, alive = Store(1), []

    def compute() -> Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        value = torch.zeros(3)
        references.append(weakref.ref(value))
        return value

    references: list[Any] = []
    for key in range(3):
        store.get_or_compute(key, compute)
    assert alive == [0, 0, 0]


def test_store_refuses_room_for_none() -> None:
    with pytest.raises(ValueError, match="max_entries: got 0, must be 1 or more"):
        Store(0)


def test_bytes_count_each_tensor_once_in_nested_values() -> None:
    x, y = torch.zeros(3), torch.zeros(5, dtype=torch.bfloat16)
    assert tensor_bytes([(x, y), {"again": x}, "text", None]) == 12 + 10
    cache = RuntimeCache(a=Store(1), b=Store(1))
    cache["a"].get_or_compute(0, lambda: x)
    cache["b"].get_or_compute(0, lambda: (y, x))
    assert cache.nbytes() == 12 + 22 and list(cache) == ["a", "b"]
    assert cache.stats()["b"].bytes == 22
