"""The products of diffusers' Wan blocks in int8: which layers a recipe means there, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lingbot_kernels.quantization import Int8Linear, Int8Recipe


def layers_of(block: Any) -> dict[str, tuple[str, ...]]:
    """Product, as recipes name it -> its layers in a `WanTransformerBlock`."""
    qkv = ("attn1.to_qkv",) if block.attn1.fused_projections else ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    return {
        "qkv": qkv, "self_o": ("attn1.to_out.0",), "cross_q": ("attn2.to_q",), "cross_o": ("attn2.to_out.0",),
        "ffn_up": ("ffn.net.0.proj",), "ffn_down": ("ffn.net.2",),
    }  # fmt: skip


def check_quantizable(transformer: Any, recipe: Int8Recipe) -> dict[str, nn.Linear]:
    """The layers that the recipe means, by name. Raises ValueError where one can't be replaced."""
    recipe.check(len(transformer.blocks), camera=False)
    if recipe.attention != "bfloat16":
        raise ValueError(f"precision: got attention={recipe.attention!r}, must be 'bfloat16' here")
    found: dict[str, nn.Linear] = {}
    for i, block in enumerate(transformer.blocks):
        for product, names in layers_of(block).items():
            for name in names if recipe.has(i, product) else ():
                layer = block.get_submodule(name)
                if type(layer) is not nn.Linear or "forward" in layer.__dict__:
                    hooked = " with a hook" if type(layer) is nn.Linear else ""
                    raise ValueError(
                        f"blocks.{i}.{name}: got {type(layer).__name__}{hooked}, must be a plain linear layer to be "
                        "quantised: fuse or unload adapters, and offload afterwards"
                    )
                if not bool(layer.weight.isfinite().all()):
                    raise ValueError(f"blocks.{i}.{name}.weight: got a NaN or Inf, must be finite to be quantised")
                found[f"blocks.{i}.{name}"] = layer
    return found


@torch.no_grad()
def quantize_layers(transformer: Any, layers: dict[str, nn.Linear], recipe: Int8Recipe) -> dict[str, nn.Linear]:
    """Put int8 layers in the place of these, one after the other; gives the layers, moved to host memory."""
    kept: dict[str, nn.Linear] = {}
    for name in list(layers):
        layer = layers.pop(name)
        made = Int8Linear(
            layer.in_features, layer.out_features, rotate=recipe.rotate, seed=recipe.seed, device=layer.weight.device,
            dtype=layer.weight.dtype,
        )  # fmt: skip
        made.fill(layer.weight)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
        made.requires_grad_(False)
        _put(transformer, name, made)
        kept[name] = layer.to("cpu")
    return kept


def restore_layers(transformer: Any, kept: dict[str, nn.Linear]) -> None:
    """Bring the layers back, to where the int8 ones are."""
    for name, layer in kept.items():
        _put(transformer, name, layer.to(transformer.get_submodule(name).weight.device))


def _put(transformer: Any, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(transformer.get_submodule(owner), attribute, layer)
