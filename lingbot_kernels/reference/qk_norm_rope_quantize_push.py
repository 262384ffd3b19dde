"""RMSNorm, RoPE and quantisation of a shard's Q and K, each rank's heads written to that rank's Q rows and K/V ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lingbot_kernels.reference.qk_norm_rope_quantize_kv_write import norm_rope_quantize
from lingbot_kernels.ring import RingPosition


def qk_norm_rope_quantize_push(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    q_outs: Sequence[torch.Tensor],
    q_scales: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    k_scales: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    ring: RingPosition,
    first_token: int,
    eps: float,
) -> None:
    """Token i of q, k, v [B, S, D] is token first_token + i of the chunk; rank r gets heads r * H / ranks onwards.

    Codes and scales as `qk_norm_rope_quantize_kv_write` makes them: of q to its row of q_outs[r]
    [B, chunk tokens, H / ranks, head_dim] and q_scales[r] [B, chunk tokens, H / ranks], of k to its slot of k_caches[r]
    [B, capacity, H / ranks, head_dim] and k_scales[r] [B, capacity, H / ranks]; v to its slot of v_caches[r]. Without q
    (and q_weight): K and V alone.
    """
    ranks, tokens = len(k_caches), k.shape[1]
    slots = ring.slots(first_token + tokens, k_caches[0].shape[1], k.device)[first_token:]
    rows = torch.arange(first_token, first_token + tokens, device=k.device)
    k_codes, k_scale = norm_rope_quantize(k, k_weight, cos_sin, eps)
    parts = [
        (k_caches, slots, k_codes),
        (k_scales, slots, k_scale),
        (v_caches, slots, v.unflatten(-1, (-1, cos_sin.shape[1]))),
    ]
    if q is not None:
        if q_weight is None:
            raise ValueError("q_weight is None, must be given with q")
        q_codes, q_scale = norm_rope_quantize(q, q_weight, cos_sin, eps)
        parts += [(q_outs, rows, q_codes), (q_scales, rows, q_scale)]
    for outs, where, values in parts:
        for out, heads in zip(outs, values.chunk(ranks, dim=2), strict=True):
            out[:, where] = heads
