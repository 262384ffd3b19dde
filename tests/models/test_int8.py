"""A quantised model: near the one it was made of, the same bits whatever is cached or asked for, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import INT8, make_inputs, make_model, same_bits, small_config
from oracle import relative_error
from torch import Tensor, nn

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    Int8Recipe,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)
from lingbot_kernels.models.fused_linear import Int8FusedLinear
from lingbot_kernels.quantization import PRODUCTS, Int8Linear

WINDOW = {"window_frames": 8, "sink_frames": 2}


def rollout(
    model: CausalLingBotTransformer, chunks: int = 5, state: RealtimeCausalDiTState | None = None, **options: Any
) -> list[Tensor]:
    stage, state = CausalDenoisingStage(model), state or RealtimeCausalDiTState()
    inputs = make_inputs(model.config, chunks)
    return [stage.denoise_chunk(state, noise, **{**inputs.chunk(i), **options}) for i, noise in enumerate(inputs.noise)]


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_rollout_stays_near(dtype: torch.dtype, backend: str) -> None:
    cfg = LingBotConfig.preset("tiny", **WINDOW)
    exact, model = make_model(cfg), make_model(cfg, dtype, recipe=Int8Recipe())
    want = rollout(exact)
    with use_backend(backend):
        error = worst(rollout(model), want)
    assert 1e-4 < error < 0.02


def test_backends_agree_but_for_rare_steps_of_codes() -> None:
    cfg = LingBotConfig.preset("tiny", **WINDOW)
    exact, model = make_model(cfg), make_model(cfg, recipe=INT8)
    found = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            found.append(rollout(model, 3))
    assert 2 * worst(*found) < worst(found[0], rollout(exact, 3))


def test_unquantised_models_keep_their_bits() -> None:
    """Nothing of a model that is left as it is passes through the new layers."""
    model = make_model(small_config(**WINDOW), torch.bfloat16)
    assert model.recipe is None and model.precision == "bfloat16"
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_same_inputs_same_bits_and_sessions_start_again() -> None:
    model = make_model(small_config(**WINDOW), torch.bfloat16, recipe=INT8)
    state = RealtimeCausalDiTState()
    first = rollout(model, 4, state)
    state.dispose()
    assert all(same_bits(a, b) for a, b in zip(first, rollout(model, 4, state), strict=True))


def test_what_a_layer_does_is_visible() -> None:
    model = make_model(small_config(num_layers=3), recipe=Int8Recipe(leave_out=("blocks.1", "blocks.2.ffn_down")))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["blocks.0.self_attn.qkv"] is kinds["blocks.2.self_attn.qkv"] is Int8FusedLinear
    assert kinds["blocks.0.ffn.2"] is kinds["blocks.2.ffn.0"] is Int8Linear
    assert kinds["blocks.2.ffn.2"] is kinds["blocks.1.ffn.0"] is nn.Linear
    assert kinds["blocks.0.cam_scale_layer"] is kinds["blocks.0.cross_attn.k"] is nn.Linear
    assert "Int8FusedLinear(q‖k‖v, in_features=48, out_features=48, int8, rotated (seed 0))" in repr(model)
    assert model.precision == "int8"


def test_blocks_left_out_are_computed_as_before() -> None:
    """A model of which nothing is quantised in the end has the bits of the model as it was."""
    cfg = small_config(num_layers=2, **WINDOW)
    plain, none = make_model(cfg, torch.bfloat16), make_model(cfg, torch.bfloat16)
    none.quantize(Int8Recipe(products=()))
    assert all(same_bits(a, b) for a, b in zip(rollout(none, 3), rollout(plain, 3), strict=True))
    last = make_model(cfg, torch.bfloat16, recipe=Int8Recipe(leave_out=("blocks.0",)))
    first = make_model(cfg, torch.bfloat16, recipe=Int8Recipe(leave_out=("blocks.1",)))
    want = rollout(plain, 3)
    assert 0 < worst(rollout(last, 3), want) < 0.05 and 0 < worst(rollout(first, 3), want) < 0.05


def test_signs_and_rotation_are_what_they_are_for() -> None:
    """With one loud channel before the products, the rotated model is nearer."""
    errors = {}
    for rotate in (True, False):
        cfg = LingBotConfig.preset("tiny", **WINDOW)
        exact, model = make_model(cfg), make_model(cfg)
        with torch.no_grad():
            for one in (exact, model):
                for block in one.blocks:
                    block.modulation[0, (1, 4), 5] = 30.0
                    block.norm3.weight[5] = 30.0
        model.quantize(Int8Recipe(rotate=rotate))
        errors[rotate] = worst(rollout(model, 3), rollout(exact, 3))
    assert 1.3 * errors[True] < errors[False]


def test_the_bias_of_values_goes_through_attention_as_it_is() -> None:
    """Values whose bias is far from zero would fill the codes of attention's output: it is added after the product."""
    cfg = LingBotConfig.preset("tiny", **WINDOW)
    exact, model, bare = make_model(cfg), make_model(cfg), make_model(cfg)
    with torch.no_grad():
        for one in (exact, model):
            for block in one.blocks:
                block.self_attn.qkv.row_views()["v.bias"].fill_(20.0)
                block.cross_attn.v.bias.fill_(-20.0)
    model.quantize(Int8Recipe(products=("self_o", "cross_o")))
    bare.quantize(Int8Recipe(products=("self_o", "cross_o")))
    for block in model.blocks:
        assert not block.self_attn.qkv.row_views()["v.bias"].any() and not block.cross_attn.v.bias.any()
    cost = worst(rollout(bare, 3), rollout(make_model(cfg), 3))
    assert worst(rollout(model, 3), rollout(exact, 3)) <= 1.5 * cost


