"""Attention with int8 Q K^T: a chunk's queries over the visible slots of an int8 K ring and its bfloat16 V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output
from lingbot_kernels.ops._even_segments import hopper_multiprocessors
from lingbot_kernels.ops._library import kernel_op

HEAD_DIMS = (64, 128)
# The kernel's tile of queries, and the fewest keys of which it cuts a tile into parts (csrc/cuda/int8_attention_*).
_TILE, _CUT_KEYS = 192, 10 * 96


def _heads(name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Refuse x that is not [batch, tokens, heads, head_dim] of this shape (None: any) with a token's heads contiguous,
    tokens 16 bytes aligned.
    """
    if x.dim() != 4 or any(want is not None and have != want for have, want in zip(x.shape, shape, strict=True)):
        wanted = ", ".join(
            name if want is None else str(want)
            for name, want in zip(("B", "tokens", "heads", "head_dim"), shape, strict=True)
        )
        raise ValueError(f"{name}: got {_check.describe(x)}, must be [{wanted}]")
    if x.dtype != dtype:
        raise TypeError(f"{name}: got {x.dtype}, must be {dtype}")
    if x.numel() and (x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3])):
        raise ValueError(f"{name}: got strides {x.stride()}, a token's heads must be contiguous")
    elements = 16 // x.element_size()
    if any(x.stride(i) % elements for i in (0, 1) if x.shape[i] > 1) or x.storage_offset() % elements:
        raise ValueError(f"{name}: got strides {x.stride()}, tokens must lie a multiple of {elements} elements apart")


def _scales(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {list(x.shape)}, must be {list(shape)}")
    if x.dtype != torch.float32 or x.device != device:
        raise TypeError(f"{name}: got {_check.describe(x)}, must be torch.float32 on {device}")


def _workspace(q: Tensor, num_visible: int) -> int:
    """Elements of memory for the parts of tiles that several multiprocessors share: two each, with their sums."""
    multiprocessors = hopper_multiprocessors(q.device.index) if q.device.type == "cuda" else 0
    return 2 * multiprocessors * _TILE * (q.shape[3] + 1) if num_visible > _CUT_KEYS else 0


def _formula(*, num_visible: int, **operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's out and lse, and the memory that it has no use for."""
    out, lse = reference.int8_attention(num_visible=num_visible, **operands)
    q = operands["q"]
    return out, lse, q.new_empty((_workspace(q, num_visible),), dtype=torch.float32)


@kernel_op(
    "int8_attention",
    returns=("out", "lse", "workspace"),
    place=lambda q, q_scale, k_cache, k_scale, v_cache, *_: (
        q.device.type,
        v_cache.dtype,
        q.shape[1] if q.dim() == 4 else 0,
        q.shape[2] * q.shape[3] if q.dim() == 4 else 0,
    ),
    formula=_formula,
)
def _op(
    q: Tensor,
    q_scale: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor,
    num_visible: int,
    last_key_count: float,
) -> Launch:
    _heads("q", q, (None, None, None, None), torch.int8)
    batch, queries, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS or heads < 1:
        raise ValueError(f"q: got {heads} heads of {head_dim}, must be 1 or more of 64 or 128")
    _heads("k_cache", k_cache, (batch, None, heads, head_dim), torch.int8)
    capacity = k_cache.shape[1]
    _heads("v_cache", v_cache, (batch, capacity, heads, head_dim), torch.bfloat16)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.device != q.device:
            raise TypeError(f"{name}: got {_check.describe(x)}, must be on {q.device}")
    _scales("q_scale", q_scale, (batch, queries, heads), q.device)
    _scales("k_scale", k_scale, (batch, capacity, heads), q.device)
    if not 1 <= num_visible <= capacity:
        raise ValueError(f"num_visible: got {num_visible}, must be from 1 to the capacity {capacity}")
    if not 0 < last_key_count < float("inf"):
        raise ValueError(f"last_key_count: got {last_key_count}, must be positive and finite")
    workspace = Output(q, (_workspace(q, num_visible),), torch.float32)
    return Launch(
        [
            Output(q, (batch, queries, heads * head_dim), torch.bfloat16),
            Output(q, (batch, heads, queries), torch.float32),
            workspace,
        ],
        {
            **{f"q_scale_{of}_stride": q_scale.stride(i) for i, of in enumerate(("batch", "token", "head"))},
            **{f"k_scale_{of}_stride": k_scale.stride(i) for i, of in enumerate(("batch", "token", "head"))},
            "workspace_bytes": 4 * _workspace(q, num_visible), "batch": batch, "queries": queries, "keys": num_visible,
            "heads": heads, "head_dim": head_dim, "softmax_scale": head_dim**-0.5,
        },
    )  # fmt: skip


def int8_attention(
    q: Tensor,
    q_scale: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor,
    num_visible: int,
    *,
    last_key_count: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out bfloat16 [B, S, D], lse float32 [B, heads, S]) of attention over slots 0 .. num_visible of a ring.

    out = sum_n w_n v_n / sum_n w_n with w_n = exp((q . k_n) * q_scale * k_scale_n / sqrt(head_dim)) and
    lse = log(sum_n w_n), natural; w of the last visible slot counts last_key_count times, as so many equal keys would.
    Sums q . k are exact (int32), weights are rounded to bfloat16 for the product with v, out is rounded once. A NaN in
    a scale or in v is seen in out. On CUDA a v beyond 2**48 may overflow, which softmax alone would not.

    Args:
        q: int8 [B, S, heads, head_dim], head_dim 64 or 128; of q and the caches a token's heads are contiguous, and
            tokens lie a multiple of 16 bytes apart.
        q_scale: float32 [B, S, heads], any strides, from 0 on.
        k_cache: int8 [B, capacity, heads, head_dim].
        k_scale: float32 [B, capacity, heads], any strides, from 0 on; it is read fastest as the transpose of
            [B, heads, capacity].
        v_cache: bfloat16 [B, capacity, heads, head_dim].
        num_visible: from 1 to capacity. A number that changes with every call makes every call a checked one.
        last_key_count: positive; 1 gives the bits of no weight at all.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, q, q_scale, k_cache, k_scale, v_cache, num_visible, float(last_key_count))[:2]
