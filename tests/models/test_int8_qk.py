"""Self-attention with Q and K in int8: near the plain network, its ring, its memory, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cpu_graphs import graphs_on_cpu
from helpers import INT8_QK, make_inputs, make_model, ring_bits, same_bits, same_ring, small_config
from oracle import relative_error
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    Int8Recipe,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)
from lingbot_kernels.realtime.kv_cache import CacheLayout, Int8KeyValue, KVCache, ring_parts
from lingbot_kernels.realtime.memory import GIB, session_memory

BF16 = torch.bfloat16
ATTENTION = Int8Recipe(products=(), attention="int8_qk")
CONFIG = small_config(dim=128, num_heads=2, ffn_dim=192, window_frames=8, sink_frames=2)
STORED = ("kv_cache", "camera_modulation", "text", "time_embeddings", "rope")


def rollout(
    model: CausalLingBotTransformer, chunks: int = 5, state: RealtimeCausalDiTState | None = None, batch: int = 1
) -> list[Tensor]:
    stage, state = CausalDenoisingStage(model), state or RealtimeCausalDiTState()
    inputs = make_inputs(model.config, chunks, batch=batch)
    return [stage.denoise_chunk(state, noise, **inputs.chunk(i)) for i, noise in enumerate(inputs.noise)]


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_rollout_stays_near_the_plain_network(heads: int, backend: str) -> None:
    """Over chunks that evict: int8 Q and K cost little more than bfloat16 does, with either kind of products."""
    cfg = small_config(dim=128, num_heads=heads, ffn_dim=192, window_frames=8, sink_frames=2)
    exact = rollout(make_model(cfg))
    errors = {}
    with use_backend(backend):
        for recipe in (None, ATTENTION, Int8Recipe(), Int8Recipe(attention="int8_qk")):
            errors[recipe] = worst(rollout(make_model(cfg, BF16, recipe=recipe)), exact)
    plain, attention, products, both = errors.values()
    assert plain != attention < 1.25 * plain + 5e-4 and both < 1.25 * products + 5e-4, errors


def test_the_ring_is_what_attention_reads() -> None:
    model, state = make_model(CONFIG, BF16, recipe=INT8_QK), RealtimeCausalDiTState()
    rollout(model, 2, state, batch=2)
    assert state.kv_cache is not None and state.kv_cache.layout.k_dtype == torch.int8
    capacity = 8 * 6
    for layer in state.kv_cache.layers:
        assert isinstance(layer, Int8KeyValue)
        assert (layer.k.dtype, layer.k.shape) == (torch.int8, (2, capacity, 2, 64)) and layer.k.is_contiguous()
        assert (layer.k_scale.dtype, layer.k_scale.shape) == (torch.float32, (2, capacity, 2))
        assert layer.k_scale.transpose(1, 2).is_contiguous()
        assert (layer.v.dtype, layer.v.shape) == (BF16, layer.k.shape)
        seen = slice(0, 2 * 18)
        assert layer.k[:, seen].int().abs().amax(-1).eq(127).all() and (layer.k_scale[:, seen] > 0).all()
    assert state.kv_cache.nbytes() == 2 * 2 * capacity * 2 * (64 * 3 + 4)
    assert sum(x.nbytes for x in state.kv_cache.tensors()) == state.kv_cache.nbytes()


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_is_told_exactly(batch: int) -> None:
    model, state = make_model(CONFIG, BF16, recipe=INT8_QK), RealtimeCausalDiTState()
    rollout(model, 2, state, batch)
    stats = state.stats()
    plan = session_memory(CONFIG, (2, 3), BF16, batch=batch, recipe=model.recipe)
    assert {name: getattr(plan, name) for name in STORED} == {name: stats[name]["bytes"] for name in STORED}
    assert state.nbytes() == sum(stats[name]["bytes"] for name in STORED)


def test_the_14b_models_ring() -> None:
    cfg = LingBotConfig.preset("lingbot-world-14b")
    plain, int8 = (session_memory(cfg, (29, 52), BF16, recipe=r).kv_cache for r in (None, INT8_QK))
    assert plain / GIB == pytest.approx(20.7, abs=0.05) and int8 / GIB == pytest.approx(15.7, abs=0.05)


def test_graphs_and_their_cursor_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager, graphed = make_model(CONFIG, BF16, recipe=INT8_QK), RealtimeCausalDiTState(), RealtimeCausalDiTState()
    want = rollout(model, 6, eager)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs_on_cpu(monkeypatch)
    got = rollout(model, 6, graphed)
    assert graphed.graphs.replays > 4 and eager.graphs.replays == 0
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert same_ring(ring_bits(graphed), ring_bits(eager))


def test_a_saved_and_a_copied_session_go_on_with_the_same_bits(tmp_path: Path) -> None:
    model, state = make_model(CONFIG, BF16, recipe=INT8_QK), RealtimeCausalDiTState()
    stage, inputs = CausalDenoisingStage(model), make_inputs(CONFIG, 5)
    for i in range(3):
        stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i))
    state.save(tmp_path / "session")
    others = [RealtimeCausalDiTState.load(tmp_path / "session", model), copy.deepcopy(state)]
    for other in others:
        for name, part in ring_parts(other.kv_cache.layers[0]).items():  # type: ignore[union-attr]
            assert part.stride() == ring_parts(state.kv_cache.layers[0])[name].stride()  # type: ignore[union-attr]
    for i in (3, 4):
        want = stage.denoise_chunk(state, inputs.noise[i], **inputs.chunk(i))
        for other in others:
            assert same_bits(stage.denoise_chunk(other, inputs.noise[i], **inputs.chunk(i)), want)
    assert all(same_ring(ring_bits(other), ring_bits(state)) for other in others)


def test_a_saved_session_of_another_precision_is_refused(tmp_path: Path) -> None:
    model, state = make_model(CONFIG, BF16, recipe=INT8_QK), RealtimeCausalDiTState()
    rollout(model, 1, state)
    state.save(tmp_path)
    with pytest.raises(ValueError, match=r"recipe: got Int8Recipe.*attention='int8_qk'.*must be None"):
        RealtimeCausalDiTState.load(tmp_path, make_model(CONFIG, BF16))


def test_norms_with_hooks_are_refused_by_name() -> None:
    model = make_model(CONFIG, BF16, recipe=INT8_QK)
    model.blocks[1].self_attn.norm_k.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"self_attn.norm_q, norm_k: got RMSNorm, RMSNorm or hooks on them, must be"):
        rollout(model, 1)


def test_what_attention_does_is_visible() -> None:
    model = make_model(CONFIG, BF16, recipe=Int8Recipe(attention="int8_qk"))
    assert model.precision == "int8_qk" and model.int8_qk and "int8 Q and K" in repr(model)
    plain = make_model(CONFIG, BF16, recipe=Int8Recipe())
    assert plain.precision == "int8" and not plain.int8_qk and "int8 Q and K" not in repr(plain)


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    model = make_model(CONFIG, BF16, recipe=INT8_QK)
    model.save_pretrained(tmp_path)
    read = CausalLingBotTransformer.from_pretrained(tmp_path)
    assert read.recipe == INT8_QK and read.blocks[1].self_attn.int8_qk
    assert all(same_bits(a, b) for a, b in zip(rollout(read, 3), rollout(model, 3), strict=True))


def test_loading_into_it(tmp_path: Path) -> None:
    make_model(CONFIG, BF16).save_pretrained(tmp_path)
    read = CausalLingBotTransformer.from_pretrained(tmp_path, precision="int8_qk")
    want = make_model(CONFIG, BF16, recipe=Int8Recipe(attention="int8_qk"))
    assert read.precision == "int8_qk"
    assert all(same_bits(a, b) for a, b in zip(rollout(read, 3), rollout(want, 3), strict=True))


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float32, 128, "got attention='int8_qk' for torch.float32 and heads of 64, must be torch.bfloat16"),
        (torch.float16, 128, "for torch.float16 and heads of 64, must be torch.bfloat16 and heads of 64 or 128"),
        (BF16, 192, "for torch.bfloat16 and heads of 96, must be torch.bfloat16 and heads of 64 or 128"),
    ],
)
def test_networks_that_can_not_have_it(dtype: torch.dtype, dim: int, message: str) -> None:
    model = make_model(small_config(dim=dim), dtype)
    with pytest.raises(ValueError, match=message):
        model.quantize(INT8_QK)
    assert model.recipe is None and not model.int8_qk and model.precision == str(dtype).removeprefix("torch.")


def test_a_ring_of_another_dtype_is_refused() -> None:
    layout = CacheLayout(1, 1, 2, 64, (2, 3), 8, 2, BF16, torch.device("cpu"), torch.int8)
    other = CacheLayout(1, 1, 2, 64, (2, 3), 8, 2, BF16, torch.device("cpu"))
    assert layout.differences(other) == ["k_dtype: got None, must be torch.int8"]
    with pytest.raises(ValueError, match=r"k_dtype: got torch.int16, must be None or torch.int8"):
        CacheLayout(1, 1, 2, 64, (2, 3), 8, 2, BF16, torch.device("cpu"), torch.int16)


def test_a_ring_in_memory_of_its_own() -> None:
    """K, its scales as [B, heads, capacity], V, layer by layer: as ranks that share it ask for it."""
    layout = CacheLayout(2, 1, 2, 64, (2, 3), 8, 2, BF16, torch.device("cpu"), torch.int8)
    asked = []

    class Memory:
        def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            asked.append((shape, dtype))
            return torch.empty(shape, dtype=dtype)

        def nbytes(self) -> int:
            return 0

    cache = KVCache(layout, Memory())
    each = [((1, 48, 2, 64), torch.int8), ((1, 2, 48), torch.float32), ((1, 48, 2, 64), BF16)]
    assert asked == 2 * each and cache.nbytes() == KVCache(layout).nbytes()
    for own, plain in zip(cache.tensors_of_layers(), KVCache(layout).tensors_of_layers(), strict=True):
        assert (own.shape, own.stride(), own.dtype) == (plain.shape, plain.stride(), plain.dtype)
