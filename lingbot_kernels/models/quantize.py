"""Which layers of a network a recipe means, and their replacement by layers with int8 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lingbot_kernels.models.fused_linear import FusedLinear, FusedRows, Int8FusedLinear
from lingbot_kernels.ops.int8_attention import HEAD_DIMS
from lingbot_kernels.quantization import Int8Linear, Int8Recipe
from lingbot_kernels.quantization.linear import LARGEST_K

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


@dataclass(frozen=True)
class ValueFold:
    """An attention whose values' bias can go into the bias of its output projection, `key` being that one's weight.

    Softmax's weights sum to one: a constant that is in every value comes out of attention as it is, so that
    o(a + b) = o(a) + W b. Without it the rows that the output projection quantises are centred.
    """

    key: str
    value_bias: Tensor
    output_bias: Tensor

    @torch.no_grad()
    def apply(self, weight: Tensor) -> None:
        """Take the bias b out of the values and W b into the output's, W being the output projection's weight."""
        constant = weight.to(self.output_bias.device).float() @ self.value_bias.float()
        self.output_bias.copy_(self.output_bias.float() + constant)
        self.value_bias.zero_()


def value_folds(model: Any, recipe: Int8Recipe) -> list[ValueFold]:
    """Those of the attentions whose output projection the recipe has, with their biases as they are in the model."""
    folds = []
    for i, block in enumerate(model.blocks):
        own, cross = block.self_attn, block.cross_attn
        if recipe.has(i, "self_o"):
            value = own.qkv.row_views()["v.bias"].detach()
            folds.append(ValueFold(f"blocks.{i}.self_attn.o.weight", value, own.o.bias.detach()))
        if recipe.has(i, "cross_o"):
            folds.append(ValueFold(f"blocks.{i}.cross_attn.o.weight", cross.v.bias.detach(), cross.o.bias.detach()))
    return folds


def quantize(model: Any, recipe: Int8Recipe) -> None:
    """Replace the recipe's layers of a `CausalLingBotTransformer` by int8 ones, one after the other, in place; the bias
    of the values goes into the output projection where that one is among them.

    On the meta device the layers get their shapes alone, for a checkpoint to fill.

    Raises:
        ValueError: the recipe names what the network has not, or a weight has a NaN or Inf, or they are quantised
            already; the model is then as it was.
    """
    if model.recipe is not None:
        raise ValueError(f"quantize: the weights are quantised already, by {model.recipe}; load the checkpoint again")
    int8_qk = recipe.attention == "int8_qk"
    if int8_qk and (reason := why_not_int8_qk(model)) is not None:
        raise ValueError(f"quantize: got attention={recipe.attention!r} for {reason}")
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
        if layer.in_features > LARGEST_K:
            raise ValueError(
                f"quantize: {name} has {layer.in_features} input channels, must have at most {LARGEST_K} for sums to "
                "fit int32"
            )
        if not layer.weight.is_meta and not bool(layer.weight.isfinite().all()):
            raise ValueError(f"quantize: {name}.weight has a NaN or Inf, must be finite")
    for fold in value_folds(model, recipe):
        if not fold.value_bias.is_meta:
            fold.apply(model.get_submodule(fold.key.removesuffix(".weight")).weight)
    for name in targets:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, int8_layer(found.pop(name), recipe))
    for block in model.blocks:
        block.self_attn.int8_qk = int8_qk
    if int8_qk:
        model.shard_group.exchange_int8()
    model.recipe = recipe


def why_not_int8_qk(model: Any) -> str | None:
    """Why self-attention of a network can't have Q and K in int8, or None."""
    if model.dtype != torch.bfloat16 or model.config.head_dim not in HEAD_DIMS:
        return (
            f"{model.dtype} and heads of {model.config.head_dim}, must be torch.bfloat16 and heads of "
            f"{' or '.join(map(str, HEAD_DIMS))}"
        )
    return None


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
