"""Attention over disjoint sets of keys, merged into attention over all of them by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output
from lingbot_kernels.ops._library import kernel_op


@kernel_op("merge_segments", returns=("out",))
def _op(segments: Tensor, lse: Tensor) -> Launch:
    if segments.dim() != 5 or not 1 <= segments.shape[0] <= 64:
        raise ValueError(
            f"segments: got {_check.describe(segments)}, must be [1 to 64 segments, B, S, heads, head_dim]"
        )
    if segments.dtype not in _check.FLOATS:
        raise TypeError(f"segments: got {segments.dtype}, must be one of bfloat16, float16, float32, float64")
    count, batch, tokens, heads, head_dim = segments.shape
    if segments.numel() and (segments.stride(4) != 1 or segments.stride(3) != head_dim):
        raise ValueError(f"segments: got strides {segments.stride()}, a token's heads must be contiguous")
    if lse.shape != (count, batch, heads, tokens):
        raise ValueError(f"lse: got shape {list(lse.shape)}, must be {[count, batch, heads, tokens]}")
    wanted = torch.float64 if segments.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted or lse.device != segments.device:
        raise TypeError(f"lse: got {_check.describe(lse)}, must be {wanted} on {segments.device}")
    if lse.stride(3) != 1 and tokens > 1:
        raise ValueError(f"lse: got inner stride {lse.stride(3)}, must be 1")
    strides = zip(("segment_stride", "batch_stride", "token_stride"), segments.stride(), strict=False)
    lse_strides = zip(("lse_segment_stride", "lse_batch_stride", "lse_head_stride"), lse.stride(), strict=False)
    return Launch(
        [Output(segments, (batch, tokens, heads * head_dim))],
        {
            **dict(strides), **dict(lse_strides), "batch": batch, "tokens": tokens, "count": count, "heads": heads,
            "head_dim": head_dim, "dtype": segments.dtype,
        },
    )  # fmt: skip


def merge_segments(segments: Tensor, lse: Tensor, *, backend: str | None = None) -> Tensor:
    """out = sum_n softmax_n(lse[n]) * segments[n], in float32, rounded once: [B, S, heads * head_dim], contiguous.

    With segments[n] = softmax(q k_n^T) v_n over disjoint sets of keys and their log-sum-exp, this is attention over
    the union (Dao et al. 2022, the merge of FlashAttention's blocks).

    Args:
        segments: [N, B, S, heads, head_dim], N from 1 to 64, strided views serve with a token's heads contiguous.
        lse: float32 [N, B, heads, S] (float64 where segments are), natural logarithm, tokens contiguous.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, segments, lse)
