"""The Wan video decoder, one latent frame at a time, over weights taken from diffusers' `AutoencoderKLWan`.

Latent frame 0 makes one video frame, every later one four: two of the three upsamplings double the frames too. Each
stage runs all its layers on one frame before the next frame begins, and every product has the shape of one frame: what
comes out doesn't depend on how the stream is cut into calls. Between two products stands one pass (`frame_norm_silu`):
bias, residual, norm and SiLU, written where the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels.decoding.columns import Columns, stage_columns
from lingbot_kernels.decoding.convolutions import CausalConv, SpatialUpsample, TapsOut, TemporalUpsample, vector
from lingbot_kernels.ops import frame_norm_silu


@dataclass
class Sum:
    """A frame that the next pass adds up: y + bias, the stream so far and a shortcut, where there are any.

    Attributes:
        y: [H, W, C], or [H / 2 + 1, W / 2 + 1, 4 * C] straight from an upsampling convolution.
    """

    y: Tensor
    bias: Tensor
    stream: Tensor | None = None
    shortcut: Tensor | None = None
    upsampled: bool = False

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.y.shape[:2]
        return (2 * (height - 1), 2 * (width - 1)) if self.upsampled else (height, width)

    def columns(self, low: int, width: int) -> Sum:
        """The frame without the columns before `low` and after `width` more."""
        if self.upsampled:
            self.y = self.y[:, low // 2 : (low + width) // 2 + 1]
        else:
            self.y = self.y[:, low : low + width]
        if self.stream is not None:
            self.stream = self.stream[:, low : low + width]
        return self

    def into(
        self, gamma: Tensor | None, act: Tensor, *, silu: bool = True, keep: torch.dtype | None = None
    ) -> Tensor | None:
        """Write norm and SiLU of the frame to `act`, or the frame itself where gamma is None; return the frame as the
        new stream, of dtype `keep`, where that is given.
        """
        stream, add = self.stream, self.stream is not None
        if stream is None and keep is not None:
            stream = self.y.new_empty(*self.size, self.bias.shape[0], dtype=keep)
        frame_norm_silu(
            self.y, self.bias, act=act, gamma=gamma, residual=self.shortcut, stream=stream, add_stream=add, silu=silu,
            parities=self.upsampled,
        )  # fmt: skip
        return stream


@dataclass(frozen=True)
class Residual:
    """norm1, SiLU, conv1, norm2, SiLU, conv2; plus the block's input, through a 1 x 1 product where widths differ."""

    gamma1: Tensor
    conv1: CausalConv
    gamma2: Tensor
    conv2: CausalConv
    shortcut: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype, device: torch.device, form: str | None) -> Residual:
        conv1, conv2 = (CausalConv.of(c, dtype, device, form) for c in (block.conv1, block.conv2))
        shortcut, bias = None, conv2.bias
        if hasattr(block.conv_shortcut, "weight"):
            shortcut = block.conv_shortcut.weight.detach().to(device, dtype).flatten(1).t()
            bias = bias + vector(block.conv_shortcut.bias, dtype, device)
        gamma1, gamma2 = (vector(norm.gamma, dtype, device) for norm in (block.norm1, block.norm2))
        return cls(gamma1, conv1, gamma2, conv2, shortcut, bias)

    def rings(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        return self.conv1.ring(height, width), self.conv2.ring(height, width)

    def __call__(self, x: Sum, rings: tuple[Tensor, Tensor], n: int, stream_dtype: torch.dtype) -> Sum:
        stream = x.into(self.gamma1, self.conv1.slot(rings[0], n), keep=stream_dtype)
        assert stream is not None
        hidden = Sum(self.conv1(rings[0], n), self.conv1.bias)
        hidden.into(self.gamma2, self.conv2.slot(rings[1], n))
        y = self.conv2(rings[1], n)
        if self.shortcut is None:
            return Sum(y, self.bias, stream)
        return Sum(y, self.bias, None, stream.to(y.dtype) @ self.shortcut)


@dataclass(frozen=True)
class Attention:
    """Attention of a frame's pixels over one another, with one head, and its input added."""

    gamma: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    bias: Tensor

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype, device: torch.device) -> Attention:
        qkv, out = (x.weight.detach().to(device, dtype).flatten(1).t() for x in (block.to_qkv, block.proj))
        gamma, bias = vector(block.norm.gamma, dtype, device), vector(block.proj.bias, dtype, device)
        return cls(gamma, qkv, block.to_qkv.bias.detach().to(device, dtype), out, bias)

    def __call__(self, x: Sum, stream_dtype: torch.dtype) -> Sum:
        height, width = x.size
        channels = self.gamma.shape[0]
        normed = torch.empty(height, width, channels, dtype=self.qkv.dtype, device=x.y.device)
        stream = x.into(self.gamma, normed, silu=False, keep=stream_dtype)
        q, k, v = torch.addmm(self.qkv_bias, normed.view(-1, channels), self.qkv).chunk(3, dim=-1)
        attended = attend(q, k, v)
        return Sum((attended @ self.out).view(height, width, channels), self.bias, stream)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of [N, C] with one head.

    In 16 bits on a GPU the scores are written out: libraries' fused attention ends at 256 channels a head, and what is
    left for the decoder's 384 is slower than two products and a softmax.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        scores = torch.mm(q * (q.shape[1] ** -0.5), k.t())
        return torch.mm(scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


@dataclass(frozen=True)
class Stage:
    """The residual blocks of one resolution, and the upsampling to the next; the last has none."""

    blocks: tuple[Residual, ...]
    time: TemporalUpsample | None
    space: SpatialUpsample | None

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype, device: torch.device, form: str | None) -> Stage:
        blocks = tuple(Residual.of(resnet, dtype, device, form) for resnet in block.resnets)
        if block.upsamplers is None:
            return cls(blocks, None, None)
        (upsampler,) = block.upsamplers
        time = TemporalUpsample.of(upsampler.time_conv, dtype, device) if upsampler.mode == "upsample3d" else None
        return cls(blocks, time, SpatialUpsample.of(upsampler.resample[1], dtype, device))

    @property
    def reach(self) -> int:
        return 2 * len(self.blocks)


