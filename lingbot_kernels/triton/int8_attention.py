"""Attention with int8 Q K^T and bfloat16 P V, for GPUs without a kernel of their own: online softmax, tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._rows import INTERPRETED, round_to

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, and what Triton is told."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["queries", "keys"])
def int8_attention_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    score_scale,
    last_key_bias,
    q_batch,
    q_token,
    q_scale_batch,
    q_scale_token,
    q_scale_head,
    k_batch,
    k_token,
    k_scale_batch,
    k_scale_token,
    k_scale_head,
    v_batch,
    v_token,
    KEY_TILES: tl.constexpr,  # a constant since the interpreter counts to no other
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[b, m, h] = sum_n p_n v_n / sum_n p_n, lse = log(sum_n p_n), p_n = 2^(score_n * scales * score_scale + bias_n)

    score_n int32 of int8 q and k; bias is last_key_bias for key keys - 1, else 0. Programs: (tiles of queries,
    B * heads).
    """
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, HEAD_DIM)
    seen = m < queries
    rows = m.to(tl.int64)[:, None]
    q = tl.load(q_ptr + batch * q_batch + rows * q_token + (head * HEAD_DIM + channel)[None, :], seen[:, None], other=0)
    row_scale = tl.load(
        q_scale_ptr + batch * q_scale_batch + m.to(tl.int64) * q_scale_token + head * q_scale_head, seen, other=0.0
    )
    row_scale *= score_scale
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for tile in range(KEY_TILES):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        token = n.to(tl.int64)
        there = n < keys
        k_tile = k_ptr + batch * k_batch + token[None, :] * k_token + (head * HEAD_DIM + channel)[:, None]
        score = tl.dot(q, tl.load(k_tile, there[None, :], other=0), out_dtype=tl.int32)
        k_scale = tl.load(
            k_scale_ptr + batch * k_scale_batch + token * k_scale_token + head * k_scale_head, there, other=0.0
        )
        x = score.to(tl.float32) * k_scale[None, :] * row_scale[:, None]
        x += tl.where(n == keys - 1, last_key_bias, 0.0)[None, :]
        x = tl.where(there[None, :], x, -float("inf"))
        raised = tl.maximum(largest, tl.max(x, 1))
        p = tl.exp2(x - raised[:, None])
        shrink = tl.exp2(largest - raised)
        total = total * shrink + tl.sum(p, 1)
        v_tile = v_ptr + batch * v_batch + token[:, None] * v_token + (head * HEAD_DIM + channel)[None, :]
        v = tl.load(v_tile, there[:, None], other=0.0)
        if INTERPRETED:  # it multiplies bfloat16 as integers
            sums = tl.dot(round_to(p, v.dtype).to(tl.float32), v.to(tl.float32), sums * shrink[:, None])
        else:
            sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None])
        largest = raised
    to = out_ptr + ((batch * queries + rows) * HEADS + head) * HEAD_DIM + channel[None, :]
    tl.store(to, round_to(sums / total[:, None], out_ptr.dtype.element_ty), seen[:, None])
    lse = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (batch * HEADS + head) * queries + m, lse, seen)


def launch_config(queries: int) -> AttentionConfig:
    """Configuration for so many queries of a head; not tuned, other than that it compiles for every GPU from sm_80."""
    return AttentionConfig(64 if queries <= 64 else 128, 32, 4 if queries <= 64 else 8, 3)


def why_not(q: torch.Tensor) -> str | None:
    """Why this kernel can't serve q [B, S, heads, head_dim], or None."""
    programs = q.shape[0] * q.shape[2]
    return None if programs <= 65535 else f"serves batch * heads up to 65535, not {programs}"


def int8_attention(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    num_visible: int,
    last_key_count: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    config: AttentionConfig | None = None,
) -> None:
    """Fill out [B, S, heads * head_dim] and lse [B, heads, S] from what `lingbot_kernels.ops.int8_attention` takes.

    `workspace` is not used: a program takes all keys of its queries.
    """
    batch, queries, heads, head_dim = q.shape
    if q.numel() == 0:
        return
    config = config or launch_config(queries)
    int8_attention_kernel[(triton.cdiv(queries, config.queries), batch * heads)](
        q, q_scale, k_cache, k_scale, v_cache, out, lse, queries, num_visible, head_dim**-0.5 * LOG2_E,
        math.log2(last_key_count), *q.stride()[:2], *q_scale.stride(), *k_cache.stride()[:2], *k_scale.stride(),
        *v_cache.stride()[:2], KEY_TILES=triton.cdiv(num_visible, config.keys), HEADS=heads, HEAD_DIM=head_dim,
        BLOCK_M=config.queries, BLOCK_N=config.keys, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
