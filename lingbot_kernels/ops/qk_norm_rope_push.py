"""RMSNorm + RoPE of a shard's Q and K, each rank's heads straight into that rank's Q rows and K/V ring."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lingbot_kernels.ops import _check, _dispatch
from lingbot_kernels.ops._declare import Addresses, Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ring import RingPosition


@kernel_op("qk_norm_rope_push", place=lambda q, k, *_: _dispatch.place(k))
def _op(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Written], k_caches: Sequence[Written], v_caches: Sequence[Written], ring: RingPosition,
    first_token: int, eps: float,
) -> Launch:  # fmt: skip
    _check.tokens("k", k)
    _check.tokens("v", v, k)
    batch, num_tokens, dim = k.shape
    ranks, head_dim = len(k_caches), cos_sin.shape[-1]
    _check.table("cos_sin", cos_sin, num_tokens, head_dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    if not ranks or dim % head_dim or dim // head_dim % ranks:
        raise ValueError(f"k_caches: got {ranks}, must divide the heads, D / head_dim = {dim} / {head_dim}")
    if len(v_caches) != ranks:
        raise ValueError(f"v_caches: got {len(v_caches)}, must be one a rank, {ranks}")
    k_cache, v_cache, heads = k_caches[0], v_caches[0], dim // head_dim // ranks
    _check.caches(k_cache, v_cache, k)
    if k_cache.shape[2:] != (heads, head_dim):
        raise ValueError(f"k_caches: got {list(k_cache.shape)}, must hold {heads} heads of {head_dim}")
    _check.alike("k_caches", k_caches)
    _check.alike("v_caches", v_caches)
    if first_token < 0:
        raise ValueError(f"first_token: got {first_token}, must be 0 or more")
    _check.ring(batch, first_token + num_tokens, k_cache, ring)
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    if q is not None and q_weight is not None:
        _check.tokens("q", q, k)
        _check.weight("q_weight", q_weight, dim, k)
        _check_rows(q_outs, k, ranks, first_token + num_tokens, heads, head_dim)
    rows = k_cache if q is None else q_outs[0]  # without q its strides are not read
    lists = ("k_caches", "v_caches") if q is None else ("q_outs", "k_caches", "v_caches")
    return Launch(
        fields={
            "addresses": Addresses(lists, unread=ranks if q is None else 0),
            "q_out_batch_stride": rows.stride(0), "q_out_token_stride": rows.stride(1),
            "k_cache_batch_stride": k_cache.stride(0), "k_cache_token_stride": k_cache.stride(1),
            "v_cache_batch_stride": v_cache.stride(0), "v_cache_token_stride": v_cache.stride(1),
            "ring.capacity": k_cache.shape[1], "batch": batch, "tokens": num_tokens, "heads": dim // head_dim,
            "head_dim": head_dim, "ranks": ranks, "dtype": k.dtype,
        }
    )  # fmt: skip


def _check_rows(q_outs: Sequence[Tensor], k: Tensor, ranks: int, chunk_tokens: int, heads: int, head_dim: int) -> None:
    """q_outs must be a rank each, [B, at least chunk_tokens, heads, head_dim], like k in dtype and device."""
    batch = k.shape[0]
    if len(q_outs) != ranks:
        raise ValueError(f"q_outs: got {len(q_outs)}, must be one a rank, {ranks}")
    rows = q_outs[0]
    if rows.dim() != 4 or (rows.shape[0], *rows.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(f"q_outs: got {_check.describe(rows)}, must be [{batch}, chunk tokens, {heads}, {head_dim}]")
    if rows.shape[1] < chunk_tokens:
        raise ValueError(f"q_outs: got {rows.shape[1]} tokens, must hold first_token + S = {chunk_tokens}")
    if rows.dtype != k.dtype or rows.device != k.device:
        raise TypeError(f"q_outs: got {_check.describe(rows)}, must be {k.dtype} on {k.device}")
    if rows.stride()[2:] != (head_dim, 1):
        raise ValueError(f"q_outs: got strides {rows.stride()}, a token's heads must be contiguous")
    _check.own_memory("q_outs", rows, "batch and token")
    _check.alike("q_outs", q_outs)


def qk_norm_rope_push(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    q_outs: Sequence[Tensor],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    ring: RingPosition,
    first_token: int,
    eps: float,
    *,
    backend: str | None = None,
) -> None:
    """`qk_norm_rope_kv_write` of a shard's tokens into every rank's memory: norm and exchange in one pass.

    Rank r's heads go to q_outs[r], k_caches[r] and v_caches[r]: this rank's own tensors and, through memory that the
    GPUs of a host share, the other ranks'. Who reads them must wait until every rank has written (a barrier between
    the ranks). Norm, rotation, rounding and slots are those of `qk_norm_rope_kv_write`.

    Args:
        q, k, v: [B, S, D], this shard's tokens; strided views serve. q and q_weight None: K and V alone.
        cos_sin: float32 [S, head_dim] of the shard's own tokens.
        q_outs: a rank each, [B, chunk tokens, heads / ranks, head_dim], alike in shape and strides; [] without q.
        k_caches, v_caches: a rank each, [B, capacity, heads / ranks, head_dim], alike in shape and strides.
        ring: where the chunk goes, the same in every rank's ring.
        first_token: index of this shard's first token in the chunk.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(
        backend, q, k, v, q_weight, k_weight, cos_sin, list(q_outs), list(k_caches), list(v_caches),
        ring.chunk_start, ring.cursor, ring.sink, first_token, eps,
    )  # fmt: skip
