"""What stands in for a fused pass where one of its layers must run by its own forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.quantization import Taken
from lingbot_kernels.realtime.kv_cache import KeyValue
from lingbot_kernels.reference.rope_cos_sin import apply_rope
from lingbot_kernels.ring import ChunkPosition, RingPosition


def self_attention(
    attention: Any, x: Taken, cos_sin: Tensor, kv: KeyValue, position: ChunkPosition, update_cache_only: bool,
    shard: SequenceShard,
) -> Tensor | None:  # fmt: skip
    """`CausalLingBotSelfAttention.forward` where a norm has hooks or is of another class: norms are called, and RoPE is
    a pass of its own.
    """
    if shard.ranks > 1:
        raise ValueError(
            "norm_q, norm_k: got hooks or another class than RMSNorm, must be plain where the sequence is sharded"
        )
    *first, k, v = attention.qkv(*("k", "v") if update_cache_only else ("q", "k", "v"), x=x)
    q = rope_kv_write(
        attention.norm_q(first[0]) if first else None, attention.norm_k(k), v, cos_sin, *kv, position.ring
    )  # fmt: skip
    return None if q is None else attention.o(ops.windowed_attention(q, *kv, position.num_visible))


def rope_kv_write(
    q: Tensor | None, k: Tensor, v: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, ring: RingPosition
) -> Tensor | None:
    """`ops.qk_norm_rope_kv_write` for q, k [B, S, D] that are normalised already: rotated q, or None without one.

    cos_sin [S, head_dim]; rope(k) and v go to the chunk's slots of the caches [B, capacity, heads, head_dim].
    """
    slots = ring.slots(k.shape[1], k_cache.shape[1], k_cache.device)
    k_cache[:, slots] = rope(k, cos_sin).unflatten(-1, k_cache.shape[2:])
    v_cache[:, slots] = v.unflatten(-1, v_cache.shape[2:])
    return None if q is None else rope(q, cos_sin)


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [B, S, D] with the pairs of each head rotated by cos_sin [S, head_dim]."""
    return apply_rope(x.unflatten(-1, (-1, cos_sin.shape[-1])), cos_sin).flatten(-2)
