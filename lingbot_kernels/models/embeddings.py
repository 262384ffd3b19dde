"""What turns latents, time, text and camera rays into the model's channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels import ops
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
    """Linear, GELU(tanh), Linear over text embeddings that are zero-padded to `text_len`; the padding is attended."""

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

    def forward(self, text: Tensor) -> Tensor:
        """[B, L <= text_len, text_dim] -> [B, text_len, dim]."""
        first, last = linears(self)
        padded = F.pad(text.to(first.weight.dtype), (0, 0, 0, self.text_len - text.shape[1]))
        return last(ops.linear_gelu(padded, first.weight, first.bias))


def timestep_embedding(timestep: float, freq_dim: int, device: torch.device) -> Tensor:
    """cat[cos, sin](t * 10000^(-i / half)), i < half = freq_dim / 2, in float64: [freq_dim].

    The sinusoidal embedding of DDPM (Ho et al. 2020) with the cosines first, as Wan has it.
    """
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=device) / -half
    angles = timestep * torch.pow(10000.0, exponents)
    return torch.cat([angles.cos(), angles.sin()])


def linear_gelu(layer: nn.Module, x: Taken) -> Tensor:
    """gelu_tanh(layer(x)), the activation in the product's epilogue."""
    if isinstance(layer, Int8Linear):
        return layer(x, "gelu_tanh")
    if isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        return ops.linear_gelu(x, layer.weight, layer.bias)
    return F.gelu(layer(x), approximate="tanh")  # what stands in for a layer: an adapter, a layer of another precision


def linears(layers: nn.Sequential) -> list[nn.Linear]:
    """The linear layers of a sequence, in order."""
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def linear_in(x: Tensor, linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer in `dtype`, whatever its weights are kept in."""
    return F.linear(x, linear.weight.to(dtype), linear.bias.to(dtype))


def linear_into(out: Tensor | None, x: Tensor, linear: nn.Module) -> Tensor:
    """The layer's output, written to the contiguous `out` where given: the same product and bits either way."""
    if out is None:
        return linear(x)
    if not isinstance(linear, nn.Linear):
        return out.copy_(linear(x))
    torch.addmm(linear.bias, x.flatten(0, -2), linear.weight.t(), out=out.view(-1, out.shape[-1]))
    return out
