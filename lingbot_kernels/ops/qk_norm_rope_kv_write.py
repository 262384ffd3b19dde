"""RMSNorm + RoPE of Q and K and the write of K and V to their ring slots, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.ops import _check, _dispatch
from lingbot_kernels.ops._declare import Launch, Output, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ring import RingPosition


@kernel_op("qk_norm_rope_kv_write", returns=("q_out",), place=lambda q, k, *_: _dispatch.place(k))
def _op(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Written, v_cache: Written, ring: RingPosition, eps: float,
) -> Launch:  # fmt: skip
    fields = checked_fields(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring)
    _, num_tokens, dim = k.shape
    rows = {"q_out.batch_stride": num_tokens * dim, "q_out.token_stride": dim, "q_out.group_stride": 0}
    return Launch([Output(q)], {**fields, **rows})


def checked_fields(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, ring: RingPosition, k_dtype: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fields of the struct, after the checks, for this op and the write-only one, in which q and q_weight are None;
    with a K cache of `k_dtype`, where given.
    """
    _check.tokens("k", k)
    batch, num_tokens, dim = k.shape
    if q is not None:
        _check.tokens("q", q, k)
    if v is not None:
        _check.tokens("v", v, k)
    _check.caches(k_cache, v_cache, k, k_dtype)
    capacity, heads, head_dim = k_cache.shape[1:]
    if heads * head_dim != dim:
        raise ValueError(f"k_cache: got {heads} heads of {head_dim}, must hold D = {dim} channels a token")
    if q_weight is not None:
        _check.weight("q_weight", q_weight, dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    _check.table("cos_sin", cos_sin, num_tokens, head_dim, k)
    _check.ring(batch, num_tokens, k_cache, ring)
    return {
        "ring.capacity": capacity, "batch": batch, "tokens": num_tokens, "heads": heads, "head_dim": head_dim,
        "dtype": k.dtype,
    }  # fmt: skip


def qk_norm_rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ring: RingPosition,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Q and K through full-width RMSNorm and RoPE; K and V into their ring slots. Returns q_out [B, S, D], contiguous.

    q_out = rope(rms_norm(q)); k_cache[slot(i)] = rope(rms_norm(k))[i]; v_cache[slot(i)] = v[i]. The norm (Zhang and
    Sennrich 2019) is over the whole D, before the head split, and rounds as the official model does: T(x32 *
    rsqrt(mean(x32^2) + eps)), then T(that * weight). RoPE turns the pairs (2i, 2i + 1) in float32 and rounds once.

    Args:
        q, k, v: [B, S, D], bfloat16, float16 or float32 (float64 by the reference); strided views of one projection
            serve as they are, with unit inner stride. v None: V already lies in its slots.
        q_weight, k_weight: [D], of q's dtype.
        cos_sin: float32 [S, head_dim], from `rope_cos_sin`.
        k_cache, v_cache: [B, capacity, heads, head_dim], whole buffers, written in place in the chunk's slots alone.
        ring: where the chunk goes.
        eps: added to the mean square.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written. A chunk over capacity - sink tokens,
            caches that share memory with another argument, and mixed devices or dtypes are refused.
        BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(
        backend, q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring.chunk_start, ring.cursor, ring.sink, eps
    )
