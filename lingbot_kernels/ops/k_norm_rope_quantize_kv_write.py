"""The write-only half of `qk_norm_rope_quantize_kv_write`: what the last block of a context update runs. No Q."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops._declare import Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops.qk_norm_rope_quantize_kv_write import quantized_fields
from lingbot_kernels.ring import RingPosition


@kernel_op("k_norm_rope_quantize_kv_write", absent=("q", "q_weight", "q_codes", "q_scale"))
def _op(
    k: Tensor, v: Tensor | None, k_weight: Tensor, cos_sin: Tensor, k_cache: Written, k_scale: Written,
    v_cache: Written, ring: RingPosition, eps: float,
) -> Launch:  # fmt: skip
    return Launch(fields=quantized_fields(None, k, v, None, k_weight, cos_sin, k_cache, k_scale, v_cache, ring))


def k_norm_rope_quantize_kv_write(
    k: Tensor,
    v: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor,
    ring: RingPosition,
    eps: float,
    *,
    backend: str | None = None,
) -> None:
    """K's codes and scales and v to slot(i), with the bits that `qk_norm_rope_quantize_kv_write` leaves.

    Args, rounding and errors are those of `qk_norm_rope_quantize_kv_write`, without Q: k, v [B, S, D], v None where V
    already lies in its slots; k_weight [D]; cos_sin float32 [S, head_dim]; k_cache int8 and v_cache
    [B, capacity, heads, head_dim]; k_scale float32 [B, capacity, heads].
    """
    _op(backend, k, v, k_weight, cos_sin, k_cache, k_scale, v_cache, ring.chunk_start, ring.cursor, ring.sink, eps)
