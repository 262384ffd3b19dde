"""Self-attention's K/V ring with a pinned sink, and cross-attention's K/V."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lingbot_kernels.ops.ring import RingPosition


@dataclass(frozen=True)
class ChunkPlan:
    """What a forward at some position would do to the ring; `KVRing.commit` makes it so.

    Attributes:
        start: absolute index of the chunk's first token.
        tokens: tokens of the chunk.
        chunk_start: slot-equivalent ring position of the chunk's first token (see `KVRing.plan`).
        num_visible: slots that attention sees, the chunk's included.
        advances: whether this is the chunk's first forward.
    """

    start: int
    tokens: int
    chunk_start: int
    num_visible: int
    advances: bool


class KVRing:
    """Which tokens a ring of `capacity` slots, the first `sink` of them pinned, holds and sees. Integers only.

    The first forward of a chunk advances the ring, which evicts exactly the overflow, right after the sink; later
    forwards of the same chunk overwrite its slots in place.
    """

    def __init__(self, capacity: int, sink: int) -> None:
        if not 0 <= sink < capacity:
            raise ValueError(f"sink: got {sink}, must be from 0 to capacity - 1 = {capacity - 1}")
        self.capacity = capacity
        self.sink = sink
        self.reset()

    def reset(self) -> None:
        self._origin: int | None = None  # absolute index of the first token received
        self._end = 0  # absolute index after the last token received
        self._chunk_tokens = 0

    @property
    def empty(self) -> bool:
        return self._origin is None

    @property
    def end(self) -> int:
        """Absolute index after the last token received; 0 while empty."""
        return self._end

    @property
    def chunk_start(self) -> int:
        """Absolute index of the current chunk's first token."""
        return self._end - self._chunk_tokens

    @property
    def num_visible(self) -> int:
        return 0 if self._origin is None else min(self._end - self._origin, self.capacity)

    def plan(self, start: int, tokens: int) -> ChunkPlan:
        """What a forward of `tokens` tokens from absolute index `start` would do. Changes nothing.

        The plan's chunk_start is the slot of the chunk's first token: slot(slot(p) + i) = slot(p + i), and a slot
        stays small however long a rollout runs.

        Raises:
            ValueError: a gap, a rewind to anything but the current chunk, a chunk of another length at the current
                position, or one of more than capacity - sink tokens.
        """
        if tokens < 1:
            raise ValueError(f"chunk: got {tokens} tokens, must be 1 or more")
        if tokens > self.capacity - self.sink:
            raise ValueError(
                f"chunk: got {tokens} tokens, must be at most capacity - sink = {self.capacity - self.sink}"
            )
        if start < 0:
            raise ValueError(f"start: got {start}, must be 0 or more")
        if self._origin is None:
            return ChunkPlan(start, tokens, 0, tokens, advances=True)
        if start == self._end:
            received = start - self._origin
            return ChunkPlan(start, tokens, self._slot(received), min(received + tokens, self.capacity), advances=True)
        if start == self.chunk_start:
            if tokens != self._chunk_tokens:
                raise ValueError(f"chunk: got {tokens} tokens, must be the {self._chunk_tokens} it began with")
            return ChunkPlan(start, tokens, self._slot(start - self._origin), self.num_visible, advances=False)
        kind = "leaves a gap" if start > self._end else "goes back"
        raise ValueError(
            f"start: got token {start}, which {kind}; must be {self._end} (the next chunk) or "
            f"{self.chunk_start} (the current one)"
        )

    def commit(self, plan: ChunkPlan) -> None:
        """Take the position of a plan that this ring has just made."""
        if plan.advances:
            if self._origin is None:
                self._origin = plan.start
            self._end = plan.start + plan.tokens
            self._chunk_tokens = plan.tokens

    def _slot(self, position: int) -> int:
        if position < self.sink:
            return position
        return self.sink + (position - self.sink) % (self.capacity - self.sink)


@dataclass(frozen=True)
class ChunkPosition:
    """Where the blocks write a chunk and how much of the ring they see."""

    ring: RingPosition
    num_visible: int


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

    def empty(self) -> Tensor:
        """One layer's K or V, of the layout's shape."""

    def nbytes(self) -> int:
        """Bytes held besides the rings."""


class KVCache:
    """Keys (after RoPE) and values of every layer's window: one K and one V buffer a layer, never rolled or copied.

    Attributes:
        memory: what the buffers lie in; None for plain device memory.
    """

    def __init__(self, layout: CacheLayout, memory: RingMemory | None = None) -> None:
        self.layout = layout
        self.memory = memory
        self.ring = layout.empty_ring()
        self.layers = [(self._empty(), self._empty()) for _ in range(layout.num_layers)]
        self._cursor: Tensor | None = None

    def position(self, plan: ChunkPlan) -> ChunkPosition:
        """The plan as the ops want it, by Python ints."""
        return ChunkPosition(RingPosition(plan.chunk_start, self.ring.sink), plan.num_visible)

    def device_position(self, plan: ChunkPlan) -> ChunkPosition:
        """The plan with its ring position in device memory, set now: what a captured CUDA graph reads at each
        replay.
        """
        if self._cursor is None:
            self._cursor = torch.empty(1, dtype=torch.int32, device=self.layout.device)
        self._cursor.fill_(plan.chunk_start)
        return ChunkPosition(RingPosition(0, self.ring.sink, self._cursor), plan.num_visible)

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer on the device, the cursor's included."""
        for layer in self.layers:
            yield from layer
        if self._cursor is not None:
            yield self._cursor

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def _empty(self) -> Tensor:
        if self.memory is not None:
            return self.memory.empty()
        return torch.empty(self.layout.shape, dtype=self.layout.dtype, device=self.layout.device)


class CrossAttentionCache:
    """Text keys (after their norm) and values of every layer, [B, text_len, heads, head_dim] each."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)
