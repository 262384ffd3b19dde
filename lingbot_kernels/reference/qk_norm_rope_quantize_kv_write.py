"""RMSNorm and RoPE of Q and K, both as int8 codes with a scale for each token and head; K and V go to their slots."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype
from lingbot_kernels.reference.rms_norm import rms_norm
from lingbot_kernels.reference.rope_cos_sin import apply_rope
from lingbot_kernels.reference.rotate_quantize import quantize_values
from lingbot_kernels.ring import RingPosition


def norm_rope_quantize(
    x: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [B, S, H, head_dim], scale float32 [B, S, H]) of rope(rms_norm(x)) for x [B, S, D].

    The norm rounds to x's dtype as `rms_norm` does; the rotated values stay in the accumulation dtype, and a token's
    head is a row of `quantize_values`.
    """
    heads = rms_norm(x, weight, eps).unflatten(-1, (-1, cos_sin.shape[-1]))
    return quantize_values(apply_rope(heads.to(accumulation_dtype(x.dtype)), cos_sin))


def qk_norm_rope_quantize_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    ring: RingPosition,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns Q's codes int8 [B, S, heads, head_dim] and scales float32 [B, S, heads]; writes K's and v to their slots.

    q, k, v [B, S, D]; weights [D]; cos_sin [S, head_dim]; k_cache int8 and v_cache [B, capacity, heads, head_dim];
    k_scale float32 [B, capacity, heads]. v None: V is already there.
    """
    k_norm_rope_quantize_kv_write(k, v, k_weight, cos_sin, k_cache, k_scale, v_cache, ring, eps)
    return norm_rope_quantize(q, q_weight, cos_sin, eps)


def k_norm_rope_quantize_kv_write(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    ring: RingPosition,
    eps: float,
) -> None:
    """The write-only half; no Q anywhere."""
    slots = ring.slots(k.shape[1], k_cache.shape[1], k_cache.device)
    k_cache[:, slots], k_scale[:, slots] = norm_rope_quantize(k, k_weight, cos_sin, eps)
    if v is not None:
        v_cache[:, slots] = v.unflatten(-1, v_cache.shape[2:])
