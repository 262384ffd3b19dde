"""The decoder's convolutions, made from diffusers' weights: what each reads, and its weights in the order it reads.

A causal convolution of three temporal taps keeps its last three input frames in a ring of exactly three slots. Frame n
is written over frame n - 3 and nothing is moved: the convolution reads all slots in memory order, with its taps in the
order that they have there, one of three rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 3
FORMS = ("stacked", "frames")


def faster_form(in_channels: int, out_channels: int) -> str:
    """The form that cuDNN is faster at: for 192 to 192 channels at 232 x 416 "frames" takes 0.340 ms, "stacked" 0.367;
    at 96 channels 0.53 and 0.38, at 384 0.34 and 0.27 (H100, float16, one frame).
    """
    return "frames" if in_channels == out_channels == 192 else "stacked"


def _rotated(weight: Tensor, phase: int) -> list[Tensor]:
    """Taps of weight [O, I, 3, ...] by slot for frames n = phase (mod 3): slot n mod 3 holds the newest, tap 2."""
    return [weight[:, :, (slot - phase + 2) % TAPS] for slot in range(TAPS)]


@dataclass(frozen=True)
class CausalConv:
    """A 3 x 3 x 3 convolution with its ring as input.

    Attributes:
        weights: one tensor for each phase n mod 3: [O, 3 * I, 3, 3] where the form is "stacked" (the slots lie in the
            channels of a pixel, one 2D convolution a frame), [O, I, 3, 3, 3] where it is "frames" (a slot is a frame).
        bias: [O], which the pass after it adds, in float32 (float64 for float64).
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    form: str

    @classmethod
    def of(cls, conv: Any, dtype: torch.dtype, device: torch.device, form: str | None = None) -> CausalConv:
        """Take diffusers' `WanCausalConv3d`; its form is the faster one where None."""
        form = form or faster_form(conv.in_channels, conv.out_channels)
        weight = conv.weight.detach().to(device, dtype)
        if form == "stacked":
            weights = [torch.cat(_rotated(weight, phase), 1) for phase in range(TAPS)]
            layout = torch.channels_last
        else:
            weights = [torch.stack(_rotated(weight, phase), 2) for phase in range(TAPS)]
            layout = torch.channels_last_3d
        return cls(tuple(w.contiguous(memory_format=layout) for w in weights), vector(conv.bias, dtype, device), form)

    @property
    def in_channels(self) -> int:
        return self.weights[0].shape[1] // (TAPS if self.form == "stacked" else 1)

    def ring(self, height: int, width: int) -> Tensor:
        """A ring of zeros, which are the frames before the first: [H, W, 3, I], or [3, H, W, I] for "frames"."""
        shape = (height, width, TAPS) if self.form == "stacked" else (TAPS, height, width)
        return self.weights[0].new_zeros(*shape, self.in_channels)

    def slot(self, ring: Tensor, n: int) -> Tensor:
        """Where frame n is written: a view [H, W, I]."""
        return ring[:, :, n % TAPS] if self.form == "stacked" else ring[n % TAPS]

    def __call__(self, ring: Tensor, n: int) -> Tensor:
        """Frame n of the output [H, W, O], without the bias."""
        weight = self.weights[n % TAPS]
        if self.form == "stacked":
            return conv2d(ring.flatten(2), weight, 1)
        y = F.conv3d(ring.permute(3, 0, 1, 2).unsqueeze(0), weight, padding=(0, 1, 1))
        y = y.contiguous(memory_format=torch.channels_last_3d)  # it is, but on a CPU
        return y[0, :, 0].permute(1, 2, 0)


