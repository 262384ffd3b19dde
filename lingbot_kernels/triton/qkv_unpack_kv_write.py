"""K and V of a received all-to-all buffer to their ring slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl
from lingbot_kernels.triton._rows import VECTOR_BYTES, reduced_position, ring_slot, ring_start, why_not_rows


@triton.jit(do_not_specialize=["position", "sink", "capacity", "rows"])
def qkv_unpack_kv_write_kernel(
    packed_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position,
    sink,
    capacity,
    rows,
    k_cache_batch_stride,
    v_cache_batch_stride,
    K_CACHE_STRIDE: tl.constexpr,
    V_CACHE_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BATCHES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """k_cache[b, slot(s)], v_cache[b, slot(s)] = packed[s, b, PARTS - 2], packed[s, b, PARTS - 1]

    packed [tokens, BATCHES, PARTS, DIM], rows = tokens * BATCHES; caches [BATCHES, capacity, DIM], slots *_STRIDE apart.
    Programs: (rows * DIM / BLOCK, 2): each copies BLOCK values of K or of V, across rows.
    """
    is_v = tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = (begin % DIM).to(tl.int32) + tl.arange(0, BLOCK)
    row = begin // DIM + index // DIM
    column = index % DIM
    mask = row < rows
    token = (row // BATCHES).to(tl.int32)
    batch = row % BATCHES
    value = tl.load(
        packed_ptr + (row * PARTS + PARTS - 2 + is_v) * DIM + column, mask=mask, eviction_policy="evict_first"
    )
    slot = ring_slot(ring_start(position) + token, sink, capacity)
    if is_v == 0:
        tl.store(k_cache_ptr + batch * k_cache_batch_stride + slot * K_CACHE_STRIDE + column, value, mask=mask)
    else:
        tl.store(v_cache_ptr + batch * v_cache_batch_stride + slot * V_CACHE_STRIDE + column, value, mask=mask)


@dataclass(frozen=True)
class QkvUnpackKvWriteConfig:
    """`block` values a program."""

    num_warps: int
    block: int


def launch_config(element_size: int) -> QkvUnpackKvWriteConfig:
    """Two 16-byte vectors a thread."""
    return QkvUnpackKvWriteConfig(num_warps=4, block=2 * 128 * VECTOR_BYTES // element_size)


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
    config: QkvUnpackKvWriteConfig | None = None,
) -> None:
    """Copy K and V of packed [S, B, parts, heads, head_dim], contiguous, to the chunk's slots of the caches."""
    tokens, batch, parts, heads, head_dim = packed.shape
    capacity = k_cache.shape[1]
    config = config or launch_config(packed.element_size())
    rows, dim = tokens * batch, heads * head_dim
    qkv_unpack_kv_write_kernel[(triton.cdiv(rows * dim, config.block), 2)](
        packed,
        k_cache,
        v_cache,
        reduced_position(chunk_start, cursor, sink, capacity),
        sink,
        capacity,
        rows,
        k_cache.stride(0) if batch > 1 else 0,
        v_cache.stride(0) if batch > 1 else 0,
        K_CACHE_STRIDE=k_cache.stride(1),
        V_CACHE_STRIDE=v_cache.stride(1),
        PARTS=parts,
        BATCHES=batch,
        DIM=dim,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
