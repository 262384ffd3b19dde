"""K and V of a received all-to-all buffer to their ring slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._rows import (
    RowConfig,
    load_row,
    reduced_position,
    ring_slot,
    ring_start,
    store_row,
    value_config,
    why_not_rows,
)


@triton.jit(do_not_specialize=["position", "sink", "capacity", "tokens"])
def qkv_unpack_kv_write_kernel(
    packed_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position,
    sink,
    capacity,
    tokens,
    k_cache_batch_stride,
    v_cache_batch_stride,
    K_CACHE_STRIDE: tl.constexpr,
    V_CACHE_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """k_cache[b, slot(s)], v_cache[b, slot(s)] = packed[s, b, PARTS - 2], packed[s, b, PARTS - 1]

    packed [tokens, B, PARTS, DIM]; caches [B, capacity, DIM], slots *_STRIDE apart. Programs: (tokens / ROWS, B).
    """
    batch = tl.program_id(1).to(tl.int64)
    start = ring_start(position)
    for i in range(ROWS):
        token = tl.program_id(0) * ROWS + i
        if token < tokens:
            slot = ring_slot(start + token, sink, capacity)
            packed = packed_ptr + (token.to(tl.int64) * tl.num_programs(1) + batch) * (PARTS * DIM)
            k = load_row(packed + (PARTS - 2) * DIM, DIM, CHUNK, EVICT)
            v = load_row(packed + (PARTS - 1) * DIM, DIM, CHUNK, EVICT)
            k_out = k_cache_ptr + batch * k_cache_batch_stride + slot * K_CACHE_STRIDE
            store_row(k_out, k, DIM, CHUNK, MODIFIER)
            v_out = v_cache_ptr + batch * v_cache_batch_stride + slot * V_CACHE_STRIDE
            store_row(v_out, v, DIM, CHUNK, MODIFIER)


def launch_config(dim: int, element_size: int, tokens: int) -> RowConfig:
    """Configuration for `tokens` rows (of the whole batch) of `dim` values of `element_size` bytes."""
    return value_config(dim, (element_size,))


def why_not(packed: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(k_cache.shape[2] * k_cache.shape[3], packed=packed, k_cache=k_cache, v_cache=v_cache)


def qkv_unpack_kv_write(
    packed: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunk_start: int,
    cursor: torch.Tensor | None,
    sink: int,
    *,
    config: RowConfig | None = None,
) -> None:
    """Copy K and V of packed [S, B, parts, heads, head_dim], contiguous, to the chunk's slots of the caches."""
    tokens, batch, parts, heads, head_dim = packed.shape
    capacity = k_cache.shape[1]
    dim = heads * head_dim
    config = config or launch_config(dim, packed.element_size(), tokens * batch)
    launch(
        qkv_unpack_kv_write_kernel,
        (-(-tokens // config.rows), batch),
        (packed, k_cache, v_cache),
        (reduced_position(chunk_start, cursor, sink, capacity), sink, capacity, tokens),
        (k_cache.stride(0) if batch > 1 else 0, v_cache.stride(0) if batch > 1 else 0),
        {
            "K_CACHE_STRIDE": k_cache.stride(1),
            "V_CACHE_STRIDE": v_cache.stride(1),
            "PARTS": parts,
            "DIM": dim,
            **config.constants,
        },
        config.num_warps,
    )