def test_a_prompt_switch_and_a_camera_go_with_it() -> None:
    model = make_model(small_config(**WINDOW), recipe=INT8)
    inputs = make_inputs(model.config, 4)
    other = make_inputs(model.config, 1, seed=9).text
    stage, state, fresh = (
        CausalDenoisingStage(model),
        RealtimeCausalDiTState(),
        RealtimeCausalDiTState(text_cache=False),
    )
    for i, noise in enumerate(inputs.noise):
        given = {**inputs.chunk(i, camera=i != 2), "text": inputs.text if i < 2 else other}
        assert same_bits(stage.denoise_chunk(state, noise, **given), stage.denoise_chunk(fresh, noise, **given))


def test_a_session_of_the_unquantised_model_is_refused() -> None:
    model, state = make_model(small_config(**WINDOW)), RealtimeCausalDiTState()
    rollout(model, 1, state)
    model.quantize()
    with pytest.raises(ValueError, match="state"):
        rollout(model, 1, state)
    state.dispose()
    rollout(model, 1, state)


def test_a_copy_and_a_cast_stay_quantised() -> None:
    model = make_model(small_config(**WINDOW), recipe=INT8)
    want = rollout(model, 2)
    assert all(same_bits(a, b) for a, b in zip(rollout(copy.deepcopy(model), 2), want, strict=True))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.blocks[0].self_attn.qkv.weight_scale.dtype == torch.float32
    assert worst(rollout(half, 2), want) < 0.05


def test_refusals_leave_the_model_as_it_was() -> None:
    model = make_model(small_config(camera=False))
    before = rollout(model, 1, camera=None)

    def still() -> bool:
        return model.recipe is None and same_bits(rollout(model, 1, camera=None)[0], before[0])

    for recipe, message in (
        (Int8Recipe(products=PRODUCTS), "the network has no camera layers"),
        (Int8Recipe(leave_out=("blocks.2",)), "got 'blocks.2', must name one of the network's 2 blocks"),
        (Int8Recipe(attention="int8_qk"), "got attention='int8_qk'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.quantize(recipe)
        assert still()
    with torch.no_grad():
        kept = model.blocks[1].ffn[0].weight[0, 0].clone()
        model.blocks[1].ffn[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.ffn.0.weight has a NaN or Inf"):
        model.quantize()
    with torch.no_grad():
        model.blocks[1].ffn[0].weight[0, 0] = kept
    assert still()
    own = model.blocks[0].self_attn.o
    model.blocks[0].self_attn.o = nn.Sequential(own)
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.o is Sequential, must be a linear layer: merge adapters"):
        model.quantize()
    model.blocks[0].self_attn.o = own
    model.quantize()
    with pytest.raises(ValueError, match="the weights are quantised already, by Int8Recipe"):
        model.quantize()


def test_state_dicts_of_codes_are_loaded_and_others_refused() -> None:
    cfg = small_config(**WINDOW)
    model, other = make_model(cfg, seed=1, recipe=INT8), make_model(cfg, recipe=INT8)
    plain = make_model(cfg).state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"blocks.0.self_attn.q.weight: got torch.float32, must be int8 codes"
    ) as error:
        model.load_state_dict(plain)
    assert "blocks.1.ffn.2.weight: got torch.float32" in str(error.value)
    quantized = [name for name, x in before.items() if x.dtype == torch.int8 or name.endswith("scale")]
    assert len(quantized) == 2 * 2 * (3 + 1 + 2 + 2 + 4)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in quantized)
    model.load_state_dict(other.state_dict())
    assert all(same_bits(a, b) for a, b in zip(rollout(model, 2), rollout(other, 2), strict=True))


def test_more_channels_than_a_sum_can_hold_are_refused() -> None:
    with torch.device("meta"):
        cfg = LingBotConfig(dim=48, num_heads=2, num_layers=1, ffn_dim=131072)
        model = CausalLingBotTransformer(cfg)
        with pytest.raises(ValueError, match=r"blocks.0.ffn.2 has 131072 input channels, must have at most 131071"):
            model.quantize()
    assert model.recipe is None and type(model.blocks[0].self_attn.o) is nn.Linear
