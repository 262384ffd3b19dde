"""RMSNorm + RoPE of a shard's Q and K to int8, each rank's heads straight into that rank's Q rows and int8 K ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lingbot_kernels.ops import _check, _dispatch
from lingbot_kernels.ops._declare import Addresses, Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ring import RingPosition


@kernel_op("qk_norm_rope_quantize_push", place=lambda q, k, *_: _dispatch.place(k))
def _op(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    q_outs: Sequence[Written], q_scales: Sequence[Written], k_caches: Sequence[Written], k_scales: Sequence[Written],
    v_caches: Sequence[Written], ring: RingPosition, first_token: int, eps: float,
) -> Launch:  # fmt: skip
    _check.tokens("k", k)
    _check.tokens("v", v, k)
    batch, num_tokens, dim = k.shape
    ranks, head_dim = len(k_caches), cos_sin.shape[-1]
    _check.table("cos_sin", cos_sin, num_tokens, head_dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    if not ranks or dim % head_dim or dim // head_dim % ranks:
        raise ValueError(f"k_caches: got {ranks}, must divide the heads, D / head_dim = {dim} / {head_dim}")
    for name, tensors in (("k_scales", k_scales), ("v_caches", v_caches)):
        if len(tensors) != ranks:
            raise ValueError(f"{name}: got {len(tensors)}, must be one a rank, {ranks}")
    k_cache, k_scale, v_cache, heads = k_caches[0], k_scales[0], v_caches[0], dim // head_dim // ranks
    _check.caches(k_cache, v_cache, k, torch.int8)
    if k_cache.shape[2:] != (heads, head_dim):
        raise ValueError(f"k_caches: got {list(k_cache.shape)}, must hold {heads} heads of {head_dim}")
    _check_scales("k_scales", k_scale, tuple(k_cache.shape[:3]), k)
    for name, tensors in (("k_caches", k_caches), ("k_scales", k_scales), ("v_caches", v_caches)):
        _check.alike(name, tensors)
    if first_token < 0:
        raise ValueError(f"first_token: got {first_token}, must be 0 or more")
    _check.ring(batch, first_token + num_tokens, k_cache, ring)
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    rows, row_scale = k_cache, k_scale  # without q their strides are not read
    lists: tuple[str, ...] = ("k_caches", "k_scales", "v_caches")
    if q is not None and q_weight is not None:
        _check.tokens("q", q, k)
        _check.weight("q_weight", q_weight, dim, k)
        lists = ("q_outs", "q_scales", *lists)
        for name, tensors in (("q_outs", q_outs), ("q_scales", q_scales)):
            if len(tensors) != ranks:
                raise ValueError(f"{name}: got {len(tensors)}, must be one a rank, {ranks}")
        rows, row_scale = q_outs[0], q_scales[0]
        _check_rows(rows, k, first_token + num_tokens, heads, head_dim)
        _check_scales("q_scales", row_scale, tuple(rows.shape[:3]), k)
        _check.alike("q_outs", q_outs)
        _check.alike("q_scales", q_scales)
    fields = {
        f"{name}_{of}_stride": x.stride(i)
        for name, x, dims in (
            ("q_out", rows, 2), ("q_scale", row_scale, 3), ("k_cache", k_cache, 2), ("k_scale", k_scale, 3),
            ("v_cache", v_cache, 2),
        )
        for i, of in zip(range(dims), ("batch", "token", "head"), strict=False)
    }  # fmt: skip
    return Launch(
        fields={
            **fields, "addresses": Addresses(lists, unread=2 * ranks if q is None else 0),
            "ring.capacity": k_cache.shape[1], "batch": batch, "tokens": num_tokens, "heads": dim // head_dim,
            "head_dim": head_dim, "ranks": ranks, "dtype": k.dtype,
        }
    )  # fmt: skip


def _check_rows(rows: Tensor, k: Tensor, chunk_tokens: int, heads: int, head_dim: int) -> None:
    """Codes must be int8 [B, at least chunk_tokens, heads, head_dim] on k's device, a token's heads contiguous."""
    if rows.dim() != 4 or (rows.shape[0], *rows.shape[2:]) != (k.shape[0], heads, head_dim):
        raise ValueError(
            f"q_outs: got {_check.describe(rows)}, must be [{k.shape[0]}, chunk tokens, {heads}, {head_dim}]"
        )
    if rows.shape[1] < chunk_tokens:
        raise ValueError(f"q_outs: got {rows.shape[1]} tokens, must hold first_token + S = {chunk_tokens}")
    if rows.dtype != torch.int8 or rows.device != k.device:
        raise TypeError(f"q_outs: got {_check.describe(rows)}, must be torch.int8 on {k.device}")
    if rows.stride()[2:] != (head_dim, 1):
        raise ValueError(f"q_outs: got strides {rows.stride()}, a token's heads must be contiguous")
    _check.own_memory("q_outs", rows, "batch and token")


def _check_scales(name: str, scales: Tensor, shape: tuple[int, ...], k: Tensor) -> None:
    if scales.shape != shape:
        raise ValueError(f"{name}: got shape {list(scales.shape)}, must be {list(shape)}")
    if scales.dtype != torch.float32 or scales.device != k.device:
        raise TypeError(f"{name}: got {_check.describe(scales)}, must be torch.float32 on {k.device}")
    _check.own_memory(name, scales, "batch, token and head")


def qk_norm_rope_quantize_push(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    q_outs: Sequence[Tensor],
    q_scales: Sequence[Tensor],
    k_caches: Sequence[Tensor],
    k_scales: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    ring: RingPosition,
    first_token: int,
    eps: float,
    *,
    backend: str | None = None,
) -> None:
    """`qk_norm_rope_quantize_kv_write` of a shard's tokens into every rank's memory: norm, codes and exchange in one
    pass, as `qk_norm_rope_push` does it in 16 bits.

    Args:
        q, k, v: [B, S, D], this shard's tokens; strided views serve. q and q_weight None: K and V alone.
        cos_sin: float32 [S, head_dim] of the shard's own tokens.
        q_outs, q_scales: a rank each, int8 [B, chunk tokens, heads / ranks, head_dim] and float32
            [B, chunk tokens, heads / ranks], alike in shape and strides; [] without q.
        k_caches, k_scales, v_caches: a rank each, int8 [B, capacity, heads / ranks, head_dim], float32
            [B, capacity, heads / ranks] with any strides, and [B, capacity, heads / ranks, head_dim] of k's dtype.
        ring: where the chunk goes, the same in every rank's ring.
        first_token: index of this shard's first token in the chunk.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(
        backend, q, k, v, q_weight, k_weight, cos_sin, list(q_outs), list(q_scales), list(k_caches), list(k_scales),
        list(v_caches), ring.chunk_start, ring.cursor, ring.sink, first_token, eps,
    )  # fmt: skip
