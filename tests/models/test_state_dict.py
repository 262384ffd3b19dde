"""Names, shapes and number of the parameters: those of the official checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers import make_inputs, make_model, same_bits, small_config

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState


def official_shapes(cfg: LingBotConfig) -> dict[str, tuple[int, ...]]:
    """Written down from the published description of the checkpoint."""
    d, f = cfg.dim, cfg.ffn_dim
    linears = {
        "text_embedding.0": (d, cfg.text_dim), "text_embedding.2": (d, d), "time_embedding.0": (d, cfg.freq_dim),
        "time_embedding.2": (d, d), "time_projection.1": (6 * d, d), "head.head": (64, d),
        "patch_embedding_wancamctrl": (d, 1536), "c2ws_hidden_states_layer1": (d, d),
        "c2ws_hidden_states_layer2": (d, d),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, d)}
    for n in range(cfg.num_layers):
        block = f"blocks.{n}."
        for attention in ("self_attn", "cross_attn"):
            linears.update({f"{block}{attention}.{name}": (d, d) for name in "qkvo"})
            shapes.update({f"{block}{attention}.norm_{name}.weight": (d,) for name in "qk"})
        linears.update({f"{block}ffn.0": (f, d), f"{block}ffn.2": (d, f)})
        for name in ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"):
            linears[block + name] = (d, d)
        shapes.update({f"{block}modulation": (1, 6, d), f"{block}norm3.weight": (d,), f"{block}norm3.bias": (d,)})
    for name, shape in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    shapes["patch_embedding.weight"], shapes["patch_embedding.bias"] = (d, 36, 1, 2, 2), (d,)
    return shapes


def is_camera(name: str) -> bool:
    return any(part in name for part in ("cam_", "wancamctrl", "c2ws"))


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("preset", ["lingbot-world-14b", "lingbot-world-1.3b", "tiny"])
def test_keys_and_shapes_are_the_official_ones(preset: str, camera: bool) -> None:
    cfg = LingBotConfig.preset(preset, camera=camera)
    model = CausalLingBotTransformer(cfg, device="meta", dtype=torch.bfloat16)
    got = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    want = official_shapes(cfg)
    assert got == {name: shape for name, shape in want.items() if camera or not is_camera(name)}
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(torch.Size(shape).numel() for shape in got.values()) == cfg.num_parameters()
    if camera and preset != "tiny":
        assert count == {"lingbot-world-14b": 18_544_332_864, "lingbot-world-1.3b": 1_709_502_016}[preset]


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_gives_the_same_model(assign: bool) -> None:
    source, inputs = make_model(seed=1), make_inputs(small_config(), 1)
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    if assign:
        with torch.device("meta"):
            target = CausalLingBotTransformer(small_config())
    else:
        target = make_model(seed=2)
    result = target.load_state_dict(weights, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert set(weights) == set(source.state_dict())  # the caller's dictionary is as it was
    loaded = target.state_dict()
    assert list(loaded) == list(source.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    got, want = (
        CausalDenoisingStage(model).denoise_chunk(RealtimeCausalDiTState(), inputs.noise[0], **inputs.chunk(0))
        for model in (target, source)
    )
    assert same_bits(got, want)


def test_the_fused_projection_is_shown_as_rows_of_one_weight() -> None:
    model = make_model()
    attention = model.blocks[0].self_attn
    shown = {name: model.state_dict()[f"blocks.0.self_attn.{name}.weight"] for name in "qkv"}
    storage = attention.qkv.weight.untyped_storage().data_ptr()
    assert {value.untyped_storage().data_ptr() for value in shown.values()} == {storage}
    shown["k"].zero_()
    d = model.config.dim
    assert not attention.qkv.weight[d : 2 * d].any() and attention.qkv.weight[:d].any()
    assert attention.qkv.weight.numel() == 3 * d * d


@pytest.mark.parametrize("part", ["self_attn.k.weight", "self_attn.v.bias", "ffn.0.weight"])
def test_missing_unexpected_and_wrongly_shaped_keys_are_named(part: str) -> None:
    model = make_model()
    name = f"blocks.1.{part}"
    weights = model.state_dict()
    value = weights.pop(name)
    with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{name}"):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*blocks\.1\.self_attn.qkv.weight"):
        model.load_state_dict({**weights, name: value, "blocks.1.self_attn.qkv.weight": value})
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict({**weights, name: torch.zeros(3)})
    assert torch.equal(model.state_dict()[name], value)


def test_submodules_have_state_dicts_of_their_own() -> None:
    model, other = make_model(seed=1), make_model(seed=2)
    weights = model.blocks[0].self_attn.state_dict()
    assert {name.split(".")[0] for name in weights} == {"q", "k", "v", "o", "norm_q", "norm_k"}
    other.blocks[0].self_attn.load_state_dict(weights)
    assert torch.equal(other.blocks[0].self_attn.qkv.weight, model.blocks[0].self_attn.qkv.weight)
