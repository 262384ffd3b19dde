"""The write-only half of `qk_norm_rope_kv_write`: what the last block of a context update runs. No Q anywhere."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops._declare import Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops.qk_norm_rope_kv_write import checked_fields
from lingbot_kernels.ring import RingPosition


@kernel_op("k_norm_rope_kv_write", absent=("q", "q_weight", "q_out"))
def _op(
    k: Tensor, v: Tensor | None, k_weight: Tensor, cos_sin: Tensor, k_cache: Written, v_cache: Written,
    ring: RingPosition, eps: float,
) -> Launch:  # fmt: skip
    return Launch(fields=checked_fields(None, k, v, None, k_weight, cos_sin, k_cache, v_cache, ring))


def k_norm_rope_kv_write(
    k: Tensor,
    v: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ring: RingPosition,
    eps: float,
    *,
    backend: str | None = None,
) -> None:
    """k_cache[slot(i)] = rope(rms_norm(k))[i]; v_cache[slot(i)] = v[i], with the bits that `qk_norm_rope_kv_write`
    leaves.

    Args, rounding and errors are those of `qk_norm_rope_kv_write`, without Q: k, v [B, S, D], v None where V already
    lies in its slots; k_weight [D]; cos_sin float32 [S, head_dim]; caches [B, capacity, heads, head_dim].
    """
    _op(backend, k, v, k_weight, cos_sin, k_cache, v_cache, ring.chunk_start, ring.cursor, ring.sink, eps)
