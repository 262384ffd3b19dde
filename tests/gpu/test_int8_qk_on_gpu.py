"""Self-attention with Q and K in int8 on the GPU: graphs, caches, side stream and backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import relative_error
from test_model import GRID, run

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    Int8Recipe,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)

pytestmark = pytest.mark.gpu

INT8_QK = Int8Recipe(attention="int8_qk")


@pytest.fixture(params=[64, 128])
def head_dim(request: pytest.FixtureRequest) -> int:
    return request.param


def make_model(head_dim: int, recipe: Int8Recipe | None = INT8_QK, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(1)
    cfg = LingBotConfig.preset("tiny", dim=256, num_heads=256 // head_dim, num_layers=2)
    model = CausalLingBotTransformer(cfg, device="cuda", dtype=dtype)
    if recipe is not None:
        model.quantize(recipe)
    return model


def rings(state: RealtimeCausalDiTState) -> list[torch.Tensor]:
    assert state.kv_cache is not None
    return [x.clone() for layer in state.kv_cache.layers for x in layer]


def test_graphs_and_their_cursor_leave_the_bits(head_dim: int) -> None:
    model, replayed, eager = make_model(head_dim), RealtimeCausalDiTState(), RealtimeCausalDiTState()
    with_graphs = run(model, 12, replayed)
    model.cuda_graphs = False
    without = run(model, 12, eager)
    assert all(torch.equal(a, b) for a, b in zip(with_graphs, without, strict=True))
    assert replayed.graphs.captures == 2 and replayed.graphs.replays >= 5 * 6 - 2
    assert all(torch.equal(a, b) for a, b in zip(rings(replayed), rings(eager), strict=True))


@pytest.mark.parametrize("off", ["rope_cache", "time_cache", "camera_cache", "text_cache"])
def test_caches_leave_the_bits(off: str) -> None:
    model = make_model(64)
    want = run(model, 8)
    got = run(model, 8, RealtimeCausalDiTState(**{off: False}))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_side_stream_leaves_the_bits() -> None:
    model, want = make_model(128), None
    for stream in (None, torch.cuda.Stream()):
        generator = torch.Generator("cuda").manual_seed(2)
        frames = 10 * model.config.frames_per_chunk
        text = torch.randn(1, 9, model.config.text_dim, device="cuda", generator=generator)
        camera = torch.randn(1, 384, frames, *GRID, device="cuda", generator=generator)
        chunks = list(
            CausalDenoisingStage(model).rollout(
                RealtimeCausalDiTState(), 10, text=text, camera=camera, generator=generator, latent_size=GRID,
                context_stream=stream,
            )
        )  # fmt: skip
        torch.cuda.synchronize()
        assert want is None or all(torch.equal(a, b) for a, b in zip(chunks, want, strict=True))
        want = chunks


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_a_rollout_is_as_near_as_the_plain_formulation(head_dim: int, backend: str) -> None:
    exact, model = make_model(head_dim, None, torch.float64), make_model(head_dim)
    with use_backend("reference"):
        want, plain = run(exact, 7), run(model, 7)
    with use_backend(backend):
        got = run(model, 7)
    for a, b, truth in zip(got, plain, want, strict=True):
        assert relative_error(a, truth) <= 1.25 * relative_error(b, truth)


def test_the_ring_takes_three_quarters_of_the_memory() -> None:
    held = {}
    for recipe in (INT8_QK, Int8Recipe()):
        state = RealtimeCausalDiTState()
        run(make_model(128, recipe), 2, state)
        held[recipe.attention] = state.stats()["kv_cache"]["bytes"]
    assert held["int8_qk"] == held["bfloat16"] * (3 + 4 / 128) / 4