@dataclass
class Rings:
    """What one stream keeps between latent frames: three input frames of each causal convolution, and partial sums of
    the last one.

    Attributes:
        columns: those that each stage computes.
    """

    columns: list[Columns]
    conv_in: Tensor
    mid: list[tuple[Tensor, Tensor]]
    stages: list[list[tuple[Tensor, Tensor]]]
    time: list[Tensor | None]
    partial: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield self.conv_in
        for blocks in (self.mid, *self.stages):
            for pair in blocks:
                yield from pair
        yield from (ring for ring in self.time if ring is not None)
        yield self.partial


class DecoderNetwork:
    """The layers, in the order data flows. Immutable: what a stream keeps is in its `Rings`.

    Args:
        vae: diffusers' `AutoencoderKLWan`; its weights are copied.
        dtype: of weights and activations; norms, sums and partial sums of pixels are in float32 (float64 for float64).
        stream_dtype: of the residual stream between blocks.
        form: how causal convolutions are carried out (`CausalConv`); for each the faster where None.
    """

    def __init__(
        self,
        vae: Any,
        dtype: torch.dtype,
        device: torch.device,
        stream_dtype: torch.dtype,
        form: str | None,
    ) -> None:
        decoder = vae.decoder
        self.dtype, self.device, self.stream_dtype = dtype, device, stream_dtype
        self.z_dim = int(vae.config.z_dim)
        wide = torch.promote_types(dtype, torch.float32)
        self.post_quant = vae.post_quant_conv.weight.detach().to(device, wide).flatten(1).t()
        self.post_quant_bias = vector(vae.post_quant_conv.bias, dtype, device)
        self.conv_in = CausalConv.of(decoder.conv_in, dtype, device, form)
        self.mid = [Residual.of(block, dtype, device, form) for block in decoder.mid_block.resnets]
        self.attention = [Attention.of(block, dtype, device) for block in decoder.mid_block.attentions]
        self.stages = [Stage.of(block, dtype, device, form) for block in decoder.up_blocks]
        self.gamma_out = vector(decoder.norm_out.gamma, dtype, device)
        self.conv_out = TapsOut.of(decoder.conv_out, dtype, device)

    @property
    def space(self) -> int:
        """Pixels to a latent's side."""
        return 2 ** (len(self.stages) - 1)

    @property
    def time(self) -> int:
        """Video frames to a latent frame, after the first."""
        return int(2 ** sum(stage.time is not None for stage in self.stages))

    def rings(self, height: int, width: int, columns: Columns) -> Rings:
        """Empty rings of a stream of latents [height, width] of which the pixel `columns` are wanted."""
        reaches = [stage.reach for stage in self.stages]
        reaches[-1] += 1  # the last convolution
        regions = stage_columns(columns, width * self.space, reaches)
        stages, time = [], []
        for i, (stage, region) in enumerate(zip(self.stages, regions, strict=True)):
            size = (height << i, region.width)
            stages.append([block.rings(*size) for block in stage.blocks])
            time.append(stage.time.ring(*size) if stage.time is not None else None)
        mid = [block.rings(height, width) for block in self.mid]
        partial = self.conv_out.partial(height << (len(self.stages) - 1), columns.width)
        return Rings([*regions, columns], self.conv_in.ring(height, width), mid, stages, time, partial)

    def decode(self, latent: Tensor, n: int, rings: Rings) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode latent frame n [z_dim, H, W] and write it into the rings.

        Yields for each video frame the last convolution's taps [rows, columns, >= 3 * C] and its bias [C], from which
        `frame_pixels` makes the pixels.
        """
        z = latent.permute(1, 2, 0).to(self.post_quant.dtype)
        self.conv_in.slot(rings.conv_in, n).copy_(z @ self.post_quant + self.post_quant_bias)
        x = Sum(self.conv_in(rings.conv_in, n), self.conv_in.bias)
        for i, block in enumerate(self.mid):
            if i > 0:
                x = self.attention[i - 1](x, self.stream_dtype)
            x = block(x, rings.mid[i], n, self.stream_dtype)
        first = rings.columns[0]
        yield from self._stage(0, x.columns(first.low, first.width), n, rings)

    def _stage(self, i: int, x: Sum, n: int, rings: Rings) -> Iterator[tuple[Tensor, Tensor]]:
        """Stage i and all after it on the stage's frame n."""
        stage = self.stages[i]
        for block, block_rings in zip(stage.blocks, rings.stages[i], strict=True):
            x = block(x, block_rings, n, self.stream_dtype)
        height, width = x.size
        if stage.space is None:
            act = torch.empty(height, width, self.gamma_out.shape[0], dtype=self.dtype, device=self.device)
            x.into(self.gamma_out, act)
            region, wanted = rings.columns[i], rings.columns[i + 1]
            taps = self.conv_out(act)[:, wanted.low - region.low :][:, : wanted.width]
            yield taps, self.conv_out.bias
            return
        if stage.time is None or n == 0:
            # The first frame is never doubled and no later one sees it through the temporal convolution.
            small = torch.empty(height, width, x.bias.shape[0], dtype=self.dtype, device=self.device)
            x.into(None, small, silu=False)
            yield from self._next(i, small, n, rings)
            return
        ring = rings.time[i]
        assert ring is not None
        x.into(None, ring[:, :, (n - 1) % 3], silu=False)
        for frame in range(2):
            yield from self._next(i, stage.time(ring, n - 1, frame), 2 * n - 1 + frame, rings)

    def _next(self, i: int, small: Tensor, n: int, rings: Rings) -> Iterator[tuple[Tensor, Tensor]]:
        space = self.stages[i].space
        assert space is not None
        region, following = rings.columns[i], rings.columns[i + 1]
        x = Sum(space(small), space.bias, upsampled=True)
        yield from self._stage(i + 1, x.columns(following.low - 2 * region.low, following.width), n, rings)
