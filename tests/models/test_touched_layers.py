"""Layers with hooks, of a subclass or replaced run by their own forward; adapters of PEFT; autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lingbot_kernels import CausalLingBotTransformer, Int8Recipe, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.parallel.sequence_shard import SequenceShard

GENERATOR = torch.Generator().manual_seed(1)
LATENTS = torch.randn(1, 36, 3, 8, 12, generator=GENERATOR)
TEXT = torch.randn(1, 16, 64, generator=GENERATOR)
CAMERA = torch.randn(1, 384, 3, 8, 12, generator=GENERATOR)

CALLED = [
    "patch_embedding", "patch_embedding_wancamctrl", "text_embedding", "text_embedding.0", "text_embedding.1",
    "text_embedding.2", "time_embedding", "time_embedding.0", "time_embedding.1", "time_embedding.2", "time_projection",
    "time_projection.0", "time_projection.1", "c2ws_hidden_states_layer1", "blocks.0", "blocks.0.self_attn",
    "blocks.0.self_attn.qkv", "blocks.0.self_attn.norm_q", "blocks.0.self_attn.norm_k", "blocks.0.self_attn.o",
    "blocks.0.norm3", "blocks.0.cross_attn", "blocks.0.cross_attn.q", "blocks.0.cross_attn.k",
    "blocks.0.cross_attn.norm_q", "blocks.0.cross_attn.norm_k", "blocks.0.ffn", "blocks.0.ffn.0", "blocks.0.ffn.1",
    "blocks.0.ffn.2", "blocks.0.cam_injector_layer1", "blocks.0.cam_scale_layer", "blocks.0.cam_shift_layer", "head",
    "head.head",
]  # fmt: skip


def make(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny"), dtype=dtype)
    with torch.no_grad():  # norms start at one, and one is no test of a weight
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def run(model: Any, state: RealtimeCausalDiTState | None = None, chunk: int = 0, **more: Any) -> Any:
    state = state or RealtimeCausalDiTState()
    return model(LATENTS + chunk, TEXT, 900.0, state=state, start_frame=3 * chunk, camera=CAMERA, **more)


def near(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_every_module_that_computes_is_on_the_list() -> None:
    model = make()
    kinds = {name.replace("blocks.1.", "blocks.0.") for name, _ in model.named_modules() if name}
    missing = {name for name in kinds if not name.startswith(("blocks.1", "blocks.2", "blocks.3"))} - set(CALLED)
    assert missing <= {
        "blocks", "c2ws_hidden_states_layer2", "blocks.0.cam_injector_layer2", "blocks.0.cross_attn.v",
        "blocks.0.cross_attn.o",
    }, missing  # fmt: skip


@pytest.mark.parametrize("path", CALLED)
def test_hooks_run_and_count(path: str) -> None:
    """A hook that looks changes nothing but roundings; one that turns what a layer gives around changes the flow."""
    model, calls = make(), []
    plain = run(model)
    layer = model.get_submodule(path)
    handles = [layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
               layer.register_forward_hook(lambda *_: calls.append("post"))]  # fmt: skip
    seen = run(model)
    assert calls[:2] == ["pre", "post"] and near(seen, plain) < 1e-6
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model), plain)
    turn = lambda _, given, out: tuple(x.flip(-1) for x in out) if isinstance(out, tuple) else out.flip(-1)  # noqa: E731
    layer.register_forward_hook(turn)
    assert near(run(model), plain) > 1e-5


@pytest.mark.parametrize("path", ["self_attn.norm_q", "self_attn.norm_k", "norm3", "self_attn", "ffn.0"])
def test_a_rollout_with_hooks_agrees(path: str) -> None:
    """Over steps and context updates past eviction, within roundings; the last block's hooks see whole forwards."""
    outs = []
    for hooked in (False, True):
        model, state = make(), RealtimeCausalDiTState()
        if hooked:
            last = model.blocks[len(model.blocks) - 1]
            last.get_submodule(path).register_forward_hook(lambda _, given, out: out * 1)
        for chunk in range(model.config.window_frames // 3 + 2):
            outs.append(run(model, state, chunk))
            assert run(model, state, chunk, update_cache_only=True) is None
    half = len(outs) // 2
    assert all(near(b, a) < 2e-6 for a, b in zip(outs[:half], outs[half:], strict=True))


def test_int8_layers_with_hooks_get_rows() -> None:
    model = make()
    model.quantize(Int8Recipe())
    plain, kinds = run(model), []
    for path in ("self_attn", "cross_attn.q", "ffn", "ffn.0"):
        layer = model.blocks[0].get_submodule(path)
        layer.register_forward_pre_hook(lambda _, given: kinds.extend(type(x) for x in given[:1]))
        layer.register_forward_hook(lambda _, given, out: kinds.append(type(out)) if out is not None else None)
    assert near(run(model), plain) < 2e-2
    assert set(kinds) == {Tensor}


class Adapter(nn.Linear):
    """An adapter in the manner of subclasses: a low rank beside the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "path", [name for name in CALLED if name.endswith(("_embedding.0", "projection.1", "ffn.0", ".o", "_layer"))]
)
def test_subclasses_and_wrappers_run(path: str, dtype: torch.dtype) -> None:
    model = make(dtype)
    plain = run(model)
    layer = model.get_submodule(path)
    layer.__class__ = Adapter
    adapted = run(model)
    assert near(adapted, plain) > 1e-5
    layer.__class__ = nn.Linear
    owner, _, name = path.rpartition(".")
    wrapper = nn.Sequential(layer)
    setattr(model.get_submodule(owner), name, wrapper)
    assert near(run(model), plain) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, to: torch.dtype) -> None:
    """The model computes in its own dtypes; a session may go on within autocast or without."""
    model = make(dtype)
    states = [RealtimeCausalDiTState() for _ in range(2)]
    for chunk in range(2):
        want = run(model, states[0], chunk)
        with torch.autocast("cpu", to, enabled=chunk == 0):
            assert torch.equal(run(model, states[1], chunk), want)


def lora(model: Any, targets: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


TARGETS = r".*\.(o|ffn\.0|ffn\.2|cross_attn\.[qkv]|cam_scale_layer|cam_injector_layer1)|t(ext|ime)_embedding\.[02]|.*_projection\.1|head\.head"  # noqa: E501


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_adapters_equal_the_weights_they_merge_into(dtype: torch.dtype) -> None:
    model = make(dtype)
    plain = run(model)
    adapted = lora(model, TARGETS)
    beside = run(adapted)
    assert near(beside, plain) > 1e-2
    state = RealtimeCausalDiTState()
    run(adapted, state)
    with adapted.disable_adapter():
        assert torch.equal(run(adapted), plain)
    assert torch.equal(run(adapted, state), beside)  # the session noticed both switches
    adapted.merge_adapter()
    merged = run(adapted, state)
    assert torch.equal(merged, run(adapted))
    assert near(merged, beside) < (2e-5 if dtype == torch.float32 else 2e-2)
    own = adapted.merge_and_unload()
    assert isinstance(own, CausalLingBotTransformer) and torch.equal(run(own), merged)
    own.quantize(Int8Recipe())
    assert near(run(own), merged) < 0.1


def test_the_model_is_for_inference_and_what_it_gives_is_detached() -> None:
    adapted = lora(make(), TARGETS)
    assert any(weight.requires_grad for weight in adapted.parameters())
    out = run(adapted)
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


def test_adapters_that_can_not_be_quantised_are_named() -> None:
    adapted = lora(make(), r".*ffn\.0")
    with pytest.raises(ValueError, match=r"ffn\.0 is Linear, must be a linear layer: merge adapters first"):
        adapted.base_model.model.quantize(Int8Recipe())


def test_norms_with_hooks_are_refused_where_the_sequence_is_sharded() -> None:
    attention = make().blocks[0].self_attn
    attention.norm_k.register_forward_hook(lambda *_: None)
    x = torch.randn(1, 4, 128)
    with pytest.raises(ValueError, match="norm_q, norm_k: got hooks or another class than RMSNorm"):
        attention(x, None, None, None, shard=SequenceShard((4, 4)))
