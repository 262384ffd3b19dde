"""RMSNorm + RoPE of Q and K, and V, written into the one buffer of a sequence-parallel all-to-all exchange."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check, _dispatch
from lingbot_kernels.ops._declare import Launch, Output
from lingbot_kernels.ops._library import kernel_op


@kernel_op("qk_norm_rope_pack", returns=("out",), place=lambda q, k, *_: _dispatch.place(k))
def _op(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, cos_sin: Tensor, ranks: int,
    eps: float,
) -> Launch:  # fmt: skip
    _check.tokens("k", k)
    _check.tokens("v", v, k)
    batch, num_tokens, dim = k.shape
    head_dim = cos_sin.shape[-1]
    _check.table("cos_sin", cos_sin, num_tokens, head_dim, k)
    if dim % head_dim or ranks < 1 or dim // head_dim % ranks:
        raise ValueError(f"ranks: got {ranks}, must divide the heads, D / head_dim = {dim} / {head_dim}")
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    if q is not None and q_weight is not None:
        _check.tokens("q", q, k)
        _check.weight("q_weight", q_weight, dim, k)
    _check.weight("k_weight", k_weight, dim, k)
    heads = dim // head_dim
    packed = (ranks, num_tokens, batch, 2 if q is None else 3, heads // ranks, head_dim)
    return Launch(
        [Output(k, packed)],
        {"batch": batch, "tokens": num_tokens, "heads": heads, "head_dim": head_dim, "dtype": k.dtype},
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
