"""A text's padding as one key that counts for all of its rows: the same attention, other roundings, fewer keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_graphs import graphs_on_cpu
from helpers import make_inputs, make_model, same_bits, small_config
from oracle import relative_error
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, RealtimeCausalDiTState, use_backend

CONFIG = small_config(text_len=40, window_frames=8, sink_frames=2)


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(1, length, CONFIG.text_dim, generator=generator) for length in lengths]


def rollout(
    model: CausalLingBotTransformer, prompts: list[Tensor], weighted: bool, state: RealtimeCausalDiTState | None = None
) -> list[Tensor]:
    """A chunk for each prompt."""
    model.weighted_padding = weighted
    stage, state = CausalDenoisingStage(model), state or RealtimeCausalDiTState()
    inputs: Any = make_inputs(model.config, len(prompts))
    return [
        stage.denoise_chunk(state, noise, **{**inputs.chunk(i), "text": prompts[i]})
        for i, noise in enumerate(inputs.noise)
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_the_padded_form_in_float64(backend: str) -> None:
    """Prompts of one token, of all but one, and of changing lengths."""
    model, prompts = make_model(CONFIG, torch.float64), texts(1, 5, 39, 5)
    with use_backend(backend) if backend == "reference" else use_backend("auto"):
        for got, want in zip(rollout(model, prompts, True), rollout(model, prompts, False), strict=True):
            assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bfloat16_is_as_near_as_padded(backend: str) -> None:
    exact, prompts = rollout(make_model(CONFIG), texts(5, 5, 9), False), texts(5, 5, 9)
    model = make_model(CONFIG, torch.bfloat16)
    with use_backend(backend):
        for got, plain, truth in zip(rollout(model, prompts, True), rollout(model, prompts, False), exact, strict=True):
            assert relative_error(got, truth) <= 1.25 * relative_error(plain, truth)


def test_a_prompt_without_padding_keeps_its_bits() -> None:
    model, prompts = make_model(CONFIG, torch.bfloat16), texts(40, 40)
    assert all(map(same_bits, rollout(model, prompts, True), rollout(model, prompts, False)))


def test_off_by_default_and_what_is_kept() -> None:
    model, prompts = make_model(CONFIG, torch.bfloat16), texts(5)
    assert model.weighted_padding is False
    for weighted, keys in ((False, 40), (True, 6)):
        state = RealtimeCausalDiTState()
        rollout(model, prompts, weighted, state)
        assert state.crossattn_cache is not None
        assert {x.shape for pair in state.crossattn_cache.layers for x in pair} == {(1, keys, 2, 24)}


def test_it_may_be_set_between_forwards() -> None:
    """The text's keys are made anew, and back, with the bits that each form has."""
    model, prompts = make_model(CONFIG, torch.bfloat16), texts(5)
    first = {weighted: rollout(model, prompts, weighted)[0] for weighted in (False, True)}
    assert not same_bits(first[False], first[True])
    inputs: Any = make_inputs(model.config, 1)
    state, latents = RealtimeCausalDiTState(), torch.cat([inputs.noise[0], inputs.condition[0]], dim=1)
    flows = {}
    for weighted in (False, True, False, True):
        model.weighted_padding = weighted
        flow = model(latents, prompts[0], 900.0, state=state, start_frame=0, camera=inputs.camera[0])
        assert same_bits(flows.setdefault(weighted, flow), flow)
    assert not same_bits(flows[False], flows[True])


def test_graphs_follow_the_length_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of another length warms up and is captured anew; one of the same length goes on with the graphs."""
    model, prompts = make_model(CONFIG, torch.bfloat16), texts(5, 5, 5, 9, 9, 9, 5, 7)
    prompts[5] = texts(9)[0]
    want = rollout(model, prompts, True)
    graphs_on_cpu(monkeypatch)
    state, model.weighted_padding = RealtimeCausalDiTState(), True
    stage, inputs = CausalDenoisingStage(model), make_inputs(CONFIG, len(prompts))
    captures = []
    for i, noise in enumerate(inputs.noise):
        chunk = stage.denoise_chunk(state, noise, **{**inputs.chunk(i), "text": prompts[i]})
        assert same_bits(chunk, want[i])
        captures.append(state.graphs.captures)
    assert captures == [0, 0, 1, 2, 3, 3, 5, 6]
