"""accelerate and restore on random, tiny `WanTransformer3DModel`s: what diffusers promises of its model still holds."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")

from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock  # noqa: E402
from wan_models import HEAD_DIM, HEADS, TEXT, error, inputs, make, run, to  # noqa: E402

from lingbot_kernels import Int8Recipe, RealtimeCausalDiTState, ops  # noqa: E402
from lingbot_kernels.integrations.diffusers import (  # noqa: E402
    FusedWanAttnProcessor,
    KVWindow,
    accelerate,
    is_accelerated,
    restore,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

VARIANTS: dict[str, dict[str, Any]] = {
    "wan": {},
    "no cross norm": {"cross_attn_norm": False},
    "one head of 64": {"num_attention_heads": 1, "attention_head_dim": 64},
    "image to video": {"image_dim": 10, "added_kv_proj_dim": HEADS * HEAD_DIM, "pos_embed_seq_len": None},
}


def variant_inputs(name: str) -> dict[str, Tensor]:
    values = inputs()
    if name == "image to video":
        values["encoder_hidden_states"] = torch.randn(2, 512, TEXT)
        values["encoder_hidden_states_image"] = torch.randn(2, 5, 10)
    return values


@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_agrees_with_diffusers_and_restore_brings_its_bits_back(name, fused_projections):
    model, values = make(**VARIANTS[name]), variant_inputs(name)
    if fused_projections:
        model.fuse_qkv_projections()
    plain = run(model, values)
    accelerate(model)
    assert is_accelerated(model)
    got = run(model, values)
    assert got.shape == plain.shape and got.dtype == plain.dtype
    assert error(got, plain) < 2e-6
    restore(model)
    assert not is_accelerated(model)
    assert torch.equal(run(model, values), plain)


@pytest.mark.parametrize("keep_float32", [True, False], ids=["from_pretrained", ".to"])
def test_bfloat16_error_is_within_1_25_of_diffusers_own(keep_float32, tmp_path):
    """Both against float64; with from_pretrained norms, tables and modulation stay float32, with .to nothing does."""
    model, values = make(num_attention_heads=4, attention_head_dim=32, ffn_dim=256), inputs(frames=5, size=(16, 16))
    model.save_pretrained(tmp_path)
    if keep_float32:
        half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    else:
        half = copy.deepcopy(model).to(torch.bfloat16)
    exact = type(model).from_pretrained(tmp_path)  # the oracle has the weights that bfloat16 has
    exact.load_state_dict({name: x.double() for name, x in half.state_dict().items()}, assign=True)
    exact = exact.double()
    oracle = run(exact, to(to(values, torch.bfloat16), torch.float64))
    plain = run(half, to(values, torch.bfloat16))
    accelerate(half)
    got = run(half, to(values, torch.bfloat16))
    assert got.dtype == plain.dtype == torch.bfloat16
    assert error(got, oracle) <= 1.25 * error(plain, oracle)


def test_the_fused_ops_are_what_runs(monkeypatch):
    """By count: a block's passes, and not one more."""
    counts: dict[str, int] = {}
    for name in ops.__all__:
        if name in ("RingPosition", "BackendUnavailable", "use_backend", "BACKENDS"):
            continue
        original = getattr(ops, name)

        def counted(*arguments, _name=name, _original=original, **named):
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*arguments, **named)

        monkeypatch.setattr(ops, name, counted)
    model = make()
    accelerate(model)
    run(model, inputs())
    run(model, inputs(seed=2))
    assert counts == {
        "rope_cos_sin": 1,  # kept for the second forward
        "layer_norm_modulate": 6, "qk_norm_rope_kv_write": 6, "windowed_attention": 12, "rms_norm": 12,
        "residual_norm_modulate": 12, "linear_gelu": 6, "gated_residual": 6,
    }  # fmt: skip


def test_determinism_and_batch_order():
    model, values = make(), inputs()
    accelerate(model)
    first = run(model, values)
    assert torch.equal(run(model, values), first)
    flipped = run(model, {name: x.flip(0) for name, x in values.items()})
    assert error(flipped.flip(0), first) < 1e-6


