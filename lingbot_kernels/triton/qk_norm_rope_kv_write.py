"""RMSNorm and RoPE of Q and K and the write of K and V into the ring, in one pass over memory.

Without q it is the write-only kernel of the context update; without v only Q and K move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._rows import (
    RowConfig,
    as_words,
    reduced_position,
    ring_slot,
    ring_start,
    split_config,
    why_not_words,
    word_config,
    write_qkv,
)


@triton.jit(do_not_specialize=["position", "sink", "capacity", "tokens"])
def qk_norm_rope_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position,
    sink,
    capacity,
    tokens,
    eps,
    q_batch_stride,
    k_batch_stride,
    v_batch_stride,
    k_cache_batch_stride,
    v_cache_batch_stride,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    K_CACHE_STRIDE: tl.constexpr,
    V_CACHE_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """q_out[b, s] = rope(T(T(q[b, s] * rsqrt(mean(q[b, s]^2) + eps)) * q_weight))
    k_cache[b, slot(s)] = the same of k; v_cache[b, slot(s)] = v[b, s]

    q, k, v [B, tokens, D], tokens *_STRIDE apart; caches [B, capacity, D], slots *_CACHE_STRIDE apart; D = 2 * WORDS;
    cos_sin [tokens, 2 * PAIRS]. Programs: (parts, tokens / ROWS, B).
    """
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    start = ring_start(position)
    for i in range(ROWS):
        token = tl.program_id(1) * ROWS + i
        if token < tokens:
            row = token.to(tl.int64)
            slot = ring_slot(start + token, sink, capacity)
            q_row = None
            q_out = None
            q_weight = None
            v_row = None
            v_out = None
            if q_ptr is not None:
                q_row = as_words(q_ptr + batch * q_batch_stride + row * Q_STRIDE)
                q_out = as_words(q_out_ptr + (batch * tokens + row) * (2 * WORDS))
                q_weight = as_words(q_weight_ptr)
            if v_ptr is not None:
                v_row = as_words(v_ptr + batch * v_batch_stride + row * V_STRIDE)
                v_out = as_words(v_cache_ptr + batch * v_cache_batch_stride + slot * V_CACHE_STRIDE)
            write_qkv(
                q_row,
                as_words(k_ptr + batch * k_batch_stride + row * K_STRIDE),
                v_row,
                q_weight,
                as_words(k_weight_ptr),
                cos_sin_ptr + row * (2 * PAIRS),
                q_out,
                as_words(k_cache_ptr + batch * k_cache_batch_stride + slot * K_CACHE_STRIDE),
                v_out,
                eps,
                dtype,
                WORDS,
                CHUNK,
                PAIRS,
                SPLIT,
                EVICT,
                MODIFIER,
            )


def launch_config(dim: int, element_size: int, tokens: int, full: bool = True) -> RowConfig:
    """Configuration for `tokens` rows (of the whole batch) of `dim` values of `element_size` bytes; full: with q."""
    return split_config(dim, element_size) if full else word_config(dim, element_size)


def why_not(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_words(k.shape[-1], q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)


def qk_norm_rope_kv_write(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    q_out: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunk_start: int,
    cursor: torch.Tensor | None,
    sink: int,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill q_out [B, S, D] and the chunk's slots of the caches [B, capacity, heads, head_dim].

    q, k, v [B, S, D] with any even strides; weights [D]; cos_sin float32 [S, head_dim]. Without q, q_weight and q_out
    it only writes; without v, V is in its slots already.
    """
    batch, tokens, dim = k.shape
    capacity = k_cache.shape[1]
    config = config or launch_config(dim, k.element_size(), batch * tokens, q is not None)
    parts = 1 + (q is not None) + (v is not None) if config.split else 1
    operands = (q, k, v, k_cache, v_cache)
    launch(
        qk_norm_rope_kv_write_kernel,
        (parts, -(-tokens // config.rows), batch),
        (q, k, v, q_weight, k_weight, cos_sin, q_out, k_cache, v_cache),
        (reduced_position(chunk_start, cursor, sink, capacity), sink, capacity, tokens),
        (
            eps,
            *(0 if x is None or batch == 1 else x.stride(0) for x in operands),
            *(0 if x is None else x.stride(1) for x in operands),
        ),
        {
            "WORDS": dim // 2,
            "PAIRS": cos_sin.shape[1] // 2,
            "SPLIT": config.split,
            **config.constants,
        },
        config.num_warps,
    )
