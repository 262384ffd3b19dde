"""What a chunk's forward reads besides the K/V ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lingbot_kernels.realtime.kv_cache import KeyValue


@dataclass(frozen=True)
class TimeEmbeddings:
    """What a timestep contributes, float32: blocks [L, 6, d] (shift, scale, gate of attention, then of the MLP), head
    [2, d].
    """

    blocks: Tensor
    head: Tensor

    @property
    def layers(self) -> list[Tensor]:
        return [self.blocks, self.head]


class PerBlock:
    """A value for each block, computed when the block asks: what stands in for a cache that is turned off."""

    def __init__(self, compute: Callable[[int], KeyValue]) -> None:
        self._compute = compute

    def __getitem__(self, index: int) -> KeyValue:
        return self._compute(index)


@dataclass(frozen=True)
class ChunkInputs:
    """Latents [B, C, F, H, W], cos‖sin and each block's camera (scale, shift) of this rank's tokens, each block's text
    K and V. Pairs in a list keep their addresses from forward to forward.
    """

    latents: Tensor
    cos_sin: Tensor
    time: TimeEmbeddings
    text_kv: Sequence[KeyValue] | PerBlock
    camera: Sequence[KeyValue] | PerBlock | None
