"""RMSNorm and RoPE of Q and K into the packed buffer of one all-to-all exchange."""

from __future__ import annotations

import torch

from lingbot_kernels.reference.qk_norm_rope_kv_write import norm_rope


def qk_norm_rope_pack(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    ranks: int,
    eps: float,
) -> torch.Tensor:
    """Packed [ranks, S, B, parts, H / ranks, head_dim]: rank r gets heads r * H / ranks onwards of each part.

    Parts are rope(rms_norm(q)), rope(rms_norm(k)), v; without q (and q_weight) they are the last two.
    q, k, v [B, S, D].
    """
    parts = [norm_rope(k, k_weight, cos_sin, eps), v.unflatten(-1, (-1, cos_sin.shape[-1]))]
    if q is not None:
        if q_weight is None:
            raise ValueError("q_weight is None, must be given with q")
        parts.insert(0, norm_rope(q, q_weight, cos_sin, eps))
    by_rank = torch.stack(parts).unflatten(3, (ranks, -1))  # [parts, B, S, ranks, H / ranks, head_dim]
    return by_rank.permute(3, 2, 1, 0, 4, 5).contiguous()