@dataclass(frozen=True)
class TemporalUpsample:
    """The (3, 1, 1) convolution that makes two frames of one, as a product with stacked taps.

    Attributes:
        weights: [phase][frame] -> [3 * C, C], for each of the two frames that come out.
        biases: [frame] -> [C].
    """

    weights: tuple[tuple[Tensor, ...], ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, conv: Any, dtype: torch.dtype, device: torch.device) -> TemporalUpsample:
        weight = conv.weight.detach().to(device, dtype)[..., 0, 0]
        by_phase = [torch.cat(_rotated(weight, phase), 1).chunk(2) for phase in range(TAPS)]
        biases = conv.bias.detach().to(device, dtype).chunk(2)
        return cls(tuple(tuple(half.t() for half in halves) for halves in by_phase), tuple(b.clone() for b in biases))

    @property
    def channels(self) -> int:
        return self.biases[0].shape[0]

    def ring(self, height: int, width: int) -> Tensor:
        """[H, W, 3, C] of zeros."""
        return self.biases[0].new_zeros(height, width, TAPS, self.channels)

    def __call__(self, ring: Tensor, n: int, frame: int) -> Tensor:
        """Output frame 2n + `frame` [H, W, C], the bias added."""
        height, width = ring.shape[:2]
        rows = ring.view(height * width, -1)
        return torch.addmm(self.biases[frame], rows, self.weights[n % TAPS][frame]).view(height, width, -1)


@dataclass(frozen=True)
class SpatialUpsample:
    """Nearest upsampling by two and a 3 x 3 convolution, as one 2 x 2 convolution of the small frame.

    Output row 2i sees the small rows i - 1, i, i through the kernel's three rows, row 2i + 1 the rows i, i, i + 1: two
    weights always meet one pixel, and are summed beforehand. The four kinds of output pixel, by the parities of its
    row and column, are groups of output channels: with a border of one, pixel (2i + a, 2j + b) is group 2a + b of
    (i + a, j + b).

    Attributes:
        weight: [4 * O, I, 2, 2].
        bias: [O], which the pass after it adds.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, conv: Any, dtype: torch.dtype, device: torch.device) -> SpatialUpsample:
        weight = conv.weight.detach().to(device, torch.float64)
        even = torch.tensor(
            [[1.0, 0, 0], [0, 1, 1]], dtype=torch.float64, device=device
        )  # by kernel row: rows i - 1, i
        odd = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=torch.float64, device=device)  # rows i, i + 1
        groups = [
            torch.einsum("ur,vc,oirc->oiuv", rows, columns, weight) for rows in (even, odd) for columns in (even, odd)
        ]
        folded = torch.cat(groups).to(dtype).contiguous(memory_format=torch.channels_last)
        return cls(folded, vector(conv.bias, dtype, device))

    def __call__(self, x: Tensor) -> Tensor:
        """x [H, W, I] -> [H + 1, W + 1, 4 * O], without the bias."""
        return conv2d(x, self.weight, 1)


@dataclass(frozen=True)
class TapsOut:
    """The last convolution, of few output channels: its taps are output channels of one 2D convolution, so that what is
    kept for later frames are partial sums of pixels and no input frames.

    Attributes:
        weight: [3 * O, I, 3, 3], oldest tap first, with zeros up to a multiple of 8 channels.
        bias: [O].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, conv: Any, dtype: torch.dtype, device: torch.device) -> TapsOut:
        weight = conv.weight.detach().to(device, dtype)
        taps = weight.permute(2, 0, 1, 3, 4).flatten(0, 1)
        padding = taps.new_zeros(-taps.shape[0] % 8, *taps.shape[1:])
        folded = torch.cat([taps, padding]).contiguous(memory_format=torch.channels_last)
        return cls(folded, vector(conv.bias, dtype, device))

    def partial(self, height: int, width: int) -> Tensor:
        """Partial sums of the next two frames [2, H, W, O], zeros, in the bias's dtype."""
        return self.bias.new_zeros(2, height, width, self.bias.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        """x [H, W, I] -> [H, W, >= 3 * O]."""
        return conv2d(x, self.weight, 1)


def vector(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bias or gamma, flat, in float32, or float64 where the decoder computes in it."""
    return parameter.detach().to(device, torch.promote_types(dtype, torch.float32)).flatten().contiguous()


def conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """x [H, W, I], contiguous -> [H', W', O], contiguous: a convolution in channels-last layout."""
    y = F.conv2d(x.permute(2, 0, 1).unsqueeze(0), weight, padding=padding)
    y = y.contiguous(memory_format=torch.channels_last)  # as all libraries leave it that take the input so
    return y[0].permute(1, 2, 0)
