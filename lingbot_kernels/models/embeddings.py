"""What turns latents, time, text and camera rays into the model's channels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels import ops
from lingbot_kernels.plain import is_plain, untouched
from lingbot_kernels.quantization import Int8Linear, Taken


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, C, F, H, W] -> tokens [B, S, C * pt * ph * pw] in (frame, row, column) order, channels in (c, pt, ph, pw)
    order.
    """
    batch, channels, frames, height, width = x.shape
    pt, ph, pw = patch_size
    x = x.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, patch_size: tuple[int, int, int], frames: int, height: int, width: int) -> Tensor:
    """Tokens [B, S, pt * ph * pw * C], channels last within a token -> [B, C, F, H, W]."""
    pt, ph, pw = patch_size
    grid = (frames // pt, height // ph, width // pw)
    x = tokens.unflatten(1, grid).unflatten(-1, (pt, ph, pw, -1))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(tokens.shape[0], -1, frames, height, width)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, done as one matrix product. weight [dim, C, pt, ph, pw], bias [dim]."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: tuple[int, int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        bound = 1 / math.sqrt(in_channels * math.prod(patch_size))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, tokens: slice = slice(None)) -> Tensor:
        """[B, C, F, H, W] -> [B, S, dim], of the given tokens alone."""
        return F.linear(patchify(x, self.patch_size)[:, tokens], self.weight.flatten(1), self.bias)


class TextEmbedding(nn.Sequential):
    """Linear, GELU(tanh), Linear over text embeddings that are zero-padded to `text_len`; the padding is attended.

    Its rows are all the same after every layer, so one of them can stand for all (`length` of `forward`).
    """

    def __init__(
        self,
        text_dim: int,
        dim: int,
        text_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(text_dim, dim, device=device, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, device=device, dtype=dtype),
        )
        self.text_len = text_len

    def forward(self, text: Tensor, length: int | None = None) -> Tensor:
        """[B, L, text_dim] -> [B, length, dim] with L <= length <= text_len, which is the length where None."""
        first, activation, last = self
        dtype = next(self.parameters()).dtype
        padded = F.pad(text.to(dtype), (0, 0, 0, (length or self.text_len) - text.shape[1]))
        return last(linear_gelu(first, padded, activation))


class WideSequential(nn.Sequential):
    """Layers that compute in their input's dtype, whatever their weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = linear_in(x, layer)
        return x


def timestep_embedding(timestep: float, freq_dim: int, device: torch.device) -> Tensor:
    """cat[cos, sin](t * 10000^(-i / half)), i < half = freq_dim / 2, in float64: [freq_dim].

    The sinusoidal embedding of DDPM (Ho et al. 2020) with the cosines first, as Wan has it.
    """
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=device) / -half
    angles = timestep * torch.pow(10000.0, exponents)
    return torch.cat([angles.cos(), angles.sin()])


def linear_gelu(layer: Any, x: Taken, activation: nn.Module | None = None) -> Tensor:
    """gelu_tanh(layer(x)), the activation in the product's epilogue where the layer is plain.

    `activation` is the module that stands for it in the network; None: there is none.
    """
    if activation is None or is_plain(activation, nn.GELU):
        if isinstance(layer, Int8Linear) and untouched(layer):
            return layer(x, "gelu_tanh")
        if is_plain(layer, nn.Linear) and isinstance(x, Tensor):
            return ops.linear_gelu(x, layer.weight, layer.bias)
    y = layer(x)  # an adapter, a layer of another precision, or one with hooks
    return F.gelu(y, approximate="tanh") if activation is None else activation(y)


def linear_in(x: Tensor, layer: Any) -> Tensor:
    """layer(x) in x's dtype, whatever the layer's weights are kept in."""
    if is_plain(layer, nn.Linear):
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    wide = {name: weight.to(x.dtype) for name, weight in layer.named_parameters() if weight.dtype != x.dtype}
    return torch.func.functional_call(layer, wide, (x,)) if wide else layer(x)


def linear_into(out: Tensor | None, x: Tensor, linear: nn.Module) -> Tensor:
    """The layer's output, written to the contiguous `out` where given: the same product and bits either way."""
    if out is None:
        return linear(x)
    if not is_plain(linear, nn.Linear):
        return out.copy_(linear(x))
    assert isinstance(linear, nn.Linear)
    torch.addmm(linear.bias, x.flatten(0, -2), linear.weight.t(), out=out.view(-1, out.shape[-1]))
    return out
