"""accelerate, hooks, offloading, block caches, adapters and restore, in any order, beside a plain twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")

import accelerate as hf  # noqa: E402
from diffusers.hooks import (  # noqa: E402
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_group_offloading,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock  # noqa: E402
from wan_models import CHANNELS, TEXT, error, inputs, make, run, to  # noqa: E402

from lingbot_kernels import RealtimeCausalDiTState  # noqa: E402
from lingbot_kernels.integrations.diffusers import KVWindow, accelerate, is_accelerated, restore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
NEAR = 2e-6


def turn(path: str) -> Callable[[Any], None]:
    """torch's hooks on one module: what it takes is scaled, what it gives is turned around."""

    def install(model: Any) -> None:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, given: (given[0] * 1.1, *given[1:]))
        module.register_forward_hook(lambda _, given, out: out.flip(-1))

    install.__name__ = f"torch hooks on {path}"
    return install


def grouped(model: Any) -> None:
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def leaves(model: Any) -> None:
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def sequential(model: Any) -> None:
    hf.cpu_offload(model, CPU)


def sequential_for_a_while(model: Any) -> None:
    hf.cpu_offload(model, CPU)
    hf.hooks.remove_hook_from_module(model, recurse=True)


def casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def first_block(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def first_block_for_a_while(model: Any) -> None:
    first_block(model)
    model.disable_cache()


def broadcast(model: Any) -> None:
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
            current_timestep_callback=lambda: 500,
        )
    )  # fmt: skip


def taylor(model: Any) -> None:
    model.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))


def magnitude(model: Any) -> None:
    model.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 30, num_inference_steps=30, threshold=0.5, retention_ratio=0))


def lora(
    model: Any, targets: Any = ("to_q", "to_v", "to_out.0", "net.0.proj", "net.2", "time_proj", "linear_1")
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(7)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights=False))


def fused_lora(model: Any) -> None:
    lora(model)
    model.fuse_lora()


def unloaded_lora(model: Any) -> None:
    lora(model)
    model.unload_lora()


def offloaded_lora(model: Any) -> None:
    lora(model)
    grouped(model)


HOOKED = [
    "blocks.1", "blocks.1.norm1", "blocks.1.norm2", "blocks.1.norm3", "blocks.1.attn1.norm_q", "blocks.1.attn1.norm_k",
    "blocks.1.attn2.norm_k", "blocks.1.attn1.to_q", "blocks.1.attn1", "blocks.1.attn2", "blocks.1.ffn",
    "blocks.1.ffn.net.0", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2", "norm_out", "proj_out",
]  # fmt: skip
CHANGES = [
    *(turn(path) for path in HOOKED), grouped, leaves, sequential, sequential_for_a_while, casting, first_block,
    first_block_for_a_while, broadcast, taylor, magnitude, lora, fused_lora, unloaded_lora, offloaded_lora,
]  # fmt: skip
ORDERS = ["A", "CA", "AC", "CAR", "ACR", "ACRA", "CARA", "ARC", "ARCA"]


def called(model: Any, values: dict[str, Tensor]) -> Tensor:
    with model.cache_context("test"):
        first = run(model, values)
        return torch.stack([first, run(model, {**values, "hidden_states": 1.3 * values["hidden_states"]})])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_order(change: Callable[[Any], None]) -> None:
    """A: accelerate, R: restore, C: the change. Beside plain diffusers with the change alone."""
    values, plain = inputs(batch=1), make()
    before = called(plain, values)
    change(plain)
    after = called(plain, values)
    for order in ORDERS:
        model, changed = make(), False
        for step in order:
            {"A": accelerate, "R": restore, "C": change}[step](model)
            changed = changed or step == "C"
            if hasattr(model, "_reset_stateful_cache"):
                model._reset_stateful_cache()
            got, want = called(model, values), after if changed else before
            if is_accelerated(model):
                assert error(got, want) < NEAR, (order, step)
            else:
                assert torch.equal(got, want), (order, step)


