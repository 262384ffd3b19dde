"""The model on the GPU: parity with float64, CUDA graphs, and nothing read back to the host inside a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import relative_error
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)

GRID = (16, 24)


def make_model(dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> CausalLingBotTransformer:
    torch.manual_seed(1)
    config = LingBotConfig.preset("tiny", **{"dim": 256, "num_heads": 4, "num_layers": 2, **overrides})
    return CausalLingBotTransformer(config, device="cuda", dtype=dtype)


def run(
    model: CausalLingBotTransformer,
    chunks: int,
    state: RealtimeCausalDiTState | None = None,
    grid: tuple[int, int] = GRID,
) -> list[Tensor]:
    config = model.config
    generator = torch.Generator("cuda").manual_seed(2)
    frames = chunks * config.frames_per_chunk
    text = torch.randn(1, 9, config.text_dim, device="cuda", generator=generator)
    camera = torch.randn(1, 384, frames, *grid, device="cuda", generator=generator)
    stage = CausalDenoisingStage(model)
    state = state or RealtimeCausalDiTState()
    return list(stage.rollout(state, chunks, text=text, camera=camera, generator=generator, latent_size=grid))


def test_graphs_leave_the_bits() -> None:
    model = make_model()
    replayed = RealtimeCausalDiTState()
    with_graphs = run(model, 12, replayed)
    model.cuda_graphs = False
    eager = run(model, 12)
    assert all(torch.equal(a, b) for a, b in zip(with_graphs, eager, strict=True))
    assert replayed.graphs.captures == 2
    assert replayed.graphs.replays >= 5 * 6 - 2


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_compiled_blocks_within_graphs() -> None:
    model, exact, replayed = make_model(), make_model(dtype=torch.float64), RealtimeCausalDiTState()
    exact.load_state_dict(model.state_dict())
    with use_backend("reference"):
        plain, truth = run(model, 12), run(exact, 12)
    for block in model.blocks:
        block.compile(fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=32):
        got = run(model, 12, replayed)
    assert replayed.graphs.captures == 2 and replayed.graphs.replays >= 5 * 6 - 2
    for a, b, c in zip(got, plain, truth, strict=True):
        assert relative_error(a, c) <= 1.25 * relative_error(b, c)


def test_a_reused_state_and_interleaved_sessions() -> None:
    model = make_model()
    alone = run(model, 10)
    state = RealtimeCausalDiTState()
    run(model, 9, state)
    state.dispose()
    assert all(torch.equal(a, b) for a, b in zip(alone, run(model, 10, state), strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_parity_with_float64(backend: str) -> None:
    """2 layers of the 14B model's width in bfloat16, 8 chunks with eviction."""
    overrides = {"dim": 5120, "num_heads": 40, "num_layers": 2, "ffn_dim": 13824, "window_frames": 12}
    model = make_model(**overrides)
    exact = make_model(dtype=torch.float64, **overrides)
    exact.load_state_dict(model.state_dict())
    grid = (8, 12)
    with use_backend(backend):
        got = run(model, 8, grid=grid)
    with use_backend("reference"):
        plain = run(model, 8, grid=grid)
        truth = run(exact, 8, grid=grid)
    for i, (a, b, c) in enumerate(zip(got, plain, truth, strict=True)):
        error, plain_error = relative_error(a, c), relative_error(b, c)
        assert error <= 1.25 * plain_error, f"chunk {i}: {error:.3e} against {plain_error:.3e} of the plain formulation"


def test_update_cache_only_leaves_what_a_full_forward_leaves() -> None:
    model = make_model(dim=1536, num_heads=12, ffn_dim=8960)
    config = model.config
    latents = torch.randn(1, config.in_channels, 3, 58, 104, device="cuda")
    text = torch.randn(1, 4, config.text_dim, device="cuda")
    caches = []
    for only in (True, False):
        state = RealtimeCausalDiTState()
        model(latents, text, 0.0, state=state, start_frame=0, step_index=-1, update_cache_only=only)
        assert state.kv_cache is not None
        visible = state.kv_cache.ring.num_visible
        caches.append([x[:, :visible].clone() for layer in state.kv_cache.layers for x in layer])
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("off", ["rope_cache", "time_cache", "camera_cache", "text_cache"])
def test_caches_leave_the_bits(off: str, graphs: bool) -> None:
    model = make_model()
    model.cuda_graphs = graphs
    kept = run(model, 9)
    state = RealtimeCausalDiTState(**{off: False})
    assert all(torch.equal(a, b) for a, b in zip(kept, run(model, 9, state), strict=True))
    # Without the camera's or the text's buffers there is nothing for a graph to read; the other two are copied in.
    assert state.graphs.captures == (2 if graphs and off in ("rope_cache", "time_cache") else 0)


def test_interleaved_sessions_equal_each_alone() -> None:
    """Both replay graphs of their own, in turns."""
    model = make_model()
    stage, config = CausalDenoisingStage(model), model.config

    def rollout(seed: int) -> Any:
        generator = torch.Generator("cuda").manual_seed(seed)
        text = torch.randn(1, 9, config.text_dim, device="cuda", generator=generator)
        camera = torch.randn(1, 384, 30, *GRID, device="cuda", generator=generator)
        return stage.rollout(
            RealtimeCausalDiTState(), 10, text=text, camera=camera, generator=generator, latent_size=GRID
        )

    alone = [list(rollout(seed)) for seed in (1, 2)]
    for i, pair in enumerate(zip(rollout(1), rollout(2), strict=True)):
        assert all(torch.equal(chunk, alone[which][i]) for which, chunk in enumerate(pair))


@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_is_read_back_inside_a_chunk(graphs: bool) -> None:
    model = make_model()
    model.cuda_graphs = graphs
    state = RealtimeCausalDiTState()
    run(model, 9, state)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as p:
        run(model, 2, state)
        torch.cuda.synchronize()
    names = [event.name for event in p.events()]
    assert any("Memcpy DtoD" in name or "kernel" in name.lower() or "graph" in name.lower() for name in names)
    assert not [name for name in names if "DtoH" in name]
    torch.cuda.set_sync_debug_mode("error")  # torch then raises wherever it would wait for the device
    try:
        run(model, 2, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture_of_the_op_follows_the_ring() -> None:
    """One captured graph with a device cursor writes the right slots at every position, wraps included."""
    from lingbot_kernels import RingPosition, ops, reference

    heads, head_dim, tokens, capacity, sink = 4, 64, 6, 20, 4
    q, k, v = torch.randn(1, tokens, 3 * heads * head_dim, device="cuda").bfloat16().chunk(3, -1)
    weight = torch.randn(heads * head_dim, device="cuda").bfloat16()
    table = ops.rope_cos_sin(tokens, 0, 6, 3, head_dim, 10000.0, "cuda")
    caches = [torch.zeros(1, capacity, heads, head_dim, device="cuda").bfloat16() for _ in range(4)]
    cursor = torch.zeros(1, dtype=torch.int32, device="cuda")
    arguments = (q, k, v, weight, weight, table, caches[0], caches[1], RingPosition(0, sink, cursor), 1e-6)
    ops.qk_norm_rope_kv_write(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.qk_norm_rope_kv_write(*arguments)
    for start in range(0, 60, 5):
        for cache in caches:
            cache.zero_()
        cursor.fill_(start)
        graph.replay()
        reference.qk_norm_rope_kv_write(
            q, k, v, weight, weight, table, caches[2], caches[3], RingPosition(start, sink), 1e-6
        )
        assert torch.equal(caches[1], caches[3])
        assert torch.equal(caches[0] == 0, caches[2] == 0)