def test_outputs_as_object_and_tuple_agree():
    model, values = make(), inputs()
    accelerate(model)
    with torch.no_grad():
        assert torch.equal(model(**values).sample, model(**values, return_dict=False)[0])


def test_save_and_load_are_those_of_the_plain_model(tmp_path):
    model, values = make(), inputs()
    before = model.state_dict()
    model.save_pretrained(tmp_path / "plain")
    accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    model.save_pretrained(tmp_path / "accelerated")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "accelerated" / file.name).read_bytes()
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "accelerated").eval()
    assert type(loaded) is diffusers.WanTransformer3DModel and not is_accelerated(loaded)
    accelerate(loaded)
    assert torch.equal(run(loaded, values), run(model, values))
    other = make(seed=5)
    model.load_state_dict(other.state_dict())
    accelerate(other)
    assert torch.equal(run(model, values), run(other, values))


def test_a_copy_and_a_conversion_stay_accelerated():
    model, values = make(), inputs()
    accelerate(model)
    twin = copy.deepcopy(model)
    assert is_accelerated(twin) and torch.equal(run(twin, values), run(model, values))
    half = run(twin.to(torch.bfloat16), to(values, torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


def test_timesteps_per_token_keep_diffusers_modulation_with_fused_attention():
    model, values = make(), inputs()
    tokens = 3 * 4 * 6
    values["timestep"] = torch.randint(0, 1000, (2, tokens))
    plain = run(model, values)
    accelerate(model)
    assert error(run(model, values), plain) < 2e-6


def test_another_attention_backend_of_diffusers_is_honoured(monkeypatch):
    model, values = make(), inputs()
    accelerate(model)
    ours = run(model, values)
    model.set_attention_backend("native")
    monkeypatch.setattr(ops, "windowed_attention", None)
    assert error(run(model, values), ours) < 1e-6
    restore(model)
    assert all(p._attention_backend is not None for p in model.attn_processors.values())


def test_sizes_beyond_diffusers_table_are_served():
    model = make(rope_max_seq_len=8)
    accelerate(model)
    assert torch.isfinite(run(model, inputs(frames=12, size=(4, 20)))).all()


def test_the_whole_model_compiles_without_a_graph_break():
    model, values = make(num_layers=2), inputs()
    accelerate(model)
    eager = run(model, values)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(run(compiled, values), eager) < 1e-6
    larger = inputs(frames=4, size=(8, 8), seed=3)
    assert error(run(compiled, larger), run(model, larger)) < 1e-6
    torch.compiler.reset()


def test_block_caches_and_layerwise_casting_of_diffusers_work_as_before():
    """Installed after accelerate, on whole blocks or on plain layers."""
    from diffusers.hooks import FirstBlockCacheConfig

    outs = []
    for accelerated in (False, True):
        cached, cast = make(), make()
        if accelerated:
            accelerate(cached)
            accelerate(cast)
        cached.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with cached.cache_context("test"):
            outs += [run(cached, inputs()), run(cached, inputs(seed=2))]
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert cast.blocks[0].ffn.net[0].proj.weight.dtype == torch.float8_e4m3fn
        outs.append(run(cast, inputs()))
    assert all(error(ours, theirs) < 2e-6 for ours, theirs in zip(outs[3:], outs[:3], strict=True))


def test_lora_and_hooks_on_the_mlp_are_called():
    """The product is fused with its GELU only where it is a plain layer."""
    model, values = make(num_layers=1), inputs()
    before = run(model, values)
    accelerate(model)
    up = model.blocks[0].ffn.net[0].proj
    forward = up.forward
    up.forward = lambda x: forward(x) + 1
    assert error(run(model, values), before) > 1e-3


class Unknown(WanAttnProcessor):
    pass


def parallel(model: Any) -> None:
    model.blocks[1].attn1.processor._parallel_config = object()


def hooked(model: Any) -> None:
    norm = model.blocks[2].attn1.norm_q
    norm.forward = norm.forward


def other_theta(model: Any) -> None:
    model.rope.freqs_cos.mul_(0.5)


def exact_gelu(model: Any) -> None:
    model.blocks[0].ffn.net[0].approximate = "none"


UNSUPPORTED = [
    (lambda m: m.blocks[1].attn2.set_processor(Unknown()), TypeError, r"blocks.1.attn2.processor: got Unknown"),
    (parallel, ValueError, r"blocks.1.attn1: runs under context parallelism"),
    (hooked, ValueError, r"blocks.2.attn1.norm_q: has a hook or a patched forward"),
    (other_theta, ValueError, r"rope.freqs_cos: differs by"),
    (exact_gelu, ValueError, r"blocks.0.ffn.net.0: .* tanh form"),
    (lambda m: setattr(m.blocks[0].attn1, "norm_k", torch.nn.LayerNorm(24)), TypeError, "norm_k: got LayerNorm"),
    (lambda m: setattr(m.blocks[0], "norm3", torch.nn.Identity()), TypeError, "blocks.0.norm3: got Identity"),
]


@pytest.mark.parametrize(("change", "kind", "message"), UNSUPPORTED)
def test_what_is_unsupported_is_named_and_nothing_changes(change, kind, message):
    model = make()
    change(model)
    with pytest.raises(kind, match=message):
        accelerate(model)
    assert type(model) is diffusers.WanTransformer3DModel
    assert all(type(block) is WanTransformerBlock for block in model.blocks)
    assert not any(isinstance(p, FusedWanAttnProcessor) for p in model.attn_processors.values())


def test_other_models_and_repeated_calls_are_refused():
    with pytest.raises(TypeError, match="transformer: got Linear"):
        accelerate(torch.nn.Linear(2, 2))
    model = make(num_layers=1)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(model)
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)


def test_what_comes_later_is_refused_at_the_call():
    model, values = make(num_layers=1), inputs()
    accelerate(model)
    with pytest.raises(RuntimeError, match="no gradients"):
        model(**values)
    model.set_attn_processor(WanAttnProcessor())
    with pytest.raises(TypeError, match="set after accelerate"):
        run(model, values)
    restore(model)
    model(**values).sample.sum().backward()
    assert model.proj_out.weight.grad is not None


def test_a_state_needs_a_window_and_a_window_needs_a_state():
    model, values = make(num_layers=1), inputs()
    accelerate(model)
    with pytest.raises(ValueError, match="not given a kv_cache"):
        run(model, values, state=RealtimeCausalDiTState(), start_frame=0)
    with pytest.raises(ValueError, match="state: got None"):
        run(model, values, start_frame=0)
    with pytest.raises(ValueError, match="sink_frames: got 4"):
        KVWindow(4, 4)


def test_no_warning_is_raised_by_a_forward():
    model, values = make(num_layers=1), inputs()
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, values)


