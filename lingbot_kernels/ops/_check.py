"""Argument checks shared by the ops: each error names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lingbot_kernels.ring import RingPosition

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)


def tokens(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """x must be a float [B, S, D] tensor with unit inner stride; like `like` in shape, dtype and device where given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, must be a tensor [B, S, D]")
    if x.dim() != 3:
        raise ValueError(f"{name}: got {describe(x)}, must be [B, S, D]")
    if like is None:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: got {x.dtype}, must be one of bfloat16, float16, float32, float64")
    elif x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
        raise (TypeError if x.shape == like.shape else ValueError)(
            f"{name}: got {describe(x)}, must be {describe(like)}"
        )
    if x.stride(2) != 1 and x.shape[2] > 1:
        raise ValueError(f"{name}: got inner stride {x.stride(2)}, must be 1")


def weight(name: str, w: Tensor, dim: int, like: Tensor) -> None:
    """w must be a contiguous [dim] tensor of like's dtype and device."""
    if w.shape != (dim,):
        raise ValueError(f"{name}: got shape {list(w.shape)}, must be [{dim}]")
    if w.dtype != like.dtype or w.device != like.device:
        raise TypeError(f"{name}: got {describe(w)}, must be {like.dtype} on {like.device}")
    if not w.is_contiguous():
        raise ValueError(f"{name}: got stride {w.stride()}, must be contiguous")


def modulation(name: str, m: Tensor, x: Tensor) -> None:
    """m must be a [D] or [B, D] vector for x [B, S, D]: float32, or float64 where x is."""
    batch, _, dim = x.shape
    if m.shape != (dim,) and m.shape != (batch, dim):
        raise ValueError(f"{name}: got shape {list(m.shape)}, must be [{dim}] or [{batch}, {dim}]")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if m.dtype != wanted or m.device != x.device:
        raise TypeError(f"{name}: got {describe(m)}, must be {wanted} on {x.device}")
    if m.stride(-1) != 1 and dim > 1:
        raise ValueError(f"{name}: got inner stride {m.stride(-1)}, must be 1")


def residual(name: str, x: Tensor, delta_name: str, delta: Tensor) -> None:
    """x [B, S, D] is a contiguous residual stream in delta's dtype or a wider one; delta has its shape and is
    contiguous.
    """
    tokens(name, x)
    tokens(delta_name, delta)
    if delta.shape != x.shape or delta.device != x.device:
        raise ValueError(
            f"{delta_name}: got {describe(delta)}, must have the shape and device of {name}, {describe(x)}"
        )
    if x.dtype != delta.dtype and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got {x.dtype}, must be {delta.dtype} or float32")
    contiguous(name, x)
    contiguous(delta_name, delta)


def contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name}: got strides {x.stride()} for shape {list(x.shape)}, must be contiguous")


def own_memory(name: str, x: Tensor, each: str) -> None:
    """x, which is written, must not be an expanded tensor: `each` says what needs memory of its own."""
    strides = x.stride()
    if 0 in strides and any(size > 1 and not stride for size, stride in zip(x.shape, strides, strict=True)):
        raise ValueError(f"{name}: got strides {strides}, must give each {each} memory of its own")


def alike(name: str, xs: Sequence[Tensor]) -> None:
    """Every tensor must have the first one's shape, strides, dtype and device."""
    first = xs[0]
    for x in xs[1:]:
        if (x.shape, x.stride(), x.dtype, x.device) != (first.shape, first.stride(), first.dtype, first.device):
            raise ValueError(
                f"{name}: got {describe(x)} with strides {x.stride()}, must be like the first, {describe(first)} with "
                f"strides {first.stride()}"
            )


