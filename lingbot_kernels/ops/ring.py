"""Where a chunk's tokens go in a K/V ring with a pinned sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    cursor: torch.Tensor | None = None

    def slots(self, num_tokens: int, capacity: int, device: torch.device | str) -> torch.Tensor:
        """The chunk's slots, int64 [num_tokens], computed on `device` without reading anything back to the host.

        Raises ValueError unless 0 <= sink < capacity.
        """
        if not 0 <= self.sink < capacity:
            raise ValueError(f"sink is {self.sink}, must lie in 0 .. capacity - 1 = {capacity - 1}")
        offset = torch.arange(num_tokens, dtype=torch.int64, device=device)
        position = offset + (self.chunk_start if self.cursor is None else self.cursor.to(torch.int64))
        wrapped = self.sink + (position - self.sink) % (capacity - self.sink)
        return torch.where(position < self.sink, position, wrapped)
