"""Ulysses sequence sharding: which tokens of a chunk a rank has, and the exchange of tokens for heads and back.

Outside self-attention a rank has its own tokens and all heads; inside, all the chunk's tokens and its own heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.parallel import int8_exchange
from lingbot_kernels.parallel.int8_exchange import Quantized
from lingbot_kernels.realtime.kv_cache import Int8KeyValue
from lingbot_kernels.ring import ChunkPosition, RingPosition

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # named anew in torch 2.13


def sequence_splits(total: int, ranks: int) -> tuple[int, ...]:
    """Tokens of each rank: total / ranks, and one more for the first total % ranks.

    Raises:
        ValueError: a rank would have no token.
    """
    if ranks < 1 or total < ranks:
        raise ValueError(f"total, ranks: got {total} tokens over {ranks} ranks, must be at least one token a rank")
    each, more = divmod(total, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


@dataclass(frozen=True)
class SequenceShard:
    """One rank's part of a chunk. The default is all of any chunk on a single rank, where every exchange is nothing.

    Attributes:
        splits: tokens of each rank.
        rank: this rank's index in `group`.
        group: the process group of the exchanges.
    """

    splits: tuple[int, ...] = ()
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def ranks(self) -> int:
        return max(len(self.splits), 1)

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank has."""
        return self.splits[self.rank]

    @property
    def start(self) -> int:
        """Index of this rank's first token in the chunk."""
        return sum(self.splits[: self.rank])

    @cached_property
    def tokens(self) -> slice:
        """This rank's tokens of the chunk."""
        return slice(self.start, self.start + self.num_tokens) if self.splits else slice(None)

    @cached_property
    def uniform(self) -> bool:
        """Whether every rank has as many tokens, so that the fixed-size collectives serve."""
        return len(set(self.splits)) <= 1

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
        """`ops.qk_norm_rope_kv_write` of the chunk, from each rank's tokens into each rank's heads of the ring.

        Args:
            q, k, v: [B, S of this rank, D].
            cos_sin: float32 [S of this rank, head_dim].
            k_cache, v_cache: [B, capacity, heads / ranks, head_dim].

        Returns:
            Q of all the chunk's tokens for this rank's heads, a strided [B, S, heads / ranks, head_dim] (one rank:
            [B, S, D]).
        """
        if self.ranks == 1:
            return ops.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring, eps)
        packed = ops.qk_norm_rope_pack(q, k, v, q_weight, k_weight, cos_sin, self.ranks, eps)
        all_q = ops.qkv_unpack_kv_write(self.exchange_qkv(packed), k_cache, v_cache, ring)
        assert all_q is not None
        return all_q

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
        """The same without Q anywhere: only K and V are exchanged."""
        if self.ranks == 1:
            ops.k_norm_rope_kv_write(k, v, k_weight, cos_sin, k_cache, v_cache, ring, eps)
            return
        packed = ops.qk_norm_rope_pack(None, k, v, None, k_weight, cos_sin, self.ranks, eps)
        ops.qkv_unpack_kv_write(self.exchange_qkv(packed), k_cache, v_cache, ring)

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
        """`ops.qk_norm_rope_quantize_kv_write` of the chunk, likewise. Over ranks `position` has the chunk's slots.

        Returns:
            Q of all the chunk's tokens for this rank's heads: codes int8 [B, S, heads / ranks, head_dim] and scales
            float32 [B, S, heads / ranks], strided.
        """
        if self.ranks == 1:
            return ops.qk_norm_rope_quantize_kv_write(
                q, k, v, q_weight, k_weight, cos_sin, *kv, position.ring, eps
            )  # fmt: skip
        own = self._own_codes(k, cos_sin)
        own_q = ops.qk_norm_rope_quantize_kv_write(q, k, None, q_weight, k_weight, cos_sin, *own, RingPosition(), eps)
        all_q = self._exchange_int8(own_q, (own.k, own.k_scale), v, kv, position)
        assert all_q is not None
        return all_q

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
        """The same without Q anywhere: only K and V are exchanged."""
        if self.ranks == 1:
            ops.k_norm_rope_quantize_kv_write(k, v, k_weight, cos_sin, *kv, position.ring, eps)
            return
        own = self._own_codes(k, cos_sin)
        ops.k_norm_rope_quantize_kv_write(k, None, k_weight, cos_sin, *own, RingPosition(), eps)
        self._exchange_int8(None, (own.k, own.k_scale), v, kv, position)

    def _own_codes(self, k: Tensor, cos_sin: Tensor) -> Int8KeyValue:
        """What takes the codes and scales of this rank's K [B, S, D], all heads; its V is never read or written."""
        shape = (*k.shape[:2], k.shape[2] // cos_sin.shape[1], cos_sin.shape[1])
        codes, scale = k.new_empty(shape, dtype=torch.int8), k.new_empty(shape[:3], dtype=torch.float32)
        return Int8KeyValue(codes, scale, k.new_empty(shape))

    def _exchange_int8(
        self, q: Quantized | None, k: Quantized, v: Tensor, kv: Int8KeyValue, position: ChunkPosition
    ) -> Quantized | None:
        """One all-to-all of this rank's tokens for its heads; K and V into the ring. Returns Q, where there is one."""
        arrived = self.exchange_qkv(int8_exchange.pack(q, k, v, self.ranks))
        all_q, all_k, all_v = int8_exchange.unpack(arrived, kv.k.shape[2], kv.k.shape[3], q is not None)
        assert position.slots is not None
        int8_exchange.write(kv, position.slots, all_k, all_v)
        return all_q

    def exchange_qkv(self, packed: Tensor) -> Tensor:
        """[ranks, S of this rank, B, ...] -> [S, B, ...], such as (parts, h, head_dim): one all-to-all, no other pass.

        Tokens lead, so what arrives from the ranks in turn is the chunk in order, whatever the splits.
        """
        sent = packed.flatten(0, 1)
        received = packed.new_empty((sum(self.splits), *packed.shape[2:]))
        own = (self.num_tokens,) * self.ranks
        self._all_to_all(received, sent, received_splits=self.splits, sent_splits=own)
        return received

    def exchange_output(self, attended: Tensor) -> Tensor:
        """Attention's [B, S, h * head_dim] -> [B, S of this rank, D] with all heads, ready for the output projection.

        One all-to-all and one pass that lays the heads of a token side by side; nothing on a single rank.
        """
        if self.ranks == 1:
            return attended
        batch, _, width = attended.shape
        sent = attended.transpose(0, 1).contiguous()  # [S, B, h * head_dim]: no copy for a batch of one
        received = attended.new_empty((self.ranks, self.num_tokens, batch, width))
        own = (self.num_tokens,) * self.ranks
        self._all_to_all(received.flatten(0, 1), sent, received_splits=own, sent_splits=self.splits)
        return received.permute(2, 1, 0, 3).flatten(2)

    def gather(self, x: Tensor) -> Tensor:
        """Each rank's [B, S of the rank, C] -> [B, S, C] on every rank."""
        if self.ranks == 1:
            return x
        longest = max(self.splits)  # every rank sends as much: the fixed-size collective exists in every backend
        sent = F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, longest - x.shape[1])).contiguous()
        received = x.new_empty((self.ranks * longest, *sent.shape[1:]))
        all_gather(received, sent, group=self.group)
        if not self.uniform:
            parts = zip(received.split(longest), self.splits, strict=True)
            received = torch.cat([part[:tokens] for part, tokens in parts])
        return received.transpose(0, 1)

    def _all_to_all(
        self, received: Tensor, sent: Tensor, received_splits: tuple[int, ...], sent_splits: tuple[int, ...]
    ) -> None:
        if self.uniform:
            dist.all_to_all_single(received, sent, group=self.group)
        else:
            dist.all_to_all_single(received, sent, list(received_splits), list(sent_splits), group=self.group)