def caches(k_cache: Tensor, v_cache: Tensor, like: Tensor, k_dtype: torch.dtype | None = None) -> None:
    """Both caches must be [B, capacity, heads, head_dim] of like's dtype (K's of k_dtype where given) and device, a
    token's heads contiguous, apart in memory.
    """
    for name, cache, dtype in (("k_cache", k_cache, k_dtype or like.dtype), ("v_cache", v_cache, like.dtype)):
        if cache.dim() != 4:
            raise ValueError(f"{name}: got {describe(cache)}, must be [B, capacity, heads, head_dim]")
        if cache.dtype != dtype or cache.device != like.device:
            raise TypeError(f"{name}: got {describe(cache)}, must be {dtype} on {like.device}")
        strides = cache.stride()
        if strides[3] != 1 or strides[2] != cache.shape[3]:
            raise ValueError(f"{name}: got strides {strides}, a token's heads must be contiguous")
        own_memory(name, cache, "batch and slot")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache: got shape {list(v_cache.shape)}, must be k_cache's {list(k_cache.shape)}")


def table(name: str, cos_sin: Tensor, num_tokens: int, head_dim: int, like: Tensor) -> None:
    """cos_sin must be a contiguous float32 (or float64) [S, head_dim] table on like's device."""
    if cos_sin.shape != (num_tokens, head_dim):
        raise ValueError(f"{name}: got shape {list(cos_sin.shape)}, must be [{num_tokens}, {head_dim}]")
    if not cos_sin.dtype.is_floating_point or cos_sin.element_size() < 4 or cos_sin.device != like.device:
        raise TypeError(f"{name}: got {describe(cos_sin)}, must be float32 on {like.device}")
    if cos_sin.element_size() > 4 and like.element_size() < 8:
        raise TypeError(f"{name}: got {cos_sin.dtype}, must be float32 for {like.dtype} tensors")
    contiguous(name, cos_sin)


def ring(batch: int, num_tokens: int, k_cache: Tensor, position: RingPosition) -> None:
    """The chunk must fit the ring: sink < capacity, and at most capacity - sink tokens, so that no slot is written
    twice.
    """
    capacity, sink, cursor = k_cache.shape[1], position.sink, position.cursor
    if k_cache.shape[0] != batch:
        raise ValueError(f"k_cache: got batch {k_cache.shape[0]}, must be {batch}")
    if not 0 <= sink < capacity:
        raise ValueError(f"ring: got sink {sink}, must be from 0 to capacity - 1 = {capacity - 1}")
    if num_tokens > capacity - sink:
        raise ValueError(
            f"ring: got a chunk of {num_tokens} tokens, must be at most capacity - sink = {capacity - sink}"
        )
    if position.chunk_start < 0:
        raise ValueError(f"ring: got chunk_start {position.chunk_start}, must be 0 or more")
    if cursor is not None and (cursor.dtype != torch.int32 or cursor.numel() != 1 or cursor.device != k_cache.device):
        raise TypeError(f"ring: got cursor {describe(cursor)}, must be int32 [1] on {k_cache.device}")


def disjoint(written: Sequence[str], arguments: Mapping[str, object]) -> None:
    """No written tensor may share memory with another one, arguments of their own or in lists: neither one's bytes,
    first to last, may overlap.
    """
    if not written:
        return
    spans = [
        (name, *_span(x))
        for name, value in arguments.items()
        for x in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(x, Tensor)
    ]
    spans.sort(key=lambda span: span[0] not in written)
    for i, (name, start, stop) in enumerate(spans):
        if name not in written:
            return
        for other, other_start, other_stop in spans[i + 1 :]:
            if start < other_stop and other_start < stop:
                raise ValueError(f"{name} and {other}: share memory, must be apart (the op writes {name})")


def _span(x: Tensor) -> tuple[int, int]:
    """First byte of x in memory and the byte after its last."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    if not x.numel():
        return 0, 0
    last = 0
    for size, stride in zip(x.shape, x.stride()):  # noqa: B905  (a strict zip costs as much as the loop)
        last += (size - 1) * stride
    return start, start + (last + 1) * x.element_size()
