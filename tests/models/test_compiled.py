"""torch.compile of the model: its blocks, each as one graph, and the whole, with the bits of the eager model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def make_model(layers: int = 2, int8: bool = False) -> CausalLingBotTransformer:
    torch.manual_seed(0)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny", num_layers=layers, window_frames=9))
    if int8:
        model.quantize()
    return model


def run(model: CausalLingBotTransformer, chunks: int = 5, size: tuple[int, int] = (4, 6)) -> list[Tensor]:
    cfg, generator = model.config, torch.Generator().manual_seed(1)
    text = torch.randn(1, 9, cfg.text_dim, generator=generator)
    camera = torch.randn(1, cfg.camera_channels, chunks * cfg.frames_per_chunk, *size, generator=generator)
    stage = CausalDenoisingStage(model)
    state = RealtimeCausalDiTState()
    return list(stage.rollout(state, chunks, text=text, camera=camera, generator=generator, latent_size=size))


@pytest.mark.parametrize("int8", [False, True])
def test_compiled_blocks_share_their_graphs_and_leave_the_bits(int8: bool) -> None:
    compilations = []
    for layers in (2, 5):
        torch._dynamo.reset()
        model = make_model(layers, int8)
        want = run(model)
        counter = CompileCounterWithBackend("aot_eager")
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        assert all(torch.equal(a, b) for a, b in zip(run(model), want, strict=True))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] <= 6
    run(model, 9)
    assert counter.frame_count == compilations[1]  # a longer rollout has nothing new


def test_inductor_s_blocks_are_as_exact_as_float32_is() -> None:
    model = make_model()
    want = run(model)
    for block in model.blocks:
        block.compile(fullgraph=True)
    for a, b in zip(run(model), want, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_compiled_model_leaves_the_bits() -> None:
    """Its bookkeeping breaks the graph and compiles anew for each timestep: right, but blocks are the better way."""
    model = make_model(1)
    want = run(model, 1)
    model.compile(backend="aot_eager")
    assert torch.equal(run(model, 1)[0], want[0])
