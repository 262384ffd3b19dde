"""Where tokens go in a K/V ring with a pinned sink: positions, slots, and which tokens a ring holds.

Three numbers say where a chunk begins, each by a name of its own:

- `first_token`, absolute: the index in the rollout, which may begin anywhere; RoPE and the session count so;
- `chunk_start`, received: tokens that the ring had received before the chunk; the ops count so;
- `first_slot`: where that token lies. It may stand in for `chunk_start`, since slot(slot(p) + i) = slot(p + i), and
  stays small however long a rollout runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def slot(position: IntOrTensor, sink: int, capacity: int) -> IntOrTensor:
    """Slot of the token that a ring received as number `position`, from 0 on; of an integer tensor, each one's.

    slot(p) = p if p < sink else sink + (p - sink) % (capacity - sink).
    """
    if isinstance(position, Tensor):
        return position.clamp(max=sink) + (position - sink).clamp(min=0) % (capacity - sink)
    return position if position < sink else sink + (position - sink) % (capacity - sink)


@dataclass(frozen=True)
class RingPosition:
    """Position of a chunk in a K/V ring.

    Token i has position p = chunk_start + i, counted from the first token the cache received;
    slot(p) = p if p < sink else sink + (p - sink) % (capacity - sink).

    Attributes:
        chunk_start: tokens the cache had received before this chunk's first one.
        sink: leading slots that are never evicted.
        cursor: int32 tensor [1] on the cache's device that replaces `chunk_start`, so that a captured CUDA graph
            follows the ring; None to use `chunk_start`.
    """

    chunk_start: int = 0
    sink: int = 0
    cursor: Tensor | None = None

    def slots(self, num_tokens: int, capacity: int, device: torch.device | str) -> Tensor:
        """The chunk's slots, int64 [num_tokens], computed on `device` without reading anything back to the host.

        Raises ValueError unless 0 <= sink < capacity.
        """
        if not 0 <= self.sink < capacity:
            raise ValueError(f"sink is {self.sink}, must lie in 0 .. capacity - 1 = {capacity - 1}")
        offset = torch.arange(num_tokens, dtype=torch.int64, device=device)
        start = self.chunk_start if self.cursor is None else self.cursor.to(torch.int64)
        return slot(offset + start, self.sink, capacity)


def visible_segments(
    ring: RingPosition, num_tokens: int, capacity: int, num_visible: int, recent: int
) -> list[tuple[int, int]]:
    """Slot ranges of the sink and the `recent` latest tokens (the chunk's own included), in slot order, neighbours
    merged.

    `ring` must hold its position as an int: which slots are recent decides how many calls are made.
    """
    if ring.cursor is not None:
        raise ValueError("ring: got a device cursor, must hold an int position when `recent` is given")
    if recent < num_tokens:
        raise ValueError(f"recent: got {recent}, must be at least the chunk's {num_tokens} tokens")
    sink, turn = ring.sink, capacity - ring.sink
    # A full ring may tell its position by the slot alone, as the session's does: one turn on, the slots are the same.
    end = ring.chunk_start + num_tokens + (turn if num_visible == capacity else 0)
    first = max(end - recent, end - turn, min(sink, end))
    ranges = [(0, min(sink, num_visible))] if sink else []
    if end > sink:
        low, high = slot(first, sink, capacity), slot(end - 1, sink, capacity) + 1
        ranges += [(low, high)] if low < high else [(sink, high), (low, capacity)]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


@dataclass(frozen=True)
class ChunkPosition:
    """Where the blocks write a chunk and how much of the ring they see.

    Attributes:
        slots: the chunk's slots, int64 [S], once for all blocks; None where no block copies by them.
    """

    ring: RingPosition
    num_visible: int
    slots: Tensor | None = None


@dataclass(frozen=True)
class ChunkPlan:
    """What a forward at some position would do to the ring; `KVRing.commit` makes it so.

    Attributes:
        first_token: absolute index of the chunk's first token.
        tokens: tokens of the chunk.
        first_slot: slot of the chunk's first token, which serves as `RingPosition.chunk_start`.
        num_visible: slots that attention sees, the chunk's included.
        advances: whether this is the chunk's first forward.
    """

    first_token: int
    tokens: int
    first_slot: int
    num_visible: int
    advances: bool


class KVRing:
    """Which tokens a ring of `capacity` slots, the first `sink` of them pinned, holds and sees. Integers only.

    The first forward of a chunk advances the ring, which evicts exactly the overflow, right after the sink; later
    forwards of the same chunk overwrite its slots in place.

    Attributes:
        unfinished: (first token, tokens) of a chunk that must be done again before any other, see `failed`; else None.
    """

    def __init__(self, capacity: int, sink: int) -> None:
        for name, value in (("capacity", capacity), ("sink", sink)):
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}: got {value!r}, must be an int")
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity}, must be 1 or more")
        if not 0 <= sink < capacity:
            raise ValueError(f"sink: got {sink}, must be from 0 to capacity - 1 = {capacity - 1}")
        self.capacity, self.sink = int(capacity), int(sink)
        self.reset()

    def reset(self) -> None:
        self.unfinished: tuple[int, int] | None = None
        self._origin: int | None = None  # absolute index of the first token received
        self._end = 0  # absolute index after the last token received
        self._chunk_tokens = 0

    def state(self) -> dict[str, int | None]:
        """What `set_state` goes back to: origin (the first token received; None: none was), end, chunk_tokens."""
        return {"origin": self._origin, "end": self._end, "chunk_tokens": self._chunk_tokens}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take the position of another ring of the same capacity and sink.

        Raises:
            ValueError: no ring can stand there; this one is as it was.
        """
        values: tuple[Any, ...] = tuple(state.get(name) for name in ("origin", "end", "chunk_tokens"))
        possible = values == (None, 0, 0)
        if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            origin, end, tokens = values
            possible = 0 <= origin <= end - tokens and 1 <= tokens <= self.capacity - self.sink
        if not possible:
            raise ValueError(f"ring: got {dict(state)}, must fit {self.capacity} slots of which {self.sink} are pinned")
        self._origin, self._end, self._chunk_tokens = values
        self.unfinished = None

    @property
    def empty(self) -> bool:
        return self._origin is None

    @property
    def end(self) -> int:
        """Absolute index after the last token received; 0 while empty."""
        return self._end

    @property
    def first_token(self) -> int:
        """Absolute index of the current chunk's first token; 0 while empty."""
        return self._end - self._chunk_tokens

    @property
    def num_visible(self) -> int:
        return 0 if self._origin is None else min(self._end - self._origin, self.capacity)

    def plan(self, start: int, tokens: int) -> ChunkPlan:
        """What a forward of `tokens` tokens from absolute index `start` would do. Changes nothing.

        Raises:
            ValueError: a gap, a rewind to anything but the current chunk, a chunk of another length at the current
                position, one of more than capacity - sink tokens, or another chunk is `unfinished`.
        """
        if tokens < 1:
            raise ValueError(f"chunk: got {tokens} tokens, must be 1 or more")
        if tokens > self.capacity - self.sink:
            raise ValueError(
                f"chunk: got {tokens} tokens, must be at most capacity - sink = {self.capacity - self.sink}"
            )
        if start < 0:
            raise ValueError(f"start: got {start}, must be 0 or more")
        if self.unfinished not in (None, (start, tokens)):
            first, count = self.unfinished
            raise ValueError(
                f"start: got token {start} for {tokens}, must be {first} for {count}: a forward of that chunk failed "
                "when it had overwritten keys and values that this one would see; do it again first, or reset the ring"
            )
        received = 0 if self._origin is None else start - self._origin
        if self.empty or start == self._end:
            num_visible, advances = min(received + tokens, self.capacity), True
        elif start == self.first_token:
            if tokens != self._chunk_tokens:
                raise ValueError(f"chunk: got {tokens} tokens, must be the {self._chunk_tokens} it began with")
            num_visible, advances = self.num_visible, False
        else:
            kind = "leaves a gap" if start > self._end else "goes back"
            raise ValueError(
                f"start: got token {start}, which {kind}; must be {self._end} (the next chunk) or "
                f"{self.first_token} (the current one)"
            )
        return ChunkPlan(start, tokens, slot(received, self.sink, self.capacity), num_visible, advances)

    def commit(self, plan: ChunkPlan) -> None:
        """Take the position of a plan that this ring has just made."""
        self.unfinished = None
        if plan.advances:
            if self._origin is None:
                self._origin = plan.first_token
            self._end = plan.first_token + plan.tokens
            self._chunk_tokens = plan.tokens

    def failed(self, plan: ChunkPlan) -> None:
        """Say that forwards of the plan's chunk, from where this ring stands, failed when they may have written its
        slots. Where another chunk would see those (they were the current chunk's, or evicted ones), `plan` refuses any
        other from now on, until this one is committed.
        """
        again = self.plan(plan.first_token, plan.tokens)
        if not again.advances or self.num_visible + plan.tokens > self.capacity:
            self.unfinished = (plan.first_token, plan.tokens)
