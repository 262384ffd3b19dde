"""Attention of int8 queries over the visible slots of an int8 K ring and its V, as dequantised operands have it."""

from __future__ import annotations

import math

import torch

from lingbot_kernels.reference._common import accumulation_dtype


def int8_attention(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    num_visible: int,
    last_key_count: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, D], lse [B, heads, S]) of out = sum_n w_n v_n / sum_n w_n, w_n = count_n exp(x_n / sqrt(head_dim)).

    x_n = (q . k_n) * q_scale * k_scale_n over slots n < num_visible; count_n is 1, of the last slot last_key_count.
    lse = log(sum_n w_n), not rounded below float32. int8 q [B, S, heads, head_dim] and k_cache [B, capacity, heads,
    head_dim], q_scale [B, S, heads], k_scale [B, capacity, heads], v_cache as k_cache. Arithmetic is float32, float64
    for float64 v_cache; out is rounded once to v_cache's dtype.
    """
    accumulate = accumulation_dtype(v_cache.dtype)
    queries = q.to(accumulate) * q_scale.to(accumulate).unsqueeze(-1)
    keys = k_cache[:, :num_visible].to(accumulate) * k_scale[:, :num_visible].to(accumulate).unsqueeze(-1)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * q.shape[-1] ** -0.5
    scores[..., -1] += math.log(last_key_count)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v_cache[:, :num_visible].to(accumulate))
    lse = scores.logsumexp(dim=-1)
    return out.flatten(-2).to(v_cache.dtype), lse if v_cache.dtype == torch.float64 else lse.float()
