"""The context update: what it leaves in the caches, and what it does not run."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import INT8_QK, NUMERICS, Inputs, heads_for, make_inputs, make_model, ring_bits, same_ring, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "linear", "_addmm_activation", "mkldnn_linear")


class CountOps(TorchDispatchMode):
    """Counts dispatched ops by name, and keeps (rows, out features) of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in PRODUCTS:
            self.products.append((out.numel() // out.shape[-1], out.shape[-1]))
        return out


@functools.cache
def _inputs(cfg: LingBotConfig) -> Inputs:
    return make_inputs(cfg, 5, batch=2)


def forward(model: CausalLingBotTransformer, state: RealtimeCausalDiTState, chunk: int, **options: Any) -> Any:
    inputs = _inputs(model.config)
    latents = torch.cat([inputs.noise[chunk], inputs.condition[chunk]], 1)
    camera = inputs.camera[chunk]
    options = {"step_index": -1, "timestep": 0.0, **options}
    timestep = options.pop("timestep")
    return model(latents, inputs.text, timestep, state=state, start_frame=3 * chunk, camera=camera, **options)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_update_cache_only_leaves_the_bits_of_a_full_forward(numerics: str, backend: str) -> None:
    dtype, residual, recipe = NUMERICS[numerics]
    cfg = small_config(window_frames=8, sink_frames=1, residual_dtype=residual, **heads_for(recipe))
    model = make_model(cfg, dtype, recipe=recipe)
    full, only = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    with use_backend(backend):
        for chunk in range(5):
            for state in (full, only):
                forward(model, state, chunk, timestep=800.0, step_index=0)
            before = ring_bits(only)
            assert forward(model, full, chunk) is not None
            assert forward(model, only, chunk, update_cache_only=True) is None
            assert same_ring(ring_bits(full), ring_bits(only))
            changed = [not torch.equal(a, b) for a, b in zip(before, ring_bits(only), strict=True)]
            assert changed == [True] * (4 if recipe is not INT8_QK else 6)  # K, its scales and V of both layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_block_runs_k_and_v_only(dtype: torch.dtype) -> None:
    model = make_model(small_config(num_layers=3), dtype)
    state = RealtimeCausalDiTState()
    forward(model, state, 0)  # every cache is filled now
    rows, dim = 2 * 18, model.config.dim
    with torch.no_grad(), CountOps() as full:
        forward(model, state, 0)
    with torch.no_grad(), CountOps() as only:
        forward(model, state, 0, update_cache_only=True)
    block = [(rows, 3 * dim), (rows, dim), (rows, dim), (rows, dim), (rows, model.config.ffn_dim), (rows, dim)]
    patch, head = (rows, dim), (rows, 4 * model.config.out_channels)
    assert full.products == [patch, *block, *block, *block, head]
    assert only.products == [patch, *block, *block, (rows, 2 * dim)]
    assert (full.calls["windowed_attention"], only.calls["windowed_attention"]) == (6, 4)
    assert (full.calls["qk_norm_rope_kv_write"], full.calls["k_norm_rope_kv_write"]) == (3, 0)
    assert (only.calls["qk_norm_rope_kv_write"], only.calls["k_norm_rope_kv_write"]) == (2, 1)
    assert (full.calls["rms_norm"], only.calls["rms_norm"]) == (3, 2)  # cross-attention's queries


def test_a_warm_forward_runs_no_product_of_the_caches_and_a_cold_one_runs_them_all() -> None:
    model = make_model()
    state = RealtimeCausalDiTState()
    with torch.no_grad(), CountOps() as cold:
        forward(model, state, 0)
    with torch.no_grad(), CountOps() as warm:
        forward(model, state, 0)
    layers = model.config.num_layers
    shared = 3 + 2 + 2 * layers + 3 + 4 * layers  # time, text, text K and V, camera embedding, camera modulation
    assert len(cold.products) - len(warm.products) == shared
    assert cold.calls["rope_cos_sin"] == 1 and warm.calls["rope_cos_sin"] == 0


def test_the_stage_hands_the_context_update_the_clean_chunk() -> None:
    """The caches that a rollout leaves are those of one forward of its own output at t = 0, given on a fresh ring."""
    model = make_model(small_config(window_frames=18))
    inputs = make_inputs(model.config, 3)
    rollout, direct = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    stage = CausalDenoisingStage(model)
    for i in range(3):
        chunk = stage.denoise_chunk(rollout, inputs.noise[i], **inputs.chunk(i))
        model(
            torch.cat([chunk, inputs.condition[i]], 1), inputs.text, 0.0, state=direct, start_frame=3 * i,
            camera=inputs.camera[i], step_index=-1,
        )  # fmt: skip
        assert same_ring(ring_bits(rollout), ring_bits(direct))