@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_stays_near_and_restore_brings_the_bits_back(name, fused_projections, dtype):
    model, values = make(**VARIANTS[name]).to(dtype), to(variant_inputs(name), dtype)
    if fused_projections:
        model.fuse_qkv_projections()
    plain, own = run(model, values), {key: value.clone() for key, value in model.state_dict().items()}
    accelerate(model, precision="int8")
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Int8Linear") == 3 * (6 if fused_projections else 8)
    got = run(model, values)
    assert got.dtype == plain.dtype and 1e-5 < error(got, plain) < 0.05
    assert torch.equal(run(model, values), got)
    restore(model)
    assert torch.equal(run(model, values), plain)
    back = model.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)


def test_int8_takes_a_recipe_and_refuses_what_it_can_not_replace():
    model = make()
    accelerate(model, precision=Int8Recipe(products=("ffn_up",), leave_out=("blocks.0",)))
    assert [type(block.ffn.net[0].proj).__name__ for block in model.blocks] == ["Linear", "Int8Linear", "Int8Linear"]
    restore(model)
    for recipe, message in (
        (Int8Recipe(products=("camera",)), "the network has no camera layers"),
        (Int8Recipe(attention="int8_qk"), "got attention='int8_qk'"),
        ("int4", "precision: got 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            accelerate(model, precision=recipe)
        assert not is_accelerated(model)
    model.blocks[1].attn1.to_v = torch.nn.Sequential(model.blocks[1].attn1.to_v)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_v: got Sequential, must be a plain linear layer"):
        accelerate(model, precision="int8")
    assert not is_accelerated(model)
