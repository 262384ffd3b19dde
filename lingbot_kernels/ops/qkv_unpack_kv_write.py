"""K and V of a received all-to-all buffer into their ring slots; Q is used where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ring import RingPosition


def _place(packed: Tensor, *_: object) -> tuple[str, torch.dtype, int, int]:
    tokens, dim = (packed.shape[0], packed.shape[3] * packed.shape[4]) if packed.dim() == 5 else (0, 0)
    return packed.device.type, packed.dtype, tokens, dim


@kernel_op("qkv_unpack_kv_write", place=_place)
def _op(packed: Tensor, k_cache: Written, v_cache: Written, ring: RingPosition) -> Launch:
    if packed.dim() != 5 or packed.shape[2] not in (2, 3):
        raise ValueError(f"packed: got {_check.describe(packed)}, must be [S, B, 2 or 3, heads, head_dim]")
    _check.contiguous("packed", packed)
    _check.caches(k_cache, v_cache, packed)
    num_tokens, batch, parts, heads, head_dim = packed.shape
    if k_cache.shape[2:] != packed.shape[3:]:
        raise ValueError(f"k_cache: got {list(k_cache.shape)}, must hold {heads} heads of {head_dim}")
    _check.ring(batch, num_tokens, k_cache, ring)
    return Launch(
        fields={
            "parts": parts, "ring.capacity": k_cache.shape[1], "batch": batch, "tokens": num_tokens, "heads": heads,
            "head_dim": head_dim, "dtype": packed.dtype,
        }
    )  # fmt: skip


def qkv_unpack_kv_write(
    packed: Tensor, k_cache: Tensor, v_cache: Tensor, ring: RingPosition, *, backend: str | None = None
) -> Tensor | None:
    """K and V of `packed` go to their ring slots. Returns Q as a view [B, S, heads, head_dim], None where there is
    none.

    Args:
        packed: [S, B, parts, heads, head_dim], contiguous: all the chunk's tokens for this rank's heads, as the
            exchange of `qk_norm_rope_pack` buffers leaves them; parts = (q, k, v) or (k, v).
        k_cache, v_cache: [B, capacity, heads, head_dim], this rank's ring.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(backend, packed, k_cache, v_cache, ring.chunk_start, ring.cursor, ring.sink)
    return packed.select(2, 0).transpose(0, 1) if packed.shape[2] == 3 else None
