"""RMSNorm and RoPE of Q and K, with K and V written to their ring slots."""

from __future__ import annotations

import torch

from lingbot_kernels.reference.rms_norm import rms_norm
from lingbot_kernels.reference.rope_cos_sin import apply_rope
from lingbot_kernels.ring import RingPosition


def norm_rope(x: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor, eps: float) -> torch.Tensor:
    """rope(rms_norm(x)) [B, S, H, head_dim] for x [B, S, D]: the norm is over all of D, before the head split."""
    return apply_rope(rms_norm(x, weight, eps).unflatten(-1, (-1, cos_sin.shape[-1])), cos_sin)


def qk_norm_rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ring: RingPosition,
    eps: float,
) -> torch.Tensor:
    """Returns rope(rms_norm(q)) [B, S, D]; writes rope(rms_norm(k)) and v to the chunk's slots of the caches.

    q, k, v [B, S, D]; weights [D]; cos_sin [S, head_dim]; caches [B, capacity, heads, head_dim].
    v None: V is already there.
    """
    k_norm_rope_kv_write(k, v, k_weight, cos_sin, k_cache, v_cache, ring, eps)
    return norm_rope(q, q_weight, cos_sin, eps).flatten(-2)


def k_norm_rope_kv_write(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ring: RingPosition,
    eps: float,
) -> None:
    """The write-only half: rope(rms_norm(k)) and v go to the chunk's slots of the caches; no Q anywhere."""
    slots = ring.slots(k.shape[1], k_cache.shape[1], k_cache.device)
    k_cache[:, slots] = norm_rope(k, k_weight, cos_sin, eps)
    if v is not None:
        v_cache[:, slots] = v.unflatten(-1, v_cache.shape[2:])
