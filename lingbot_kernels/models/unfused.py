"""What stands in for a fused pass where one of its layers must run by its own forward."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.reference.rope_cos_sin import apply_rope
from lingbot_kernels.ring import RingPosition


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
