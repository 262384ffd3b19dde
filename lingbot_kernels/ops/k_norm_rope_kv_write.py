"""The write-only half of `qk_norm_rope_kv_write`: what the last block of a context update runs. No Q anywhere."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _dispatch
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Plan
from lingbot_kernels.ops.qk_norm_rope_kv_write import check_arguments, plan
from lingbot_kernels.ring import RingPosition


def _plan(
    k: Tensor, v: Tensor | None, k_weight: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> Plan:  # fmt: skip
    return plan(None, k, v, None, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink, eps, backend)


def _fake(
    k: Tensor, v: Tensor | None, k_weight: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    chunk_start: int, cursor: Tensor | None, sink: int, eps: float, backend: str,
) -> None:  # fmt: skip
    check_arguments(None, k, v, None, k_weight, cos_sin, k_cache, v_cache, chunk_start, cursor, sink)


_op = register_kernel(
    "k_norm_rope_kv_write(Tensor k, Tensor? v, Tensor k_weight, Tensor cos_sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, SymInt chunk_start, Tensor? cursor, SymInt sink, float eps, str backend) -> ()",
    _plan,
    _fake,
    place=lambda k, *_: _dispatch.place(k),
    varying=("chunk_start",),
)


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
