"""Attention of a chunk's queries over the visible slots of a K/V ring, by the best library at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._even_segments import TILE, even_segments, hopper_multiprocessors
from lingbot_kernels.ops._library import register
from lingbot_kernels.ops._winners import ATTENTION_WINNERS
from lingbot_kernels.ops.merge_segments import merge_segments
from lingbot_kernels.ring import RingPosition, visible_segments

LIBRARIES = ("fa4", "fa3", "cudnn", "sdpa", "reference")
USUAL = ("fa4", "cudnn", "sdpa", "reference")  # what `auto` takes the first of, where no winner was measured


@functools.cache
def _flash_attention_4() -> Callable[..., tuple[Tensor, Tensor]] | str:
    """flash-attn-4's forward, or the reason why it isn't there."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        return f"flash-attn-4 is not importable ({error}); install lingbot-kernels[fa4]"
    return flash_attn_func


@functools.cache
def _fa3_missing() -> str | None:
    try:
        import fa3_fwd_interface  # noqa: F401
    except ImportError as error:
        return f"fa3-fwd is not importable ({error}); install lingbot-kernels[fa3]"
    return None


def flash_attention_3() -> Callable[..., Any]:
    """FlashAttention-3's forward."""
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # torch.compile can trace neither an import that fails nor cuDNN's question
def _not_installed(library: str) -> str | None:
    """What this machine lacks for "cudnn", "fa3" or "fa4"."""
    if library == "cudnn":
        return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"
    if library == "fa3":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) != (9, 0):
            return f"fa3-fwd serves GPUs of compute capability 9.0, not {major}.{minor}"
        return _fa3_missing()
    if torch.cuda.get_device_capability()[0] < 9:
        return "flash-attn-4 needs compute capability 9.0 or more"
    found = _flash_attention_4()
    return found if isinstance(found, str) else None


def why_not(library: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where this attention library can serve, else what is missing."""
    if library in ("sdpa", "reference"):
        return None
    if device_type != "cuda":
        return f"serves CUDA tensors, not {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"serves bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if library == "fa3" and dtype != torch.bfloat16:
        return "serves bfloat16, not float16: fa3-fwd is built without it"
    if head_dim % 8 or head_dim > 128:
        return f"serves head_dim up to 128, a multiple of 8, not {head_dim}"
    return _not_installed(library)


@functools.lru_cache(maxsize=4096)
def resolve_library(
    requested: str | None, device_type: str, dtype: torch.dtype, head_dim: int, queries: int = 0, keys: int = 0,
    dim: int = 0,
) -> str:  # fmt: skip
    """The attention library for these tensors: the one asked for, else the measured winner of this shape where there is
    one and it can serve, else the first of fa4, cudnn, sdpa that can.

    Raises ValueError for an unknown name, BackendUnavailable where the one asked for can't serve.
    """
    if requested in (None, "auto"):
        winner = ATTENTION_WINNERS.pick(queries, keys, dim) if device_type == "cuda" else None
        order = USUAL if winner is None else (winner, *USUAL)
        return next(name for name in order if why_not(name, device_type, dtype, head_dim) is None)
    if requested not in LIBRARIES:
        if requested in _dispatch.BACKENDS:
            _dispatch.resolve("windowed_attention", requested, device_type, dtype)
        raise ValueError(f"backend: got {requested!r}, must be auto or one of {', '.join(LIBRARIES)}")
    _dispatch.demand("windowed_attention", requested, why_not(requested, device_type, dtype, head_dim))
    return requested


def _attend(q: Tensor, k: Tensor, v: Tensor, library: str, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out [B, S, heads, head_dim], log-sum-exp [B, heads, S] or None) of q, k, v [B, tokens, heads, head_dim]."""
    if library == "fa4":
        out, lse = _flash_attention_4()(q, k, v, return_lse=with_lse)[:2]  # type: ignore[operator]
        return out, lse
    if library == "fa3":
        found = flash_attention_3()(
            q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, return_attn_probs=with_lse
        )
        return found if with_lse else (found, None)
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if library == "cudnn":
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(queries, keys, values, None, with_lse)[:2]
        return out.transpose(1, 2), lse.squeeze(-1) if with_lse else None
    if not with_lse:
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2), None
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values)[:2]
    elif q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(queries, keys, values, None, True)[:2]
        lse = lse[..., : q.shape[1]]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values)[:2]
    return out.transpose(1, 2), lse


