"""RMSNorm + RoPE of Q and K and the write of K and V to their ring slots, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register
from lingbot_kernels.ops.ring import RingPosition


def check_arguments(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int,
) -> None:  # fmt: skip
    _check.tokens("k", k)
    batch, num_tokens, dim = k.shape
    if q is not None:
        _check.tokens("q", q, k)
    if v is not None:
        _check.tokens("v", v, k)
    _check.caches(k_cache, v_cache, k)
    heads, head_dim = k_cache.shape[2:]
    if heads * head_dim != dim:
        raise ValueError(f"k_cache: got {heads} heads of {head_dim}, must hold D = {dim} channels a token")
    if q_weight is not None:
        _check.weight("q_weight", q_weight, dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    check_table(cos_sin, num_tokens, head_dim, k)
    _check.ring(batch, num_tokens, k_cache, chunk_start, cursor, sink)


def check_table(cos_sin: Tensor, num_tokens: int, head_dim: int, like: Tensor) -> None:
    """cos_sin must be a contiguous float32 (or float64) [S, head_dim] table on like's device."""
    if cos_sin.shape != (num_tokens, head_dim):
        raise ValueError(f"cos_sin: got shape {list(cos_sin.shape)}, must be [{num_tokens}, {head_dim}]")
    if not cos_sin.dtype.is_floating_point or cos_sin.element_size() < 4 or cos_sin.device != like.device:
        raise TypeError(f"cos_sin: got {_check.describe(cos_sin)}, must be float32 on {like.device}")
    if cos_sin.element_size() > 4 and like.element_size() < 8:
        raise TypeError(f"cos_sin: got {cos_sin.dtype}, must be float32 for {like.dtype} tensors")
    _check.contiguous("cos_sin", cos_sin)


def write(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> Tensor | None:  # fmt: skip
    check_arguments(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink)
    _check.disjoint((("k_cache", k_cache), ("v_cache", v_cache)), (("q", q), ("k", k), ("v", v), ("cos_sin", cos_sin)))
    q_out = None if q is None else torch.empty_like(k)
    batch, num_tokens, _ = k.shape
    capacity, heads, head_dim = k_cache.shape[1:]
    if backend in ("cuda", "cpu"):
        out_row = (0, 0, 0) if q_out is None else (q_out.data_ptr(), q_out.stride(0), q_out.stride(1))
        _native.launch(
            backend, "qk_norm_rope_kv_write", k.device,
            *_native.rows(q), *_native.rows(k), *_native.rows(v),
            _native.pointer(q_weight), k_weight.data_ptr(), cos_sin.data_ptr(),
            *out_row, 0,
            k_cache.data_ptr(), k_cache.stride(0), k_cache.stride(1),
            v_cache.data_ptr(), v_cache.stride(0), v_cache.stride(1),
            chunk_start, _native.pointer(cursor), sink, capacity,
            batch, num_tokens, heads, head_dim, _native.DTYPE_CODES[k.dtype], eps,
        )  # fmt: skip
    elif backend == "triton":
        from lingbot_kernels.triton import qk_norm_rope_kv_write as kernel

        _dispatch.demand("qk_norm_rope_kv_write", "triton", kernel.why_not(q, k, v, k_cache, v_cache))
        kernel.qk_norm_rope_kv_write(
            q, k, v, q_weight, k_weight, cos_sin, q_out, k_cache, v_cache, chunk_start, cursor, sink, eps
        )
    else:
        ring = RingPosition(chunk_start, sink, cursor)
        if q is None or q_weight is None:
            reference.k_norm_rope_kv_write(k, v, k_weight, cos_sin, k_cache, v_cache, ring, eps)
        else:
            q_out = reference.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring, eps)
    return q_out


def _fake(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    check_arguments(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink)
    return k.new_empty(k.shape)


_full = register(
    "qk_norm_rope_kv_write(Tensor q, Tensor k, Tensor? v, Tensor q_weight, Tensor k_weight, Tensor cos_sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt chunk_start, Tensor? cursor, SymInt sink, float eps, str backend) "
    "-> Tensor",
    write,
    _fake,
)


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
    chosen = _dispatch.resolve_tokens("qk_norm_rope_kv_write", backend, k)
    return _full(
        q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring.chunk_start, ring.cursor, ring.sink, eps, chosen
    )
