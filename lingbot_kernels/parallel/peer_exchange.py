"""The exchange of tokens for heads through memory that the ranks share: the norm's kernel writes each rank's heads
where that rank reads them, and a barrier takes the place of each all-to-all.

Why one buffer of a kind serves all layers and forwards: who writes to a rank's Q rows, ring slots or output rows has
passed a barrier that this rank entered after its last read of them (the output's barrier comes after attention has read
Q and the ring, the next layer's first one after the output projection).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.parallel.peer_memory import PeerMemory
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.realtime.kv_cache import CacheLayout
from lingbot_kernels.ring import RingPosition


@dataclass(frozen=True)
class Arrivals:
    """Where this rank's Q [B, chunk tokens, heads, head_dim] and output rows [B, longest split, D] arrive, and the
    same on every rank (`outs` cut to each rank's tokens).
    """

    memory: PeerMemory
    q: Tensor
    qs: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]


class PeerSession:
    """What one session shares with the other ranks: its K/V rings, and where Q and the output arrive.

    Made and grown on every rank at once, since the ranks agree on each forward before they run it.
    """

    def __init__(self, group: dist.ProcessGroup, layout: CacheLayout) -> None:
        self._group, self._layout = group, layout
        size = torch.Size(layout.shape).numel() * layout.dtype.itemsize
        self._rings = PeerMemory(group, layout.device, PeerMemory.nbytes_of(*[size] * (2 * layout.num_layers)))
        self._arrivals: dict[tuple[int, ...], Arrivals] = {}

    def empty(self) -> Tensor:
        """One K or V buffer of a layer, [B, capacity, heads, head_dim], not initialised."""
        return self._rings.empty(self._layout.shape, self._layout.dtype)

    def everywhere(self, cache: Tensor) -> tuple[Tensor, ...]:
        """A buffer of `empty` on each rank."""
        return self._rings.everywhere(cache)

    def arrivals(self, splits: tuple[int, ...]) -> Arrivals:
        """For chunks that are split like this; kept."""
        if splits not in self._arrivals:
            layout = self._layout
            batch, _, heads, head_dim = layout.shape
            shapes = (
                (batch, sum(splits), heads, head_dim),
                (batch, max(splits), len(splits) * heads * head_dim),
            )
            sizes = [torch.Size(shape).numel() * layout.dtype.itemsize for shape in shapes]
            memory = PeerMemory(self._group, layout.device, PeerMemory.nbytes_of(*sizes))
            q, out = (memory.empty(shape, layout.dtype) for shape in shapes)
            self._arrivals[splits] = Arrivals(memory, q, memory.everywhere(q), memory.everywhere(out, rows=splits))
        return self._arrivals[splits]

    def nbytes(self) -> int:
        """Bytes held besides the rings."""
        return sum(arrivals.memory.nbytes for arrivals in self._arrivals.values())


@dataclass(frozen=True)
class PeerShard(SequenceShard):
    """`SequenceShard` whose exchanges are writes to the other ranks' memory, a session's own."""

    session: PeerSession = field(kw_only=True, repr=False)

    def qk_norm_rope_kv_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        ring: RingPosition,
        eps: float,
    ) -> Tensor:
        arrivals, everywhere = self.session.arrivals(self.splits), self.session.everywhere
        ops.qk_norm_rope_push(
            q, k, v, q_weight, k_weight, cos_sin, arrivals.qs, everywhere(k_cache), everywhere(v_cache), ring,
            self.start, eps,
        )  # fmt: skip
        arrivals.memory.barrier()
        return arrivals.q

    def k_norm_rope_kv_write(
        self,
        k: Tensor,
        v: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        ring: RingPosition,
        eps: float,
    ) -> None:
        everywhere = self.session.everywhere
        ops.qk_norm_rope_push(
            None, k, v, None, k_weight, cos_sin, (), everywhere(k_cache), everywhere(v_cache), ring, self.start, eps
        )
        self.session.arrivals(self.splits).memory.barrier()

    def exchange_output(self, attended: Tensor) -> Tensor:
        arrivals = self.session.arrivals(self.splits)
        ops.attention_output_push(attended, arrivals.outs, self.rank * attended.shape[2])
        arrivals.memory.barrier()
        return arrivals.outs[self.rank]