def _segments(q: Tensor, keys: int, capacity: int) -> int:
    """How many segments of keys this call of flash-attn-4 is cut into."""
    batch, queries, heads, head_dim = q.shape
    multiprocessors = hopper_multiprocessors(q.device.index)
    if head_dim != 128 or not multiprocessors or (batch > 1 and keys != capacity) or _native.why_not_cuda():
        return 1
    return even_segments(batch * -(-queries // TILE) * TILE, heads, keys, multiprocessors)


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: int) -> Tensor:
    """Attention [B, S, D] over all keys, by one call in which the segments of keys are videos of their own."""
    batch = q.shape[0]
    queries = q.unsqueeze(1).expand(-1, segments, -1, -1, -1).flatten(0, 1)
    keys, values = (x.unflatten(1, (segments, -1)).flatten(0, 1) for x in (k, v))  # views
    out, lse = _attend(queries, keys, values, "fa4", True)
    assert lse is not None
    parts, sums = (x.unflatten(0, (batch, segments)).transpose(0, 1) for x in (out, lse))
    return merge_segments(parts, sums, backend="auto")  # as attention itself: whatever serves these tensors


def merge_by_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of disjoint key sets, from each set's (out [B, S, heads, head_dim], lse [B, heads, S]).

    `merge_segments` of parts that lie apart.
    """
    segments, lse = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return merge_segments(segments, lse, backend="auto").unflatten(-1, segments.shape[-2:])


def _run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Sequence[int], library: str, last_key_count: float
) -> Tensor:
    heads, head_dim = k_cache.shape[2:]
    ranges = list(zip(segments[::2], segments[1::2], strict=True))
    queries = q if q.dim() == 4 else q.unflatten(-1, (heads, head_dim))
    if library == "reference":
        return reference.windowed_attention(
            queries, k_cache, v_cache, max(b for _, b in ranges), segments=ranges, last_key_count=last_key_count
        )
    weighted = last_key_count != 1.0 and ranges[0][1] > 1
    if weighted:  # no library takes weights: the key is attended to apart, and counts in the merge
        start, stop = ranges.pop()
        ranges += [(start, stop - 1), (stop - 1, stop)]
    if library == "fa4" and len(ranges) == 1:
        (start, stop) = ranges[0]
        cuts = _segments(queries, stop - start, k_cache.shape[1])
        if cuts > 1:
            return _attend_segments(queries, k_cache[:, start:stop], v_cache[:, start:stop], cuts)
    parts = [
        _attend(queries, k_cache[:, start:stop], v_cache[:, start:stop], library, len(ranges) > 1)
        for start, stop in ranges
    ]
    if weighted:
        alone, lse = parts[-1]
        assert lse is not None
        parts[-1] = (alone, lse + math.log(last_key_count))
    out = parts[0][0] if len(parts) == 1 else merge_by_lse(parts)  # type: ignore[arg-type]
    return out.contiguous().flatten(-2)


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Sequence[int], library: str, last_key_count: float
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k_cache.shape[2] * k_cache.shape[3]))


_op = register("windowed_attention", _run, _fake)


def windowed_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_visible: int,
    *,
    ring: RingPosition | None = None,
    recent: int | None = None,
    last_key_count: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over slots 0 .. num_visible of the ring, without a mask or a copy: [B, S, D].

    K is rotated already, so the order of the slots does not matter.

    Args:
        q: [B, S, D], or a strided [B, S, heads, head_dim].
        k_cache, v_cache: [B, capacity, heads, head_dim], whole buffers, of q's dtype.
        num_visible: slots in use, from the front; capacity once the ring is full.
        ring, recent: where `recent` is given, only the sink and the `recent` latest tokens are seen, the chunk's own
            included: up to three slot ranges, attended apart and merged by log-sum-exp. `ring` then says where the
            chunk is.
        last_key_count: how many equal keys slot num_visible - 1 stands for, with `recent` 1 alone. Where it isn't 1, a
            library attends to that key apart and the two are merged by log-sum-exp; 1 gives the bits of no count.
        backend: "fa4" (flash-attn-4), "fa3" (fa3-fwd), "cudnn", "sdpa", "reference" or "auto": the winner measured at
            such a shape, or else the first of fa4, cudnn and sdpa that can serve.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the library asked for by name can't serve.
    """
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache, v_cache: got {list(k_cache.shape)} and {list(v_cache.shape)}, "
            "must both be [B, capacity, heads, head_dim]"
        )
    batch, capacity, heads, head_dim = k_cache.shape
    if q.dim() < 3 or q.shape[0] != batch or tuple(q.shape[2:]) not in ((heads * head_dim,), (heads, head_dim)):
        raise ValueError(f"q: got shape {list(q.shape)}, must be [{batch}, S, {heads * head_dim}]")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype or cache.device != q.device:
            raise TypeError(f"{name}: got {_check.describe(cache)}, must be {q.dtype} on {q.device}")
    if not 0 < num_visible <= capacity:
        raise ValueError(f"num_visible: got {num_visible}, must be from 1 to the capacity, {capacity}")
    if not 0 < last_key_count < math.inf:
        raise ValueError(f"last_key_count: got {last_key_count}, must be positive and finite")
    if recent is not None and last_key_count != 1:
        raise ValueError(f"last_key_count: got {last_key_count}, must be 1 where `recent` is given")
    if recent is None:
        segments = [(0, num_visible)]
    elif ring is None:
        raise ValueError("ring: got None, must say where the chunk is when `recent` is given")
    else:
        segments = visible_segments(ring, q.shape[1], capacity, num_visible, recent)
    if backend is None and _dispatch.requested_backend() == "reference":
        backend = "reference"
    keys = sum(stop - start for start, stop in segments)
    library = resolve_library(backend, q.device.type, q.dtype, head_dim, q.shape[1], keys, heads * head_dim)
    bounds = [bound for segment in segments for bound in segment]
    return _op(q, k_cache, v_cache, bounds, library, float(last_key_count))
