"""Attention over disjoint sets of keys, merged into attention over all of them."""

from __future__ import annotations

import torch


def merge_segments(segments: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """sum_n softmax_n(lse[n]) * segments[n]: [N, B, S, heads, head_dim] and [N, B, heads, S] -> [B, S, D].

    softmax over a union of keys weighs each set by exp(lse_n - logsumexp_m(lse_m)); weights in float32 (float64 for
    float64 segments).
    """
    wide = torch.promote_types(segments.dtype, torch.float32)
    weights = torch.softmax(lse.to(wide), dim=0).transpose(2, 3).unsqueeze(-1)
    return (segments.to(wide) * weights).sum(dim=0).to(segments.dtype).flatten(-2)
