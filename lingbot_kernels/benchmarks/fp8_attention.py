"""Self-attention by FlashAttention-3 in fp8: a choice that `quality` measures int8 Q and K against, and no default.

Hopper's fp8 product adds up in about 13 bits of mantissa, so that a mean of V is lost among thousands of keys. It is
taken out before and added back after, which is exact: softmax's weights sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops.windowed_attention import flash_attention_3, why_not

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max


def why_not_fp8(model: CausalLingBotTransformer) -> str | None:
    """Why the model's self-attention can't run so, or None."""
    return why_not("fa3", model.device.type, model.dtype, model.config.head_dim)


def without_mean(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v minus its mean over the keys, that mean [B, 1, heads, head_dim]) of v [B, keys, heads, head_dim], in float32
    (float64 for float64 v).
    """
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    mean = wide.mean(dim=1, keepdim=True)
    return wide - mean, mean


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [B, tokens, heads, head_dim], scale float32 [B, heads] that they are multiplied by)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=(1, 3)) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale.float()


def fp8_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, num_visible: int) -> Tensor:
    """`windowed_attention` with Q, K and V in fp8, V without its mean: [B, S, D] in q's dtype.

    Args:
        q: [B, S, D] or [B, S, heads, head_dim].
        k_cache, v_cache: [B, capacity, heads, head_dim], of which slots 0 .. num_visible are seen.
    """
    heads = q if q.dim() == 4 else q.unflatten(-1, k_cache.shape[2:])
    centred, mean = without_mean(v_cache[:, :num_visible])
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (to_fp8(x) for x in (heads, k_cache[:, :num_visible], centred))
    out = flash_attention_3()(
        q8, k8, v8, softmax_scale=heads.shape[-1] ** -0.5, causal=False, q_descale=q_scale, k_descale=k_scale,
        v_descale=v_scale,
    )  # fmt: skip
    return (out.to(mean.dtype) + mean).to(q.dtype).flatten(-2)


@contextmanager
def in_fp8_attention(model: CausalLingBotTransformer) -> Iterator[None]:
    """Every block's self-attention runs so, in sessions that begin within."""
    attentions: list[Any] = [block.self_attn for block in model.blocks]
    try:
        for attention in attentions:
            attention.attend = fp8_attention
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("attend", None)
