"""RMSNorm + RoPE of Q and K and the write of K and V to their ring slots, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan
from lingbot_kernels.ring import RingPosition


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


def plan(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> Plan:  # fmt: skip
    """Of both ops; q and q_weight are None in the write-only one."""
    check_arguments(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink)
    batch, num_tokens, dim = k.shape
    capacity, heads, head_dim = k_cache.shape[1:]
    full = q is not None
    queries = ("q" if full else None, "k", "v", "q_weight" if full else None, "k_weight", "cos_sin")
    place = ("k_cache", "v_cache", "chunk_start", "cursor", "sink", "eps")
    if backend == "reference":
        return Plan(_reference, (*queries, *place))
    outputs = (Output("q_out", like="q"),) if full else ()
    if backend == "triton":
        from lingbot_kernels.triton import qk_norm_rope_kv_write as kernel

        _dispatch.demand("qk_norm_rope_kv_write", "triton", kernel.why_not(q, k, v, k_cache, v_cache))
        return Plan(kernel.qk_norm_rope_kv_write, (*queries, "q_out" if full else None, *place), outputs)
    fields = (
        *(_native.rows("q", q) if full else (0, 0, 0)), *_native.rows("k", k), *_native.rows("v", v),
        "q_weight" if full else 0, "k_weight", "cos_sin",
        *(("q_out", num_tokens * dim, dim, 0) if full else (0, 0, 0, 0)),
        *_native.rows("k_cache", k_cache), *_native.rows("v_cache", v_cache),
        "chunk_start", "cursor", sink, capacity,
        batch, num_tokens, heads, head_dim, _native.DTYPE_CODES[k.dtype], "eps",
    )  # fmt: skip
    return _native.plan("qk_norm_rope_kv_write", backend, fields, outputs)


def _reference(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int, eps: float,
) -> Tensor | None:  # fmt: skip
    ring = RingPosition(chunk_start, sink, cursor)
    if q is None or q_weight is None:
        reference.k_norm_rope_kv_write(k, v, k_weight, cos_sin, k_cache, v_cache, ring, eps)
        return None
    return reference.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring, eps)


def _fake(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    check_arguments(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink)
    return k.new_empty(k.shape)


_op = register_kernel(
    "qk_norm_rope_kv_write(Tensor q, Tensor k, Tensor? v, Tensor q_weight, Tensor k_weight, Tensor cos_sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt chunk_start, Tensor? cursor, SymInt sink, float eps, str backend) "
    "-> Tensor",
    plan,
    _fake,
    place=lambda q, k, *_: _dispatch.place(k),
    varying=("chunk_start",),
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
    return _op(
        backend, q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring.chunk_start, ring.cursor, ring.sink, eps
    )