def test_a_patch_that_nobody_knows_survives_restore_and_is_refused_before() -> None:
    """What keeps the accelerated forward runs diffusers' own once that is restored."""
    model, values = make(), inputs()
    plain = run(model, values)
    accelerate(model)
    for module in (model, model.rope, model.blocks[1]):
        kept = module.forward
        module.forward = lambda *given, kept=kept, **named: kept(*given, **named)
    fast = run(model, values)
    restore(model)
    assert torch.equal(run(model, values), plain) and error(fast, plain) < NEAR
    with pytest.raises(ValueError, match="not accelerated any more"):
        run(model, values, state=RealtimeCausalDiTState(), start_frame=0)
    with pytest.raises(ValueError, match="transformer: has a hook or a patched forward"):
        accelerate(model)
    del model.forward
    with pytest.raises(ValueError, match="rope: has a hook or a patched forward"):
        accelerate(model)
    assert type(model) is diffusers.WanTransformer3DModel and type(model.blocks[0]) is WanTransformerBlock


def test_hooks_on_rope_are_refused() -> None:
    model, values = make(), inputs()
    handle = model.rope.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="rope: got forward hooks"):
        accelerate(model)
    handle.remove()
    accelerate(model)
    model.rope.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="rope: got forward hooks"):
        run(model, values)


def test_int8_layers_are_not_replaced_under_offloading() -> None:
    for install in (grouped, leaves, sequential):
        model = make()
        install(model)
        with pytest.raises(ValueError, match=r"has an offloading hook.* while layers are quantised"):
            accelerate(model, precision="int8")
        assert not is_accelerated(model)
        model, values = make(), inputs()
        accelerate(model, precision="int8")
        before = run(model, values)
        install(model)
        with pytest.raises(ValueError, match=r"has an offloading hook.* while int8 layers are replaced"):
            restore(model)
        assert is_accelerated(model) and error(run(model, values), before) < 2e-2


# A causal rollout


def rollout(change: Callable[[Any], None], autocast: bool = False, before: bool = False) -> tuple[list[Tensor], Any]:
    """Flows of five chunks in a window that fills with the second, and the session."""
    model, state, flows = make(), RealtimeCausalDiTState(), []
    if before:
        change(model)
    accelerate(model, kv_cache=KVWindow(5, 1))
    if not before:
        change(model)
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, CHANNELS, 2, 4, 4), (1, 5, TEXT)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), model.cache_context("test"):
        for chunk in range(5):
            given = {"state": state, "start_frame": 2 * chunk}
            for time in (900, 500):
                flows.append(model(latents + chunk, torch.tensor([time]), text, **given).sample)
            assert model(latents, torch.tensor([0]), text, **given, update_cache_only=True) is None
    return flows, state


def nothing(model: Any) -> None:
    pass


def identity(path: str) -> Callable[[Any], None]:
    def install(model: Any) -> None:
        model.get_submodule(path).register_forward_hook(lambda _, given, out: out * 1)

    install.__name__ = f"a hook on {path}"
    return install


class Absent(ModelHook):
    """Weights that are there while the module runs, as offloading has them: NaN otherwise."""

    def initialize_hook(self, module: Any) -> Any:
        self.kept = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        return self.post_forward(module, module)

    def pre_forward(self, module: Any, *given: Any, **named: Any) -> Any:
        for name, weight in module.named_parameters():
            weight.data.copy_(self.kept[name])
        return given, named

    def post_forward(self, module: Any, output: Any) -> Any:
        for weight in module.parameters():
            weight.data.fill_(float("nan"))
        return output


def absent_blocks(model: Any) -> None:
    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Absent(), "absent")


def absent_attention(model: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(model.blocks[1].attn2).register_hook(Absent(), "absent")


def skipped_blocks(model: Any) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=9.0))


def cached_and_absent(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=9.0))
    absent_blocks(model)


HARMLESS = [
    *(identity(path.replace("1", "2", 1)) for path in HOOKED), grouped, leaves, sequential, first_block, skipped_blocks,
    broadcast, taylor, magnitude, absent_blocks, absent_attention, cached_and_absent,
]  # fmt: skip


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_a_rollout_with_hooks_or_block_caches(change: Callable[[Any], None], before: bool) -> None:
    """Block caches have no part in a causal forward: every block writes its keys and values."""
    flows, state = rollout(change, before=before)
    want, twin = rollout(nothing)
    assert all(error(a, b) < NEAR for a, b in zip(flows, want, strict=True))
    for got, wanted in zip(state.kv_cache.layers, twin.kv_cache.layers, strict=True):
        assert all(error(x, y) < NEAR for x, y in zip(got, wanted, strict=True))


