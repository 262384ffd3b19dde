"""On a GPU: a session saved goes on with the same bits, its graphs captured anew, and crosses to the CPU and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState

GRID = (16, 24)


def make_model(device: str = "cuda", graphs: bool = True) -> CausalLingBotTransformer:
    torch.manual_seed(1)
    config = LingBotConfig.preset("tiny", dim=256, num_heads=4, num_layers=2, window_frames=9)
    model = CausalLingBotTransformer(config, dtype=torch.bfloat16).to(device)
    model.cuda_graphs = graphs
    return model


def roll(model: Any, state: RealtimeCausalDiTState, first: int, last: int, **more: Any) -> Tensor:
    generator, chunks = torch.Generator(), []
    text = torch.randn(1, 9, model.config.text_dim, generator=generator.manual_seed(2)).to(model.device)
    for index in range(first, last):
        generator.manual_seed(10 + index)
        noise = torch.randn(1, 16, 3, *GRID, generator=generator).to(model.device)
        renoise = torch.randn(3, 1, 16, 3, *GRID, generator=generator).to(model.device)
        camera = torch.randn(1, 384, 3, *GRID, generator=generator).to(model.device)
        given = {"text": text, "renoise": renoise, "camera": camera}
        chunks.append(CausalDenoisingStage(model).denoise_chunk(state, noise, **given, **more))
    return torch.cat(chunks, dim=2)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("chunks", [1, 6])
def test_it_goes_on_with_the_same_bits(chunks, graphs, tmp_path):
    model, state = make_model(graphs=graphs), RealtimeCausalDiTState()
    roll(model, state, 0, chunks)
    state.save(tmp_path)
    copied, other = copy.deepcopy(state), make_model(graphs=graphs)
    resumed = RealtimeCausalDiTState.load(tmp_path, other)
    want = roll(model, state, chunks, chunks + 5)
    assert torch.equal(roll(other, resumed, chunks, chunks + 5), want)
    assert torch.equal(roll(model, copied, chunks, chunks + 5), want)
    assert (resumed.graphs.captures > 0) == graphs and (copied.graphs.captures > 0) == graphs


def test_a_context_update_on_a_side_stream_is_in_what_is_saved(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 5, context_stream=torch.cuda.Stream())
    state.save(tmp_path)
    resumed = RealtimeCausalDiTState.load(tmp_path, model)
    assert resumed.next_frame == 15
    assert torch.equal(roll(model, resumed, 5, 7), roll(model, state, 5, 7))


def test_keys_and_values_cross_to_the_cpu_and_back(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 5)
    state.save(tmp_path / "gpu")
    there = make_model("cpu")  # kept: a session can only be saved while its model exists
    on_cpu = RealtimeCausalDiTState.load(tmp_path / "gpu", there)
    assert on_cpu.kv_cache is not None and state.kv_cache is not None
    for held, saved in zip(on_cpu.kv_cache.layers, state.kv_cache.layers, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(held, saved, strict=True))
    on_cpu.save(tmp_path / "cpu")
    back = RealtimeCausalDiTState.load(tmp_path / "cpu", model)
    assert torch.equal(roll(model, back, 5, 7), roll(model, state, 5, 7))
