"""RMSNorm + RoPE of a shard's Q and K, each rank's heads straight into that rank's Q rows and K/V ring."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Plan
from lingbot_kernels.ops.qk_norm_rope_kv_write import check_table
from lingbot_kernels.ring import RingPosition


def _check_arguments(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Tensor], k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
    chunk_start: int, cursor: Tensor | None, sink: int, first_token: int,
) -> None:  # fmt: skip
    _check.tokens("k", k)
    _check.tokens("v", v, k)
    batch, num_tokens, dim = k.shape
    ranks, head_dim = len(k_caches), cos_sin.shape[-1]
    check_table(cos_sin, num_tokens, head_dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    if not ranks or dim % head_dim or dim // head_dim % ranks:
        raise ValueError(f"k_caches: got {ranks}, must divide the heads, D / head_dim = {dim} / {head_dim}")
    if len(v_caches) != ranks:
        raise ValueError(f"v_caches: got {len(v_caches)}, must be one a rank, {ranks}")
    _check.caches(k_caches[0], v_caches[0], k)
    heads = dim // head_dim // ranks
    if k_caches[0].shape[2:] != (heads, head_dim):
        raise ValueError(f"k_caches: got {list(k_caches[0].shape)}, must hold {heads} heads of {head_dim}")
    _check.alike("k_caches", k_caches)
    _check.alike("v_caches", v_caches)
    if first_token < 0:
        raise ValueError(f"first_token: got {first_token}, must be 0 or more")
    _check.ring(batch, first_token + num_tokens, k_caches[0], chunk_start, cursor, sink)
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    if q is None or q_weight is None:
        return
    _check.tokens("q", q, k)
    _check.weight("q_weight", q_weight, dim, k)
    if len(q_outs) != ranks:
        raise ValueError(f"q_outs: got {len(q_outs)}, must be one a rank, {ranks}")
    rows = q_outs[0]
    if rows.dim() != 4 or (rows.shape[0], *rows.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(f"q_outs: got {_check.describe(rows)}, must be [{batch}, chunk tokens, {heads}, {head_dim}]")
    if rows.shape[1] < first_token + num_tokens:
        raise ValueError(f"q_outs: got {rows.shape[1]} tokens, must hold first_token + S = {first_token + num_tokens}")
    if rows.dtype != k.dtype or rows.device != k.device:
        raise TypeError(f"q_outs: got {_check.describe(rows)}, must be {k.dtype} on {k.device}")
    if rows.stride()[2:] != (head_dim, 1):
        raise ValueError(f"q_outs: got strides {rows.stride()}, a token's heads must be contiguous")
    _check.own_memory("q_outs", rows, "batch and token")
    _check.alike("q_outs", q_outs)


def _plan(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Tensor], k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
    chunk_start: int, cursor: Tensor | None, sink: int, first_token: int, eps: float, backend: str,
) -> Plan:  # fmt: skip
    _check_arguments(
        q, k, v, q_weight, k_weight, cos_sin, q_outs, k_caches, v_caches, chunk_start, cursor, sink, first_token
    )
    arguments = ("q", "k", "v", "q_weight", "k_weight", "cos_sin", "q_outs", "k_caches", "v_caches")
    if backend == "reference":
        return Plan(_reference, (*arguments, "chunk_start", "cursor", "sink", "first_token", "eps"))
    batch, num_tokens, dim = k.shape
    head_dim, ranks = cos_sin.shape[1], len(k_caches)
    rows, k_cache, v_cache = q_outs[0] if q is not None else k_caches[0], k_caches[0], v_caches[0]
    lists = ([0] * ranks if q is None else "q_outs", "k_caches", "v_caches")
    fields = (
        *_native.rows("q", q), *_native.rows("k", k), *_native.rows("v", v), "q_weight", "k_weight", "cos_sin", *lists,
        rows.stride(0), rows.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        "chunk_start", "cursor", sink, k_cache.shape[1], first_token,
        batch, num_tokens, dim // head_dim, head_dim, ranks, _native.DTYPE_CODES[k.dtype], "eps",
    )  # fmt: skip
    return _native.plan_with_arrays("qk_norm_rope_push", backend, fields, lists)


def _reference(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Tensor], k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
    chunk_start: int, cursor: Tensor | None, sink: int, first_token: int, eps: float,
) -> None:  # fmt: skip
    ring = RingPosition(chunk_start, sink, cursor)
    reference.qk_norm_rope_push(
        q, k, v, q_weight, k_weight, cos_sin, q_outs, k_caches, v_caches, ring, first_token, eps
    )


def _fake(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Tensor], k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
    chunk_start: int, cursor: Tensor | None, sink: int, first_token: int, eps: float, backend: str,
) -> None:  # fmt: skip
    _check_arguments(
        q, k, v, q_weight, k_weight, cos_sin, q_outs, k_caches, v_caches, chunk_start, cursor, sink, first_token
    )


_op = register_kernel(
    "qk_norm_rope_push(Tensor? q, Tensor k, Tensor v, Tensor? q_weight, Tensor k_weight, Tensor cos_sin, "
    "Tensor(a!)[] q_outs, Tensor(b!)[] k_caches, Tensor(c!)[] v_caches, SymInt chunk_start, Tensor? cursor, "
    "SymInt sink, SymInt first_token, float eps, str backend) -> ()",
    _plan,
    _fake,
    place=lambda q, k, *_: _dispatch.place(k),
    varying=("chunk_start",),
)


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
