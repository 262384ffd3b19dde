"""The exchange of tokens for heads through memory that the ranks share: the norm's kernel writes each rank's heads
where that rank reads them, and a barrier takes the place of each all-to-all.

Why one buffer of a kind serves all layers and forwards: who writes to a rank's Q rows, ring slots or output rows has
passed a barrier that this rank entered after its last read of them (the output's barrier comes after attention has read
Q and the ring, the next layer's first one after the output projection).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.parallel.int8_exchange import Quantized
from lingbot_kernels.parallel.peer_memory import PeerMemory
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.realtime.kv_cache import CacheLayout, Int8KeyValue
from lingbot_kernels.ring import ChunkPosition, RingPosition


@dataclass(frozen=True)
class Arrivals:
    """Where this rank's Q [B, chunk tokens, heads, head_dim] and output rows [B, longest split, D] arrive, and the
    same on every rank (`outs` cut to each rank's tokens); where Q is in int8 its scales [B, chunk tokens, heads] too.
    """

    memory: PeerMemory
    q: Tensor
    qs: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    q_scale: Tensor | None = None
    q_scales: tuple[Tensor, ...] = ()


class PeerSession:
    """What one session shares with the other ranks: its K/V rings, and where Q and the output arrive.

    Made and grown on every rank at once, since the ranks agree on each forward before they run it.
    """

    def __init__(self, group: dist.ProcessGroup, layout: CacheLayout) -> None:
        self._group, self._layout = group, layout
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.parts()]
        self._rings = PeerMemory(group, layout.device, PeerMemory.nbytes_of(*sizes * layout.num_layers))
        self._arrivals: dict[tuple[int, ...], Arrivals] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next buffer of a ring, not initialised."""
        return self._rings.empty(shape, dtype)

    def everywhere(self, cache: Tensor) -> tuple[Tensor, ...]:
        """A buffer of `empty` on each rank, or the transpose (1, 2) of one."""
        if cache.is_contiguous():
            return self._rings.everywhere(cache)
        return tuple(x.transpose(1, 2) for x in self._rings.everywhere(cache.transpose(1, 2)))

    def arrivals(self, splits: tuple[int, ...]) -> Arrivals:
        """For chunks that are split like this; kept."""
        if splits not in self._arrivals:
            layout, int8 = self._layout, self._layout.k_dtype is not None
            batch, _, heads, head_dim = layout.shape
            parts: list[tuple[tuple[int, ...], torch.dtype]] = [
                ((batch, sum(splits), heads, head_dim), layout.k_dtype or layout.dtype),
                ((batch, max(splits), len(splits) * heads * head_dim), layout.dtype),
                *([((batch, sum(splits), heads), torch.float32)] if int8 else []),
            ]
            sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts]
            memory = PeerMemory(self._group, layout.device, PeerMemory.nbytes_of(*sizes))
            q, out, *scales = (memory.empty(shape, dtype) for shape, dtype in parts)
            found = Arrivals(memory, q, memory.everywhere(q), memory.everywhere(out, rows=splits))
            if int8:
                found = replace(found, q_scale=scales[0], q_scales=memory.everywhere(scales[0]))
            self._arrivals[splits] = found
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

    def qk_norm_rope_quantize_kv_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        kv: Int8KeyValue,
        position: ChunkPosition,
        eps: float,
    ) -> Quantized:
        arrivals = self.session.arrivals(self.splits)
        k_caches, k_scales, v_caches = map(self.session.everywhere, kv)
        assert arrivals.q_scale is not None
        ops.qk_norm_rope_quantize_push(
            q, k, v, q_weight, k_weight, cos_sin, arrivals.qs, arrivals.q_scales, k_caches, k_scales, v_caches,
            position.ring, self.start, eps,
        )  # fmt: skip
        arrivals.memory.barrier()
        return arrivals.q, arrivals.q_scale

    def k_norm_rope_quantize_kv_write(
        self,
        k: Tensor,
        v: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        kv: Int8KeyValue,
        position: ChunkPosition,
        eps: float,
    ) -> None:
        k_caches, k_scales, v_caches = map(self.session.everywhere, kv)
        ops.qk_norm_rope_quantize_push(
            None, k, v, None, k_weight, cos_sin, (), (), k_caches, k_scales, v_caches, position.ring, self.start, eps
        )
        self.session.arrivals(self.splits).memory.barrier()

    def exchange_output(self, attended: Tensor) -> Tensor:
        arrivals = self.session.arrivals(self.splits)
        ops.attention_output_push(attended, arrivals.outs, self.rank * attended.shape[2])
        arrivals.memory.barrier()
        return arrivals.outs[self.rank]
