"""RMSNorm + RoPE of Q and K, and V, written into the one buffer of a sequence-parallel all-to-all exchange."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan
from lingbot_kernels.ops.qk_norm_rope_kv_write import check_table


def _shape(q: Tensor | None, k: Tensor, cos_sin: Tensor, ranks: int) -> tuple[int, ...]:
    head_dim = cos_sin.shape[1]
    return (ranks, k.shape[1], k.shape[0], 2 if q is None else 3, k.shape[2] // head_dim // ranks, head_dim)


def _check_arguments(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor, ranks: int
) -> None:
    _check.tokens("k", k)
    _check.tokens("v", v, k)
    _, num_tokens, dim = k.shape
    head_dim = cos_sin.shape[-1]
    check_table(cos_sin, num_tokens, head_dim, k)
    if dim % head_dim or ranks < 1 or dim // head_dim % ranks:
        raise ValueError(f"ranks: got {ranks}, must divide the heads, D / head_dim = {dim} / {head_dim}")
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    if q is not None and q_weight is not None:
        _check.tokens("q", q, k)
        _check.weight("q_weight", q_weight, dim, k)
    _check.weight("k_weight", k_weight, dim, k)


def _plan(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor, ranks: int,
    eps: float, backend: str,
) -> Plan:  # fmt: skip
    _check_arguments(q, k, v, q_weight, k_weight, cos_sin, ranks)
    batch, num_tokens, dim = k.shape
    head_dim = cos_sin.shape[1]
    arguments = ("q", "k", "v", "q_weight", "k_weight", "cos_sin")
    if backend == "reference":
        return Plan(reference.qk_norm_rope_pack, (*arguments, ranks, "eps"))
    outputs = (Output("packed", like="k", shape=_shape(q, k, cos_sin, ranks)),)
    if backend == "triton":
        from lingbot_kernels.triton import qk_norm_rope_pack as kernel

        _dispatch.demand("qk_norm_rope_pack", "triton", kernel.why_not(q, k, v))
        return Plan(kernel.qk_norm_rope_pack, (*arguments, "packed", "eps"), outputs)
    fields = (
        *_native.rows("q", q), *_native.rows("k", k), *_native.rows("v", v),
        "q_weight", "k_weight", "cos_sin", "packed",
        batch, num_tokens, dim // head_dim, head_dim, ranks, _native.DTYPE_CODES[k.dtype], "eps",
    )  # fmt: skip
    return _native.plan("qk_norm_rope_pack", backend, fields, outputs)


def _fake(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor, ranks: int,
    eps: float, backend: str,
) -> Tensor:  # fmt: skip
    _check_arguments(q, k, v, q_weight, k_weight, cos_sin, ranks)
    return k.new_empty(_shape(q, k, cos_sin, ranks))


_op = register_kernel(
    "qk_norm_rope_pack(Tensor? q, Tensor k, Tensor v, Tensor? q_weight, Tensor k_weight, Tensor cos_sin, int ranks, "
    "float eps, str backend) -> Tensor",
    _plan,
    _fake,
    place=lambda q, k, *_: _dispatch.place(k),
)


def qk_norm_rope_pack(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    ranks: int,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """This shard's Q, K, V in the layout of one all-to-all: [ranks, S, B, parts, heads / ranks, head_dim], contiguous.

    Slice r goes to rank r: its heads of rope(rms_norm(q)), rope(rms_norm(k)) and v (parts = 3), or without q and
    q_weight of the last two (parts = 2). Norm, rotation and rounding are those of `qk_norm_rope_kv_write`.

    Args:
        q, k, v: [B, S, D], strided views serve; S tokens of this shard.
        cos_sin: float32 [S, head_dim] of the shard's own tokens.
        ranks: ranks of the exchange; must divide the heads.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, q, k, v, q_weight, k_weight, cos_sin, ranks, eps)