def test_a_block_cache_is_back_after_a_causal_forward() -> None:
    model, values = make(), inputs(batch=1)
    accelerate(model, kv_cache=KVWindow(9, 3))
    model.enable_cache(FirstBlockCacheConfig(threshold=9.0))
    calls: list[int] = []
    model.blocks[2].attn1.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_context("test"):
        for _ in range(2):
            run(model, values, state=RealtimeCausalDiTState(), start_frame=0)
            with pytest.raises(ValueError, match="start_frame"):
                run(model, values, state=RealtimeCausalDiTState(), start_frame=-1)
        assert len(calls) == 2
        for _ in range(3):
            run(model, values)
    assert len(calls) == 3


def test_a_cache_around_the_whole_transformer_is_refused() -> None:
    model, state = make(), RealtimeCausalDiTState()
    accelerate(model, kv_cache=KVWindow(9, 3))
    model.enable_cache(
        FasterCacheConfig(
            current_timestep_callback=lambda: 500, is_guidance_distilled=False, unconditional_batch_skip_range=2,
            spatial_attention_block_skip_range=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="transformer has FasterCacheDenoiserHook"):
        model.forward.__wrapped__(**inputs(batch=1), state=state, start_frame=0)
    assert state.kv_cache is None


# autocast


@pytest.mark.parametrize(
    ("dtype", "to_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_autocast_error_is_within_1_25_of_diffusers_own(dtype: torch.dtype, to_dtype: torch.dtype) -> None:
    model = make(num_attention_heads=4, attention_head_dim=32, ffn_dim=256).to(dtype)
    exact = make(num_attention_heads=4, attention_head_dim=32, ffn_dim=256).to(dtype).double()
    values = to(inputs(frames=5, size=(16, 16)), dtype)
    oracle = run(exact, to(values, torch.float64))
    with torch.autocast("cpu", to_dtype):
        plain = run(model, values)
        accelerate(model)
        got = run(model, values)
    assert got.dtype == plain.dtype
    assert error(got, oracle) <= 1.25 * error(plain, oracle)
    if dtype == torch.float32:
        assert error(run(model, values), oracle) < NEAR


def test_autocast_in_a_rollout_and_with_int8() -> None:
    flows, state = rollout(nothing, autocast=True)
    want, _ = rollout(nothing)
    assert all(1e-4 < error(a, b) < 2e-2 for a, b in zip(flows, want, strict=True))
    assert {x.dtype for pair in state.kv_cache.layers for x in pair} == {torch.bfloat16}
    model, values = make(), inputs()
    plain = run(model, values)
    accelerate(model, precision="int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert error(run(model, values), plain) < 0.05


# adapters


def test_adapters_that_want_gradients_are_refused_until_restored() -> None:
    """Wherever the adapter is: a block's op would cut its gradient off. Restored, it trains as plain diffusers does."""
    for targets in (["to_q"], ["net.2"], ["time_proj"], ["linear_1"]):
        grads, values = [], inputs()
        for accelerated in (False, True):
            model = make().requires_grad_(False)
            if accelerated:
                accelerate(model)
            lora(model, targets)
            if accelerated:
                with pytest.raises(RuntimeError, match="no gradients"):
                    model(**values)
                restore(model)
            model(**values).sample.square().sum().backward()
            grads.append([w.grad for w in model.parameters() if w.requires_grad])
        assert grads[0] and all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_an_adapter_after_the_last_block_trains() -> None:
    model = make().requires_grad_(False)
    accelerate(model)
    lora(model, ["proj_out"])
    model(**inputs()).sample.square().sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in model.parameters() if w.requires_grad)


def test_a_session_notices_adapters_switched_and_fused() -> None:
    """Text keys and values are made anew: as those of a prompt that is new."""
    model, state = make(), RealtimeCausalDiTState()
    accelerate(model, kv_cache=KVWindow(9, 3))
    values = inputs(batch=1)
    lora(model, ["to_k", "to_v"])
    flows = []
    for change in (nothing, "disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "unload_lora"):
        if isinstance(change, str):
            getattr(model, change)()
        kept = run(model, values, state=state, start_frame=0)
        fresh = {**values, "encoder_hidden_states": values["encoder_hidden_states"].clone()}
        assert torch.equal(kept, run(model, fresh, state=state, start_frame=0)), change
        flows.append(kept)
    assert error(flows[1], flows[0]) > 1e-3 and torch.equal(flows[2], flows[0]) and error(flows[5], flows[1]) < NEAR
