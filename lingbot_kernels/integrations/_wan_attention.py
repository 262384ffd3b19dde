"""Wan's attention on the fused ops: what `integrations.diffusers.accelerate` sets in place of `WanAttnProcessor`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan as wan
from torch import Tensor, nn

from lingbot_kernels import ops
from lingbot_kernels.models.unfused import rope, rope_kv_write
from lingbot_kernels.plain import is_plain
from lingbot_kernels.quantization import Taken

_NO_TABLE = "rotary_emb: got None, must be the table of the accelerated rope module"
_TEXT_TOKENS = 512  # of image-to-video's joint context, whose image tokens come first


class Chunk(NamedTuple):
    """What self-attention of one layer is given in a causal forward, in the place of diffusers' `rotary_emb`."""

    cos_sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cursor: Tensor
    sink: int
    num_visible: int
    write_only: bool

    @property
    def ring(self) -> ops.RingPosition:
        return ops.RingPosition(0, self.sink, self.cursor)


class FusedWanAttnProcessor:
    """Wan's self- and cross-attention on the fused ops: what `accelerate` sets in place of `WanAttnProcessor`."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: wan.WanAttention,
        hidden_states: Taken,
        encoder_hidden_states: Tensor | tuple[Tensor, ...] | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | Chunk | None = None,
    ) -> Tensor | None:
        """hidden_states [B, S, D], or its int8 codes -> [B, S, D].

        Args:
            encoder_hidden_states: None for self-attention; context [B, L, D], or K and V made of it by `project`.
            rotary_emb: for self-attention the table, float32 [S, head_dim], or a chunk's place in its K/V ring.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask: got {list(attention_mask.shape)}, must be None")
        if self._parallel_config is not None:
            raise ValueError("context parallelism: not served by accelerate; restore(transformer) first")
        if encoder_hidden_states is None:
            attended = self._self_attention(attn, hidden_states, rotary_emb)
            if attended is None:
                return None
        else:
            context = encoder_hidden_states
            pairs = self.project(attn, context) if isinstance(context, Tensor) else context
            q = _norm(attn.norm_q, attn.to_q(hidden_states))
            attended = self._attend(q, pairs[0], pairs[1])
            if len(pairs) > 2:
                attended = attended + self._attend(q, pairs[2], pairs[3])
        return attn.to_out[1](attn.to_out[0](attended))

    def project(self, attn: wan.WanAttention, context: Tensor) -> tuple[Tensor, ...]:
        """K and V of the text, then of the image where the model has image projections: [B, L, heads, head_dim]."""
        image = None
        if attn.add_k_proj is not None:
            split = context.shape[1] - _TEXT_TOKENS
            image, context = context[:, :split], context[:, split:]
        if attn.fused_projections:
            k, v = attn.to_kv(context).chunk(2, dim=-1)
        else:
            k, v = attn.to_k(context), attn.to_v(context)
        pairs = [_norm(attn.norm_k, k), v]
        if image is not None:
            if attn.fused_projections:
                k, v = attn.to_added_kv(image).chunk(2, dim=-1)
            else:
                k, v = attn.add_k_proj(image), attn.add_v_proj(image)
            pairs += [_norm(attn.norm_added_k, k), v]
        return tuple(x.unflatten(-1, (attn.heads, -1)) for x in pairs)

    def _self_attention(self, attn: wan.WanAttention, x: Taken, place: Tensor | Chunk | None) -> Tensor | None:
        if not (is_plain(attn.norm_q, nn.RMSNorm) and is_plain(attn.norm_k, nn.RMSNorm)):
            return self._by_module(attn, x, place)
        eps = attn.norm_k.eps
        if isinstance(place, Chunk):
            caches = (place.k_cache, place.v_cache)
            if place.write_only:
                k, v = _project_kv(attn, x)
                ops.k_norm_rope_kv_write(k, v, _like(attn.norm_k.weight, k), place.cos_sin, *caches, place.ring, eps)
                return None
            q, k, v = _project_qkv(attn, x)
            weights = (_like(attn.norm_q.weight, q), _like(attn.norm_k.weight, k))
            q = ops.qk_norm_rope_kv_write(q, k, v, *weights, place.cos_sin, *caches, place.ring, eps)
            return self._attend(q, *caches, place.num_visible)
        if place is None:
            raise ValueError(_NO_TABLE)
        q, k, v = _project_qkv(attn, x)
        weights = (_like(attn.norm_q.weight, q), _like(attn.norm_k.weight, k))
        keys = k.new_empty(*k.shape[:2], attn.heads, k.shape[2] // attn.heads)
        if attn.fused_projections:  # V lies between Q and K in memory, which the op must not write
            values = torch.empty_like(keys)
            q = ops.qk_norm_rope_kv_write(q, k, v, *weights, place, keys, values, ops.RingPosition(), eps)
        else:
            values = v.unflatten(-1, (attn.heads, -1))
            q = ops.qk_norm_rope_kv_write(q, k, None, *weights, place, keys, values, ops.RingPosition(), eps)
        return self._attend(q, keys, values)

    def _by_module(self, attn: wan.WanAttention, x: Taken, place: Tensor | Chunk | None) -> Tensor | None:
        """`_self_attention` where a norm has hooks or is of another class: norms are called, RoPE is a pass."""
        if place is None:
            raise ValueError(_NO_TABLE)
        if isinstance(place, Chunk):
            caches = (place.k_cache, place.v_cache)
            if place.write_only:
                k, v = _project_kv(attn, x)
                rope_kv_write(None, _norm(attn.norm_k, k), v, place.cos_sin, *caches, place.ring)
                return None
            q, k, v = _project_qkv(attn, x)
            q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
            rotated = rope_kv_write(q, k, v, place.cos_sin, *caches, place.ring)
            assert rotated is not None
            return self._attend(rotated, *caches, place.num_visible)
        q, k, v = _project_qkv(attn, x)
        q, k = (rope(y, place) for y in (_norm(attn.norm_q, q), _norm(attn.norm_k, k)))
        return self._attend(q, k.unflatten(-1, (attn.heads, -1)), v.unflatten(-1, (attn.heads, -1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, num_visible: int | None = None) -> Tensor:
        """Attention of q [B, S, D] to the first `num_visible` (all, where None) of k, v [B, L, heads, head_dim]."""
        num_visible = k.shape[1] if num_visible is None else num_visible
        if self._attention_backend is None:
            return ops.windowed_attention(q, k, v, num_visible)
        queries, keys, values = q.unflatten(-1, k.shape[2:]), k[:, :num_visible], v[:, :num_visible]
        out = dispatch_attention_fn(queries, keys, values, backend=self._attention_backend)
        return out.flatten(2, 3).type_as(q)


def _project_qkv(attn: wan.WanAttention, x: Taken) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        return q, k, v
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _project_kv(attn: wan.WanAttention, x: Taken) -> tuple[Tensor, Tensor]:
    if attn.fused_projections:
        _, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        return k, v
    return attn.to_k(x), attn.to_v(x)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """norm(x) in x's dtype, by the op where the norm is plain."""
    if is_plain(norm, nn.RMSNorm):
        return ops.rms_norm(x, _like(norm.weight, x), norm.eps)
    return norm(x).to(x.dtype)


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype, which autocast may have made another one than the model's."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)
