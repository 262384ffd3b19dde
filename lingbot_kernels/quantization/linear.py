"""A linear layer with int8 weights, which takes rows as int8 codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lingbot_kernels import ops
from lingbot_kernels.plain import untouched
from lingbot_kernels.quantization.rotation import random_signs
from lingbot_kernels.quantization.rows import PLAIN, Int8Rows, QuantizedRows, Rows, Taken
from lingbot_kernels.reference.rotate_quantize import hadamard_blocks, padded_width

LARGEST_K = 131071  # 128 * 128 * K must stay below 2**31
_WIDENED = 2**24  # weights that are widened to float32 at a time


class Int8Linear(nn.Module):
    """activation(x weight^T + bias) with weight as int8 codes, times signs and rotated along K, and a scale a row.

    Attributes:
        weight: int8 [N, Kp], Kp being K = in_features filled up to a multiple of 128.
        weight_scale: float32 [N], whatever dtype the model is moved to.
        bias: [N], zeros where the layer had none; its dtype is the result's, or autocast's within autocast.
        signs: int8 [Kp], or None without a rotation.
    """

    signs: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rotate: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Uninitialised weights. Raises ValueError where K products of codes could overflow an int32 sum."""
        super().__init__()
        if in_features > LARGEST_K:
            raise ValueError(f"in_features: got {in_features}, must be at most {LARGEST_K} for sums to fit int32")
        self.in_features, self.out_features = in_features, out_features
        self.rotate, self.seed = rotate, seed
        weight = torch.empty(out_features, padded_width(in_features), dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(out_features, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        signs = random_signs(in_features, seed, weight.device) if rotate else None
        self.register_buffer("signs", signs, persistent=False)

    @property
    def rows(self) -> Int8Rows:
        """How this layer takes its rows."""
        return Int8Rows(self.signs, self.rotate)

    @torch.no_grad()
    def fill(self, weight: Tensor, rows: slice = slice(None)) -> None:
        """Quantise `weight` [n, K] of any float dtype, on any device, into these rows; a part at a time.

        Raises:
            ValueError: the weight has a NaN or Inf.
        """
        codes, scale = self.weight[rows], self.weight_scale[rows]
        step = max(1, _WIDENED // max(self.in_features, 1))
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            wide = weight[part].to(codes.device).float()  # 16 bits travel, not 32
            made = self.rows.quantize(wide.unsqueeze(0))
            if made.scale.isnan().any():
                raise ValueError("weight: got a NaN or Inf, must be finite to be quantised")
            codes[part].copy_(made.codes[0])
            scale[part].copy_(made.scale[0])

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K], rotated back."""
        wide = self.weight.float() * self.weight_scale.unsqueeze(-1)
        if self.rotate:
            wide = hadamard_blocks(wide)
        if self.signs is not None:
            wide = wide * self.signs
        return wide[:, : self.in_features]

    def product(self, x: Taken, rows: slice = slice(None), activation: str | None = None) -> Tensor:
        """activation(x weight[rows]^T + bias[rows]) for x [B, S, K], or its codes: [B, S, n]."""
        taken = x if isinstance(x, QuantizedRows) else self.rows.quantize(x)
        device = self.weight.device.type
        return ops.int8_linear(
            taken.codes,
            taken.scale,
            self.weight[rows],
            self.weight_scale[rows],
            self.bias[rows],
            activation,
            out_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.bias.dtype,
        )

    def forward(self, x: Taken, activation: str | None = None) -> Tensor:
        """x [B, S, K], or its codes -> [B, S, N]; activation None or "gelu_tanh"."""
        return self.product(x, activation=activation)

    def extra_repr(self) -> str:
        how = f"rotated (seed {self.seed})" if self.rotate else "not rotated"
        return f"in_features={self.in_features}, out_features={self.out_features}, int8, {how}"

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Weights that are no codes are refused, in place of being cut to integers."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            error_msgs.append(not_codes(prefix + "weight", weight))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Scales stay float32 when the model is cast; memory given to a layer on the meta device gets its signs."""
        scale, was_meta = self.weight_scale.detach(), self.weight.is_meta
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = nn.Parameter(scale.to(self.weight.device), requires_grad=False)
        if self.rotate and was_meta and not self.weight.is_meta:
            self.signs = random_signs(self.in_features, self.seed, self.weight.device)
        return self


def not_codes(key: str, weight: Tensor) -> str:
    """What is wrong with a weight that a quantised layer is to load."""
    return (
        f"{key}: got {weight.dtype}, must be int8 codes: the layer is quantised; load the weights before quantize, or "
        "a checkpoint by from_pretrained"
    )


def rows_for(layer: nn.Module, *callers: nn.Module) -> Rows:
    """How `layer` takes its rows, which reach it by the forwards of `callers`.

    Where any of them has hooks: as they are, which is what a hook expects to see.
    """
    if isinstance(layer, Int8Linear) and untouched(layer) and all(map(untouched, callers)):
        return layer.rows
    return PLAIN
