"""Layers that stand in for a network's own while its quality is measured: wider ones, and those of float8."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels.models.fused_linear import FusedLinear
from lingbot_kernels.models.quantize import LAYERS, int8_layer, value_folds
from lingbot_kernels.quantization import PRODUCTS, Int8Recipe
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

Layer = nn.Linear | FusedLinear
E4M3, LARGEST_E4M3 = torch.float8_e4m3fn, 448.0


def layer_names(num_layers: int, recipe: Int8Recipe | None = None, camera: bool = True) -> list[str]:
    """Names of the products' layers: the recipe's, or all of the blocks' where None, but for the text's K and V.

    camera: whether the network has camera layers.
    """
    return [
        f"blocks.{block}.{layer}"
        for block in range(num_layers)
        for product in PRODUCTS
        if (camera or product != "camera") and (recipe is None or recipe.has(block, product))
        for layer in LAYERS[product]
    ]


@contextlib.contextmanager
def replaced(model: nn.Module, names: Iterable[str], make: Callable[[Layer], nn.Module]) -> Iterator[None]:
    """Within the block, `make(layer)` stands in the place of each named layer; afterwards the layers are back."""
    own = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in own.items():
            source = layer.layer if isinstance(layer, StandIn) else layer
            assert isinstance(source, nn.Linear | FusedLinear)
            _put(model, name, make(source))
        yield
    finally:
        for name, layer in own.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)


@contextlib.contextmanager
def folded(model: Any, recipe: Int8Recipe) -> Iterator[None]:
    """Within the block the values' biases are where `quantize` puts them; afterwards they are back."""
    with _as_they_were(model):
        folds = value_folds(model, recipe)
        weights = [model.get_submodule(fold.key.removesuffix(".weight")).weight for fold in folds]
    kept = [(bias, bias.clone()) for fold in folds for bias in (fold.value_bias, fold.output_bias)]
    try:
        for fold, weight in zip(folds, weights, strict=True):
            fold.apply(weight)
        yield
    finally:
        for bias, value in kept:
            bias.copy_(value)


@contextlib.contextmanager
def values_without_bias(model: Any, recipe: Int8Recipe, state: RealtimeCausalDiTState) -> Iterator[None]:
    """Within the block the values in the session's ring lack the biases that `folded` takes out of them."""
    assert state.kv_cache is not None
    with _as_they_were(model):
        folds = [fold for fold in value_folds(model, recipe) if "self_attn" in fold.key]
    shifts = []
    for fold in folds:
        values = state.kv_cache.layers[int(fold.key.split(".")[1])][-1]
        shifts.append((values, fold.value_bias.to(values.dtype).view(values.shape[2:]).clone()))
    for values, bias in shifts:
        values -= bias
    try:
        yield
    finally:
        for values, bias in shifts:
            values += bias


@contextlib.contextmanager
def _as_they_were(model: nn.Module) -> Iterator[None]:
    """Within the block every layer is the one that a stand-in stands in for."""
    stand_ins = {name: module for name, module in model.named_modules() if isinstance(module, StandIn)}
    with replaced(model, stand_ins, lambda layer: layer):
        yield


class StandIn(nn.Module):
    """Takes the place of a layer, fused ones included, and keeps its weight where no cast of the model reaches it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = [layer]

    @property
    def layer(self) -> Layer:
        """What it stands in for."""
        return self._layer[0]

    def forward(self, *names: str, x: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """layer(x), or layer(*names, x=x) of a fused one."""
        layer = self.layer
        if isinstance(layer, FusedLinear):
            assert x is not None
            return self.product(x, layer, layer.rows_of(names)).chunk(len(names), dim=-1)
        (operand,) = names
        assert isinstance(operand, Tensor)
        return self.product(operand, layer, slice(None))

    def product(self, x: Tensor, layer: Layer, rows: slice) -> Tensor:
        raise NotImplementedError


class WideLinear(StandIn):
    """The layer in float32, its weight kept as it is and widened for each product."""

    def product(self, x: Tensor, layer: Layer, rows: slice) -> Tensor:
        return F.linear(x, layer.weight[rows].float(), layer.bias[rows].float())


class Fp8Linear(StandIn):
    """The layer with weight and rows as e4m3 codes and a scale a row: what `torch._scaled_mm` computes, by it on a GPU
    that has such tensor cores, elsewhere in float32.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.codes, self.scale = e4m3_rows(layer.weight.detach())

    def product(self, x: Tensor, layer: Layer, rows: slice) -> Tensor:
        codes, scale = e4m3_rows(x.flatten(0, -2))
        weight, weight_scale, bias = self.codes[rows], self.scale[rows], layer.bias[rows]
        if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9) and x.dtype == torch.bfloat16:
            y = torch._scaled_mm(codes, weight.t(), scale, weight_scale.t(), bias=bias, out_dtype=x.dtype)
        else:
            y = F.linear(codes.float(), weight.float()) * scale * weight_scale.t() + bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def int8_stand_in(layer: Layer, recipe: Int8Recipe, dtype: torch.dtype) -> nn.Module:
    """The layer in int8 within a model of `dtype`, sharing nothing with it: the model may be cast."""
    made = int8_layer(layer, recipe)
    made.bias = nn.Parameter(made.bias.detach().to(dtype, copy=True), requires_grad=False)
    return made


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [n, K], scale float32 [n, 1]) of rows [n, K]: scale = amax / 448."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST_E4M3
    return (wide / scale).to(E4M3), scale
