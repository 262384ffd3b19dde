"""K and V of a received all-to-all buffer to their ring slots."""

from __future__ import annotations

import torch

from lingbot_kernels.ring import RingPosition


def qkv_unpack_kv_write(
    packed: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, ring: RingPosition
) -> torch.Tensor | None:
    """Write K and V of packed [S, B, parts, heads, head_dim] to the caches; return Q as a view [B, S, heads, head_dim].

    Parts are (q, k, v), or (k, v): then there is no Q and the result is None.
    """
    *q, k, v = packed.transpose(0, 1).unbind(2)
    slots = ring.slots(packed.shape[0], k_cache.shape[1], k_cache.device)
    k_cache[:, slots] = k
    v_cache[:, slots] = v
    return q[0] if q else None
