"""Attention of a chunk's queries over the visible slots of a K/V ring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lingbot_kernels.reference._common import accumulation_dtype


def windowed_attention_with_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_visible: int,
    *,
    segments: Sequence[tuple[int, int]] | None = None,
    last_key_count: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): softmax(q k^T / sqrt(head_dim)) v [B, S, D], and log(sum(exp(scores))) [B, heads, S], not rounded.

    q [B, S, D] or [B, S, heads, head_dim]; caches [B, capacity, heads, head_dim], of which slots 0 .. num_visible are
    seen, or, where `segments` is given, only its (start, stop) slot ranges, each within 0 .. num_visible; the last key
    counts last_key_count times, as so many equal ones would. One rounding of out to q's dtype.
    """
    if not 0 < num_visible <= k_cache.shape[1]:
        raise ValueError(f"num_visible is {num_visible}, must lie in 1 .. capacity = {k_cache.shape[1]}")
    segments = [(0, num_visible)] if segments is None else segments
    for start, stop in segments:
        if not 0 <= start < stop <= num_visible:
            raise ValueError(
                f"segments has ({start}, {stop}), must satisfy 0 <= start < stop <= num_visible = {num_visible}"
            )
    accumulate = accumulation_dtype(q.dtype)
    heads, head_dim = k_cache.shape[2:]
    k, v = (torch.cat([cache[:, i:j] for i, j in segments], dim=1).to(accumulate) for cache in (k_cache, v_cache))
    queries = q.reshape(*q.shape[:2], heads, head_dim).to(accumulate)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, k) * head_dim**-0.5
    if last_key_count != 1:
        scores[..., -1] += math.log(last_key_count)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    return out.flatten(-2).to(q.dtype), scores.logsumexp(dim=-1)


def windowed_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_visible: int,
    *,
    segments: Sequence[tuple[int, int]] | None = None,
    last_key_count: float = 1.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v [B, S, D]; see `windowed_attention_with_lse`."""
    return windowed_attention_with_lse(
        q, k_cache, v_cache, num_visible, segments=segments, last_key_count=last_key_count
    )[0]
