"""Which layers of a network a recipe means, and their replacement by layers with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lingbot_kernels.models.fused_linear import FusedLinear, FusedRows, Int8FusedLinear
from lingbot_kernels.quantization import Int8Linear, Int8Recipe

# Product -> its layers within a block.
LAYERS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.qkv",),
    "self_o": ("self_attn.o",),
    "cross_q": ("cross_attn.q",),
    "cross_o": ("cross_attn.o",),
    "ffn_up": ("ffn.0",),
    "ffn_down": ("ffn.2",),
    "camera": ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"),
}


def quantize(model: Any, recipe: Int8Recipe) -> None:
    """Replace the recipe's layers of a `CausalLingBotTransformer` by int8 ones, one after the other, in place.

    On the meta device the layers get their shapes alone, for a checkpoint to fill.

    Raises:
        ValueError: the recipe names what the network has not, or a weight has a NaN or Inf, or they are quantised
            already; the model is then as it was.
    """
    if model.recipe is not None:
        raise ValueError(f"quantize: the weights are quantised already, by {model.recipe}; load the checkpoint again")
    if recipe.attention != "bfloat16":
        raise ValueError(f"quantize: got attention={recipe.attention!r}, must be 'bfloat16': attention has no int8 yet")
    recipe.check(len(model.blocks), model.config.camera)
    targets = [
        f"blocks.{i}.{layer}"
        for i in range(len(model.blocks))
        for product, layers in LAYERS.items()
        if recipe.has(i, product)
        for layer in layers
    ]
    found = {name: model.get_submodule(name) for name in targets}
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear | FusedLinear):
            raise ValueError(
                f"quantize: {name} is {type(layer).__name__}, must be a linear layer: merge adapters first"
            )
        if not layer.weight.is_meta and not bool(layer.weight.isfinite().all()):
            raise ValueError(f"quantize: {name}.weight has a NaN or Inf, must be finite")
    for name in targets:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, int8_layer(found.pop(name), recipe))
    model.recipe = recipe


@torch.no_grad()
def int8_layer(layer: nn.Linear | FusedLinear, recipe: Int8Recipe) -> Int8Linear:
    """The layer with int8 weights, on its device; its bias is the same parameter."""
    settings: dict[str, Any] = {
        "rotate": recipe.rotate, "seed": recipe.seed, "device": layer.weight.device, "dtype": layer.weight.dtype
    }  # fmt: skip
    made: Int8Linear
    if isinstance(layer, FusedLinear):
        made = Int8FusedLinear(layer.in_features, layer.out_features, layer.names, **settings)
    else:
        made = Int8Linear(layer.in_features, layer.out_features, **settings)
    if layer.bias is not None:
        made.bias = layer.bias
    if not layer.weight.is_meta:
        made.fill(layer.weight)
    return made.train(layer.training)


def int8_slots(model: nn.Module) -> dict[str, tuple[Int8Linear, slice]]:
    """State-dict key of every quantised weight -> the layer that has it, and its rows there."""
    slots: dict[str, tuple[Int8Linear, slice]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedRows) and isinstance(module, Int8Linear):
            owner = name.rpartition(".")[0]
            slots |= {f"{owner}.{part}.weight": (module, module.rows_of((part,))) for part in module.names}
        elif isinstance(module, Int8Linear):
            slots[f"{name}.weight"] = (module, slice(None))
    return slots
