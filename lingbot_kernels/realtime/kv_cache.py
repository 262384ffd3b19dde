"""The memory of self-attention's K/V rings and of cross-attention's K/V."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lingbot_kernels.ring import ChunkPlan, ChunkPosition, KVRing, RingPosition
from lingbot_kernels.scalars import as_count, as_counts

KeyValue = tuple[Tensor, Tensor]


class Int8KeyValue(NamedTuple):
    """A layer's ring whose K is in int8, as `ops.int8_attention` reads it: codes `k`, int8 [B, capacity, heads,
    head_dim]; `k_scale`, float32 [B, capacity, heads], the transpose of [B, heads, capacity]; `v` [B, capacity, heads,
    head_dim].
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor


RingLayer = KeyValue | Int8KeyValue


def ring_parts(layer: RingLayer) -> dict[str, Tensor]:
    """A layer's tensors by name: "k", "v" and, where K is in int8, "k_scale"."""
    return layer._asdict() if isinstance(layer, Int8KeyValue) else {"k": layer[0], "v": layer[1]}


@dataclass(frozen=True)
class CacheLayout:
    """Everything that a session's K/V ring is made for; a forward that differs is refused."""

    num_layers: int
    batch: int
    heads: int
    head_dim: int
    grid: tuple[int, int]  # rows and columns of tokens in a frame
    window_frames: int
    sink_frames: int
    dtype: torch.dtype
    device: torch.device
    k_dtype: torch.dtype | None = None  # of K where it isn't `dtype`: int8, codes with a scale for each token and head

    def __post_init__(self) -> None:
        for name in ("num_layers", "batch", "heads", "head_dim", "window_frames"):
            as_count(name, getattr(self, name), 1)
        as_counts("grid", self.grid, 1, "(rows, columns)")
        if as_count("sink_frames", self.sink_frames, 0) >= self.window_frames:
            raise ValueError(f"sink_frames: got {self.sink_frames}, must be less than {self.window_frames} in all")
        if self.k_dtype not in (None, torch.int8):
            raise ValueError(f"k_dtype: got {self.k_dtype}, must be None or torch.int8")

    def parts(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of what a layer's ring is made of, as it lies in memory: K, its scales where it is in int8
        (float32 [B, heads, capacity]), V.
        """
        k, v = (self.shape, self.k_dtype or self.dtype), (self.shape, self.dtype)
        if self.k_dtype is None:
            return k, v
        batch, capacity, heads, _ = self.shape
        return k, ((batch, heads, capacity), torch.float32), v

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one layer's K, and of its V: [B, capacity, heads, head_dim]."""
        return (self.batch, self.window_frames * self.frame_tokens, self.heads, self.head_dim)

    def empty_ring(self) -> KVRing:
        """The bookkeeping of such a cache, before its first chunk."""
        return KVRing(self.shape[1], self.sink_frames * self.frame_tokens)

    def differences(self, other: CacheLayout) -> list[str]:
        """Fields in which `other` differs, as "name: got other's, must be this one's"."""
        return [
            f"{name}: got {getattr(other, name)}, must be {getattr(self, name)}"
            for name in self.__dataclass_fields__
            if getattr(other, name) != getattr(self, name)
        ]


class RingMemory(Protocol):
    """Memory that a session's rings lie in where it is not plain device memory."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of a layer's ring, not initialised: K, its scales where it is in int8, V, layer by layer."""

    def nbytes(self) -> int:
        """Bytes held besides the rings."""


class KVCache:
    """Keys (after RoPE) and values of every layer's window: one K and one V buffer a layer (K's scales beside where it
    is in int8), never rolled or copied.

    Attributes:
        memory: what the buffers lie in; None for plain device memory.
    """

    def __init__(self, layout: CacheLayout, memory: RingMemory | None = None) -> None:
        self.layout = layout
        self.memory = memory
        self.ring = layout.empty_ring()
        self.layers: list[RingLayer] = [self._layer() for _ in range(layout.num_layers)]
        self._cursor: Tensor | None = None

    def position(self, plan: ChunkPlan) -> ChunkPosition:
        """The plan as the ops want it, by Python ints."""
        return ChunkPosition(RingPosition(plan.first_slot, self.ring.sink), plan.num_visible)

    def device_position(self, plan: ChunkPlan) -> ChunkPosition:
        """The plan with its ring position in device memory, set now: what a captured CUDA graph reads at each
        replay.
        """
        if self._cursor is None:
            self._cursor = torch.empty(1, dtype=torch.int32, device=self.layout.device)
        self._cursor.fill_(plan.first_slot)
        return ChunkPosition(RingPosition(0, self.ring.sink, self._cursor), plan.num_visible)

    def with_slots(self, position: ChunkPosition, num_tokens: int) -> ChunkPosition:
        """The position with its slots in device memory, computed there: for a chunk of `num_tokens` tokens."""
        slots = position.ring.slots(num_tokens, self.layout.shape[1], self.layout.device)
        return replace(position, slots=slots)

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer on the device, the cursor's included."""
        yield from self.tensors_of_layers()
        if self._cursor is not None:
            yield self._cursor

    def tensors_of_layers(self) -> Iterator[Tensor]:
        """Each layer's K, its scales where it is in int8, then its V."""
        for layer in self.layers:
            yield from layer

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors_of_layers())

    def _layer(self) -> RingLayer:
        if self.memory is not None:
            parts = [self.memory.empty(shape, dtype) for shape, dtype in self.layout.parts()]
        else:
            device = self.layout.device
            parts = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.layout.parts()]
        if self.layout.k_dtype is None:
            return parts[0], parts[1]
        k, scale, v = parts
        return Int8KeyValue(k, scale.transpose(1, 2), v)


class CrossAttentionCache:
    """Text keys (after their norm) and values of every layer, [B, keys, heads, head_dim] each: of text_len
    keys, or of one more than the prompt where one key stands for its padding.
    """

    def __init__(self, layers: list[KeyValue]) -> None:
        self.layers = layers
