"""The memory plan: exact for what a session keeps, an upper bound for what comes and goes, and asked before anything is
allocated.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_inputs, make_model, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.realtime import memory
from lingbot_kernels.realtime.memory import GIB, NotEnoughMemory, session_memory, weights_memory
from lingbot_kernels.realtime.runtime_cache import tensors_in

STORED = ("kv_cache", "camera_modulation", "text", "time_embeddings", "rope")
SWITCHES: list[dict[str, Any]] = [
    {}, {"rope_cache": False}, {"time_cache": False}, {"camera_cache": False}, {"text_cache": False},
    {"time_entries": 2},
]  # fmt: skip


def stored(state: RealtimeCausalDiTState) -> dict[str, int]:
    stats = state.stats()
    return {name: stats[name]["bytes"] for name in STORED}


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize(("batch", "frames", "camera"), [(1, 3, True), (2, 2, True), (1, 3, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_a_session_keeps_is_told_exactly(
    dtype: torch.dtype, batch: int, frames: int, camera: bool, switches: dict[str, Any]
) -> None:
    model = make_model(small_config(frames_per_chunk=frames, window_frames=9), dtype)
    steps = 4 if "time_entries" not in switches else 1
    stage = CausalDenoisingStage(model, (1000, 750, 500, 250)[:steps])
    state, inputs = RealtimeCausalDiTState(**switches), make_inputs(model.config, 2, batch=batch, steps=steps)
    assert {"time_entries": 5, **switches}.items() <= state.switches.items()
    for i in range(2):
        stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i, camera=camera))
    plan = session_memory(model.config, (2, 3), dtype, batch=batch, camera=camera, **state.switches)
    assert {name: getattr(plan, name) for name in STORED} == stored(state)
    assert sum(stored(state).values()) == state.nbytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("grid", grid) for grid in ((0, -1), (0, 4), (-2, -3), (2.5, 2), (4,), (4, 4, 4), 4, "44", None)),
        *((name, value) for name in ("batch", "frames", "ranks") for value in (0, -1, 1.5, True)),
        ("time_entries", -1),
    ],
    ids=str,
)
def test_sizes_that_no_session_has_are_refused_by_name(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"grid": (2, 3), name: value}
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got "):
        session_memory(small_config(), dtype=torch.float32, **arguments)


@pytest.mark.parametrize("preset", ["lingbot-world-1.3b", "lingbot-world-14b"])
def test_real_models_on_the_meta_device(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the blocks, which keep nothing, runs on tensors without memory."""
    cfg = LingBotConfig.preset(preset)
    model = CausalLingBotTransformer(cfg, device="meta", dtype=torch.bfloat16)
    parameters = {id(x): x for x in model.parameters()}.values()
    assert weights_memory(cfg, torch.bfloat16).total == sum(x.numel() * x.element_size() for x in parameters)
    monkeypatch.setattr(model, "_run", lambda inputs, *_: torch.empty(1, 16, 3, 58, 104, device="meta"))
    state, like = RealtimeCausalDiTState(), {"device": "meta", "dtype": torch.bfloat16}
    CausalDenoisingStage(model).denoise_chunk(
        state, torch.empty(1, 16, 3, 58, 104, **like), text=torch.empty(1, 512, 4096, **like),
        camera=torch.empty(1, 384, 3, 58, 104, **like),
    )  # fmt: skip
    plan = session_memory(cfg, (29, 52), torch.bfloat16)
    assert {name: getattr(plan, name) for name in STORED} == stored(state)
    if preset == "lingbot-world-14b":  # 60.0 GiB were allocated on an H100, of which 59.1 are weights and stores
        assert 59 < (weights_memory(cfg, torch.bfloat16).total + plan.total) / GIB < 61.5


def test_ranks_share_the_window_and_the_camera_and_each_has_the_text() -> None:
    cfg = LingBotConfig.preset("lingbot-world-14b")
    one, four = (session_memory(cfg, (29, 52), torch.bfloat16, ranks=ranks) for ranks in (1, 4))
    assert (four.kv_cache, four.camera_modulation, four.text) == (
        one.kv_cache // 4,
        one.camera_modulation // 4,
        one.text,
    )
    seven = session_memory(small_config(), (1, 5), torch.float32, ranks=2)  # 15 tokens: 8 and 7
    assert seven.rope == 8 * 24 * 4


