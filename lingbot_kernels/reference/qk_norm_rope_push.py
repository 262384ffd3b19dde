"""RMSNorm and RoPE of a shard's Q and K, each rank's heads written to that rank's Q rows and K/V ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lingbot_kernels.reference.qk_norm_rope_kv_write import norm_rope
from lingbot_kernels.ring import RingPosition


def qk_norm_rope_push(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    q_outs: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    ring: RingPosition,
    first_token: int,
    eps: float,
) -> None:
    """Token i of q, k, v [B, S, D] is token first_token + i of the chunk; rank r gets heads r * H / ranks onwards.

    Its row of q_outs[r] [B, chunk tokens, H / ranks, head_dim] becomes rope(rms_norm(q)), its slot of k_caches[r] and
    v_caches[r] [B, capacity, H / ranks, head_dim] rope(rms_norm(k)) and v. Without q (and q_weight): K and V alone.
    """
    ranks, tokens = len(k_caches), k.shape[1]
    slots = ring.slots(first_token + tokens, k_caches[0].shape[1], k.device)[first_token:]
    for out, x in (
        (k_caches, norm_rope(k, k_weight, cos_sin, eps)),
        (v_caches, v.unflatten(-1, (-1, cos_sin.shape[1]))),
    ):
        for cache, heads in zip(out, x.chunk(ranks, dim=2), strict=True):
            cache[:, slots] = heads
    if q is not None:
        if q_weight is None:
            raise ValueError("q_weight is None, must be given with q")
        rows = slice(first_token, first_token + tokens)
        for q_out, heads in zip(q_outs, norm_rope(q, q_weight, cos_sin, eps).chunk(ranks, dim=2), strict=True):
            q_out[:, rows] = heads
