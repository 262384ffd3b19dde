"""RMSNorm + RoPE of Q and K, their quantisation to int8, and the write of K and V to a ring whose K is in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.ops import _check, _dispatch
from lingbot_kernels.ops._declare import Launch, Output, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops.qk_norm_rope_kv_write import checked_fields
from lingbot_kernels.ring import RingPosition


@kernel_op("qk_norm_rope_quantize_kv_write", returns=("q_codes", "q_scale"), place=lambda q, k, *_: _dispatch.place(k))
def _op(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Written, k_scale: Written, v_cache: Written, ring: RingPosition, eps: float,
) -> Launch:  # fmt: skip
    fields = quantized_fields(q, k, v, q_weight, k_weight, cos_sin, k_cache, k_scale, v_cache, ring)
    batch, num_tokens, _ = k.shape
    heads, head_dim = k_cache.shape[2:]
    codes = Output(q, (batch, num_tokens, heads, head_dim), torch.int8)
    return Launch([codes, Output(q, (batch, num_tokens, heads), torch.float32)], fields)


def quantized_fields(
    q: Tensor | None, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor,
    k_cache: Tensor, k_scale: Tensor, v_cache: Tensor, ring: RingPosition,
) -> dict[str, Any]:  # fmt: skip
    """Fields of the struct, after the checks, for this op and the write-only one, in which q and q_weight are None."""
    fields = checked_fields(q, k, v, q_weight, k_weight, cos_sin, k_cache, v_cache, ring, torch.int8)
    if k_scale.shape != k_cache.shape[:3]:
        raise ValueError(f"k_scale: got shape {list(k_scale.shape)}, must be k_cache's {list(k_cache.shape[:3])}")
    if k_scale.dtype != torch.float32 or k_scale.device != k.device:
        raise TypeError(f"k_scale: got {_check.describe(k_scale)}, must be torch.float32 on {k.device}")
    _check.own_memory("k_scale", k_scale, "batch, slot and head")
    strides = zip(("batch", "token", "head"), k_scale.stride(), strict=True)
    return {**fields, **{f"k_scale_{of}_stride": stride for of, stride in strides}}


def qk_norm_rope_quantize_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor,
    ring: RingPosition,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Q and K through full-width RMSNorm and RoPE as in `qk_norm_rope_kv_write`, then to int8 codes with a scale for
    each token and head. Returns (q_codes int8 [B, S, heads, head_dim], q_scale float32 [B, S, heads]).

    u = rope(rms_norm(x)), float32 and not rounded after the rotation; of each token's head, amax = its largest
    magnitude, scale = amax / 127, codes = round(u * (127 / amax)), ties to even. A head of zeros (amax below 2**-119)
    has scale 0, one with a NaN or Inf has scale NaN; the codes of both are 0. K's codes and scales and v go to slot(i),
    as attention with int8 Q and K reads them.

    Args:
        q, k, v: [B, S, D], bfloat16, float16 or float32 (float64 by the reference); strided views of one projection
            serve as they are, with unit inner stride. v None: V already lies in its slots.
        q_weight, k_weight: [D], of q's dtype.
        cos_sin: float32 [S, head_dim], from `rope_cos_sin`.
        k_cache: int8 [B, capacity, heads, head_dim], the whole buffer, written in place in the chunk's slots alone.
        k_scale: float32 [B, capacity, heads], any strides, written likewise; attention reads it fastest as the
            transpose of [B, heads, capacity].
        v_cache: [B, capacity, heads, head_dim] of q's dtype, written likewise.
        ring: where the chunk goes.
        eps: added to the mean square.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written, as `qk_norm_rope_kv_write` does.
        BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(
        backend, q, k, v, q_weight, k_weight, cos_sin, k_cache, k_scale, v_cache, ring.chunk_start, ring.cursor,
        ring.sink, eps,
    )  # fmt: skip