class Live(TorchDispatchMode):
    """Bytes of the tensors that ops have made and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tensors_in([out]):
            storage = x.untyped_storage()
            if storage._cdata not in self.seen and not any(
                y.untyped_storage()._cdata == storage._cdata for y in tensors_in([args, kwargs or {}])
            ):
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("camera_cache", [True, False])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_a_forward_stays_below_the_plan_and_near_it(camera_cache: bool, residual: str) -> None:
    cfg = small_config(
        dim=192, num_heads=4, ffn_dim=512, window_frames=6, residual_dtype=residual, num_layers=3, text_dim=32
    )
    model, size = make_model(cfg, torch.bfloat16), (16, 24)
    inputs, state = make_inputs(cfg, 2, size), RealtimeCausalDiTState(camera_cache=camera_cache)
    stage = CausalDenoisingStage(model)
    peaks = []
    for i in range(2):
        gc.collect()
        with Live() as live:
            stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i))
        peaks.append(live.peak + 2 * inputs.camera[i].nbytes)  # which are there already
    plan = session_memory(cfg, (8, 12), torch.bfloat16, **state.switches)
    forward = plan.forward - memory.WORKSPACE
    assert 0.6 * forward < peaks[1] < forward
    assert peaks[0] < state.nbytes() + forward  # the first chunk makes what the session keeps


def poor(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


def test_a_session_that_can_not_fit_says_what_it_needs_and_nothing_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    stage, inputs, state = CausalDenoisingStage(model), make_inputs(model.config, 1), RealtimeCausalDiTState()
    need = session_memory(model.config, (2, 3), torch.float32, cuda_graphs=True)
    poor(monkeypatch, need.total - 1)
    made: list[object] = []
    monkeypatch.setattr("lingbot_kernels.realtime.causal_state.KVCache", lambda layout: made.append(layout))
    before = state.stats()
    with pytest.raises(
        NotEnoughMemory, match=r"^session: needs .* GiB on cpu \(kv_cache .*must be at most the"
    ) as error:
        stage.denoise_chunk(state, inputs.noise[0], **inputs.chunk(0))
    assert isinstance(error.value, MemoryError) and error.value.plan == need and error.value.free == need.total - 1
    for words in (*need.parts(), "camera_cache=False", "window_frames", "model.cuda_graphs = False"):
        assert words in str(error.value)
    assert made == [] and state.kv_cache is None and state.stats() == before

    monkeypatch.undo()
    poor(monkeypatch, need.total)
    stage.denoise_chunk(state, inputs.noise[0], **inputs.chunk(0))
    poor(monkeypatch, 0)  # a session that has begun has what it needs
    stage.update_context(state, inputs.noise[0], text=inputs.text)


def test_what_the_message_offers_to_save_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.cuda_graphs = False
    stage, inputs = CausalDenoisingStage(model), make_inputs(model.config, 1)
    need = session_memory(model.config, (2, 3), torch.float32, cuda_graphs=False, camera_cache=False)
    poor(monkeypatch, need.total)
    with pytest.raises(NotEnoughMemory):
        stage.denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], **inputs.chunk(0))
    stage.denoise_chunk(RealtimeCausalDiTState(camera_cache=False), inputs.noise[0], **inputs.chunk(0))
    no_camera = session_memory(model.config, (2, 3), torch.float32, cuda_graphs=False, camera=False)
    assert no_camera.total < need.total
    poor(monkeypatch, no_camera.total)
    stage.denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], **inputs.chunk(0, camera=False))


def test_a_bad_position_is_refused_before_memory_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    inputs = make_inputs(model.config, 1)
    poor(monkeypatch, 0)
    with pytest.raises(ValueError, match="chunk: got 96 tokens"):
        CausalDenoisingStage(model).denoise_chunk(
            RealtimeCausalDiTState(), torch.zeros(1, 16, 16, 4, 6), text=inputs.text
        )


def test_weights_that_can_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = small_config()
    model = make_model(cfg)
    model.save_pretrained(tmp_path)
    size = cfg.num_parameters() * 2
    poor(monkeypatch, size - 1)
    monkeypatch.setattr("lingbot_kernels.models.checkpoint.load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(NotEnoughMemory, match=r"weights: needs .* GiB on cpu \(weights"):
        CausalLingBotTransformer.from_pretrained(tmp_path)
    with pytest.raises(NotEnoughMemory, match="weights: needs"):
        CausalLingBotTransformer(cfg, dtype=torch.bfloat16)
    with pytest.raises(NotEnoughMemory, match="on meta"), torch.device("meta"):
        CausalLingBotTransformer(cfg, dtype=torch.bfloat16)
    monkeypatch.undo()
    poor(monkeypatch, size)
    assert CausalLingBotTransformer.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_where_nobody_can_tell_what_is_free_nothing_is_refused() -> None:
    assert memory.free_bytes(torch.device("cpu")) is None
    plan = memory.MemoryPlan(weights=10**18)
    assert memory.shortage("weights", plan, torch.device("cpu")) is None


def test_free_memory_is_the_device_s_and_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1100


def test_tensors_of_a_session_are_all_that_it_counts() -> None:
    model = make_model()
    state, inputs = RealtimeCausalDiTState(), make_inputs(model.config, 1)
    assert list(state.tensors()) == []
    CausalDenoisingStage(model).denoise_chunk(state, inputs.noise[0], **inputs.chunk(0))
    tensors: list[Tensor] = list({id(x): x for x in state.tensors()}.values())
    assert sum(x.numel() * x.element_size() for x in tensors) == state.nbytes()
