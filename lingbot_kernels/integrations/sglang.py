"""`accelerate(transformer)`: sglang's causal LingBot-World transformer on this library's ops; `restore` undoes it.

sglang's pipeline, stage, sessions, weights and parallel groups stay as they are. Tried with sglang 0.5.23.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels import ops
from lingbot_kernels.ring import RingPosition

try:
    from sglang.multimodal_gen.runtime.layers.layernorm import (
        FP32LayerNorm,
        RMSNorm,
        ScaleResidualLayerNormScaleShift,
    )
    from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
    from sglang.multimodal_gen.runtime.layers.mlp import MLP
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context
    from sglang.multimodal_gen.runtime.models.dits import lingbot_world as theirs

    from lingbot_kernels.integrations import sglang_ring as rings
except ImportError as error:
    raise ImportError(f"sglang with its LingBot-World transformer is not importable ({error})") from error

_CAMERA = "lingbot_kernels camera modulation"  # its place in sglang's cache of the same for a chunk
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def accelerate(transformer: nn.Module) -> None:
    """Make a `CausalLingBotWorldTransformer3DModel` of sglang run on this library's ops, in place. For inference.

    Self-attention: the norms and RoPE of Q and K with the write of K and V in one pass; sglang's own K/V tensors serve
    as a ring, so that nothing is rolled; the attention library that `ops.windowed_attention` takes. Blocks: layer norm,
    modulation, gates, camera and residuals fused into one pass each; GELU in the epilogue of its product where that is
    a plain one. The camera's modulation is made once per chunk, and the last block of a context update projects K and V
    alone. Every other layer is called as the module it is, so that quantised ones, LoRA and layerwise offload work as
    before; no weight is copied or kept.

    Sessions may begin before or after, and go on after `restore`.

    Args:
        transformer: built and loaded by sglang; its stage, sessions and requests need no change.

    Raises:
        TypeError: another class, or blocks with other norms than LingBot-World's.
        ValueError: accelerated already; tensor parallelism, ring or gathered K/V sharding; norms per head; hooks, a
            patched forward or torch.compile on what the ops replace. Nothing is changed then. A forward raises the same
            for what came later, and for K/V caches that can't be a ring: packed ones, ones that grow, and sinks
            elsewhere than at the video's beginning; the session is then as it was.
    """
    if is_accelerated(transformer):
        raise ValueError("transformer: is accelerated already; restore(transformer) first")
    if type(transformer) is not theirs.CausalLingBotWorldTransformer3DModel:
        raise TypeError(
            f"transformer: got {type(transformer).__name__}, must be sglang's CausalLingBotWorldTransformer3DModel"
        )
    if "forward" in transformer.__dict__:
        raise ValueError("transformer: has a patched forward, must be sglang's own: accelerate first")
    _check_groups()
    model: Any = transformer
    for i, block in enumerate(model.blocks):
        _check_block(f"blocks.{i}", block)
    _check_plain(model)
    for block in model.blocks:
        block.forward = MethodType(_block_forward, block)
    transformer.forward = MethodType(_transformer_forward, transformer)


def restore(transformer: nn.Module) -> None:
    """Undo `accelerate`: the module computes what it did before, bit for bit. A session's K/V go back to sglang's order
    at its next forward.

    Raises:
        ValueError: the transformer is not accelerated, or a forward was patched over ours; nothing is changed then.
    """
    if not is_accelerated(transformer):
        raise ValueError(f"transformer: got {type(transformer).__name__}, which is not accelerated")
    _check_ours(transformer)
    for _, module in _named_blocks(transformer):
        del module.__dict__["forward"]


def is_accelerated(transformer: nn.Module) -> bool:
    """Whether `accelerate` has changed this module, and `restore` has not."""
    return isinstance(transformer, theirs.CausalLingBotWorldTransformer3DModel) and any(
        _is_ours(module) for _, module in _named_blocks(transformer)
    )


def _is_ours(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in (_transformer_forward, _block_forward)


def _check_ours(transformer: Any) -> None:
    for name, module in _named_blocks(transformer):
        if not _is_ours(module):
            raise ValueError(f"{name}: its forward was replaced after accelerate; put it back first")


def _named_blocks(transformer: Any) -> Iterator[tuple[str, nn.Module]]:
    yield "transformer", transformer
    for i, block in enumerate(transformer.blocks):
        yield f"blocks.{i}", block


def _check_groups() -> None:
    """Raise unless the ranks share the sequence by heads, or there is one."""
    if theirs.get_tp_world_size() > 1:
        raise ValueError(f"tensor parallelism: got {theirs.get_tp_world_size()} ranks, must be 1")
    if theirs.get_ring_parallel_world_size() > 1:
        raise ValueError(f"ring parallelism: got {theirs.get_ring_parallel_world_size()} ranks, must be 1")
    strategy = theirs.lingbot_sp_strategy()
    if theirs.get_ulysses_parallel_world_size() > 1 and strategy != "ulysses":
        raise ValueError(f"SGLANG_LINGBOT_SP_STRATEGY: got {strategy!r}, must be 'ulysses'")


def _check_block(name: str, block: Any) -> None:
    """Raise unless the block's parts are those that the ops reproduce."""
    expected = [
        ("", block, theirs.CausalLingBotWorldTransformerBlock),
        (".attn1", block.attn1, theirs.LingBotWorldCausalSelfAttention),
        (".norm1", block.norm1, FP32LayerNorm),
        (".norm_q", block.norm_q, RMSNorm),
        (".norm_k", block.norm_k, RMSNorm),
        (".self_attn_residual_norm", block.self_attn_residual_norm, ScaleResidualLayerNormScaleShift),
        (".cross_attn_residual_norm", block.cross_attn_residual_norm, ScaleResidualLayerNormScaleShift),
        (".cam_conditioner", block.cam_conditioner, theirs.LingBotWorldCamConditioner),
    ]
    for part, module, wanted in expected:
        if type(module) is not wanted:
            raise TypeError(f"{name}{part}: got {type(module).__name__}, must be sglang's {wanted.__name__}")
    for part in ("norm_q", "norm_k"):
        norm = getattr(block, part)
        if norm.hidden_size != block.hidden_dim or norm.variance_size_override is not None:
            raise ValueError(f"{name}.{part}: got a norm of {norm.hidden_size}, must be of all {block.hidden_dim}")
    if block.norm_q.variance_epsilon != block.norm_k.variance_epsilon:
        raise ValueError(f"{name}.norm_q, norm_k: got different epsilons, must be the same")


_REPLACED = (
    "attn1", "norm1", "norm_q", "norm_k", "self_attn_residual_norm", "self_attn_residual_norm.norm",
    "cross_attn_residual_norm", "cross_attn_residual_norm.norm", "cam_conditioner", "mlp_residual",
)  # fmt: skip


def _check_plain(transformer: Any) -> None:
    """Raise where a module that the ops replace would have done more than its class does. Blocks may have hooks."""
    for i, block in enumerate(transformer.blocks):
        if block._compiled_call_impl is not None:
            raise ValueError(f"blocks.{i}: is compiled by torch.compile, which is not served; restore(transformer)")
        for part in _REPLACED:
            if not _plain(functools.reduce(getattr, part.split("."), block)):
                raise ValueError(f"blocks.{i}.{part}: has hooks or a patched forward, which would not run; remove them")


def _plain(module: nn.Module) -> bool:
    own = module.__dict__
    return "forward" not in own and module._compiled_call_impl is None and not any(own[hooks] for hooks in _HOOKS)


_SIGNATURE = inspect.signature(theirs.CausalLingBotWorldTransformer3DModel.forward)


@functools.wraps(theirs.CausalLingBotWorldTransformer3DModel.forward)
def _transformer_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """sglang's own forward, after a check of all that its blocks are going to need: nothing is written before."""
    given = _SIGNATURE.bind(self, *args, **kwargs).arguments
    _check_ours(self)
    _check_plain(self)
    _check_groups()
    x, caches = given["hidden_states"], given.get("kv_cache")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("accelerate: the ops have no gradients; call under torch.no_grad(), or restore(transformer)")
    if caches is None or len(caches) != len(self.blocks):
        found = None if caches is None else len(caches)
        raise ValueError(f"kv_cache: got {found}, must be one cache for each of the {len(self.blocks)} blocks")
    tokens = 1
    for size, patch in zip(x.shape[2:], self.patch_size, strict=True):
        tokens *= size // patch
    heads = self.num_attention_heads // (theirs.get_ulysses_parallel_world_size() if _shards() else 1)
    for i, cache in enumerate(caches):
        name = f"kv_cache[{i}]"
        rings.check(name, cache)
        if cache.num_cache_heads != heads:
            raise ValueError(f"{name}: got {cache.num_cache_heads} heads, must have this rank's {heads}")
        rings.place(name, cache, given.get("current_start", 0), tokens)
    recent = _sample_tokens()
    if recent is not None and recent < 0:
        raise ValueError(f"realtime_causal_kv_sample_tokens: got {recent}, must be 0 or more, or None")
    return type(self).forward(self, *args, **kwargs)


@functools.wraps(theirs.CausalLingBotWorldTransformerBlock.forward)
def _block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    freqs_cis: tuple[Tensor, ...],
    block_mask: Any,
    kv_cache: Any = None,
    crossattn_cache: Any = None,
    current_start: int = 0,
    cache_start: int | None = None,
    c2ws_plucker_emb: Tensor | None = None,
    cam_conditioner_scale_shift: tuple[Tensor, Tensor] | None = None,
    update_cache_only: bool = False,
) -> Tensor:
    """hidden_states [B, S, D] of this rank -> [B, S, D]; as they were where `update_cache_only` stops after K and V.

    Args:
        temb: [B, frames or 1, 6, D]: the timestep's modulation, of the chunk or of each of its frames.
    """
    x = (hidden_states.squeeze(1) if hidden_states.dim() == 4 else hidden_states).contiguous()
    shape, frames = x.shape, temb.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    modulation = (self.scale_shift_table + temb.float()).to(wide).flatten(0, 1)
    shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation.unbind(1)

    def by_frame(tokens: Tensor) -> Tensor:
        """[B, S, D] -> [B * frames, S / frames, D], as the modulation goes; a view."""
        return tokens.reshape(shape[0] * frames, -1, shape[2])

    y = ops.layer_norm_modulate(by_frame(x), shift_sa, scale_sa, self.norm1.eps).view(shape)
    attended = _self_attention(self, y, freqs_cis, kv_cache, current_start, update_cache_only)
    if attended is None:
        return hidden_states
    delta, _ = self.to_out(attended)
    scale, shift = _camera(self, c2ws_plucker_emb, cam_conditioner_scale_shift)
    affine = self.self_attn_residual_norm.norm
    x, y = ops.gated_residual_camera_norm(
        by_frame(x), by_frame(delta), gate_sa, None if scale is None else by_frame(scale),
        None if shift is None else by_frame(shift), affine.weight.to(delta.dtype), affine.bias.to(delta.dtype),
        affine.eps,
    )  # fmt: skip
    crossed = self._cross_attn_with_cache(y.view(shape), encoder_hidden_states, crossattn_cache)
    x, y = ops.residual_norm_modulate(x, by_frame(crossed), shift_ff, scale_ff, self.cross_attn_residual_norm.eps)
    return ops.gated_residual(x, by_frame(_feed_forward(self.ffn, y.view(shape))), gate_ff).view(shape)


def _self_attention(
    block: Any, y: Tensor, freqs_cis: tuple[Tensor, ...], cache: Any, start: int, update_cache_only: bool
) -> Tensor | None:
    """y [B, S, D] -> [B, S, D] before the output projection, K and V written; None where that is all."""
    cos_sin = freqs_cis[2] if len(freqs_cis) > 2 else torch.cat(freqs_cis[:2], dim=-1)
    sharded = _shards()
    tokens = sum(get_forward_context().forward_batch.sequence_shard_splits) if sharded else y.shape[1]
    where = rings.place("kv_cache", cache, start, tokens)
    rings.enter(cache)
    q, k, v = _project(block, y, update_cache_only)
    eps, k_weight = block.norm_k.variance_epsilon, block.norm_k.weight.to(k.dtype)
    if sharded:
        keys, values, ring = *_scratch(k, v, block.local_num_heads), RingPosition()
    else:
        keys, values, ring = cache.k, cache.v, where.ring
    new = None if sharded else v
    if q is None:
        ops.k_norm_rope_kv_write(k, new, k_weight, cos_sin, keys, values, ring, eps)
    else:
        q_weight = block.norm_q.weight.to(q.dtype)
        q = ops.qk_norm_rope_kv_write(q, k, new, q_weight, k_weight, cos_sin, keys, values, ring, eps)
    if sharded:
        q = _exchange(q, keys, values, cache, where)
    rings.commit(cache, where)
    if q is None:
        return None
    sample, recent = _sample_tokens(), None
    if sample is not None:
        recent = tokens + where.behind + sample
    out = ops.windowed_attention(q, cache.k, cache.v, where.num_visible, ring=where.latest, recent=recent)
    if not sharded:
        return out
    splits = list(get_forward_context().forward_batch.sequence_shard_splits)
    out = out.unflatten(-1, (-1, block.dim_head))
    if theirs._sequence_splits_are_uniform(splits):
        return theirs._usp_output_all_to_all(out, head_dim=2).flatten(2)
    return theirs._usp_output_all_to_all_varlen(out, splits, head_dim=2).flatten(2)


def _project(block: Any, y: Tensor, without_q: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, k, v [B, S, D] each, by sglang's fused weight where it has made one; q None where nothing needs it."""
    weight, bias = block._fused_qkv_weight, block._fused_qkv_bias
    if weight is None:
        k, v = block.to_k(y)[0], block.to_v(y)[0]
        return None if without_q else block.to_q(y)[0], k, v
    if without_q:
        rows = weight.shape[0] // 3
        k, v = F.linear(y, weight[rows:], None if bias is None else bias[rows:]).chunk(2, dim=-1)
        return None, k, v
    q, k, v = F.linear(y, weight, bias).chunk(3, dim=-1)
    return q, k, v


def _scratch(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Memory for rotated keys, and V as it is, [B, S, heads, head_dim] each: what is exchanged before it is cached."""
    values = v.contiguous().unflatten(-1, (heads, -1))
    return torch.empty_like(values), values


def _exchange(q: Tensor | None, keys: Tensor, values: Tensor, cache: Any, where: rings.Place) -> Tensor | None:
    """Trade tokens for heads over sglang's groups, in one collective; K and V go to the ring. q of all tokens."""
    parts = [keys, values] if q is None else [q.view_as(keys), keys, values]
    splits = list(get_forward_context().forward_batch.sequence_shard_splits)
    packed = torch.cat(parts, dim=-1)
    if theirs._sequence_splits_are_uniform(splits):
        packed = theirs._usp_input_all_to_all(packed, head_dim=2)
    else:
        packed = theirs._usp_input_all_to_all_varlen(packed, splits, head_dim=2)
    *queries, k, v = packed.chunk(len(parts), dim=-1)
    rings.write(cache, where, k, v)
    return queries[0] if queries else None


def _camera(
    block: Any, embedding: Tensor | None, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The block's camera (scale, shift) [B, S, D], made once for the embedding of a chunk.

    The embedding is the same object in every forward of a chunk: sglang keeps it with the request or the session, and
    its stage drops it, and what is kept here beside it, at the chunk's end.
    """
    if embedding is None:
        return None, None
    if given is not None:
        return given
    if _shards():
        return block._cam_conditioner_scale_shift(embedding)
    conditioner = block.cam_conditioner
    batch = get_forward_context().forward_batch
    store = _request_cache(batch)
    if store is None:
        return conditioner.compute_scale_shift(embedding)
    # A tensor of inference mode has no version: nobody but sglang has this one, and it doesn't write it again.
    seen = (theirs._safe_tensor_version(embedding), *(theirs._safe_tensor_version(p) for p in conditioner.parameters()))
    found = store.get(id(conditioner))
    if found is not None and found[0] is embedding and found[1] is conditioner and found[2] == seen:
        return found[3]
    store.pop(id(conditioner), None)  # so that two generations never coexist
    made = conditioner.compute_scale_shift(embedding)
    store[id(conditioner)] = (embedding, conditioner, seen, made)
    return made


def _request_cache(batch: Any) -> dict[int, Any] | None:
    """sglang's place for camera modulation, of the request's session or of the request."""
    model = theirs.CausalLingBotWorldTransformer3DModel
    cache = model._get_request_cache(batch, theirs.LINGBOT_CAM_CONDITIONER_CACHE)
    return None if cache is None else cache.setdefault(_CAMERA, {})


def _feed_forward(ffn: Any, y: Tensor) -> Tensor:
    """The MLP, with GELU in its first product's epilogue where that is a plain linear layer; else as it is."""
    if not _fuses_gelu(ffn, y):
        return ffn(y)
    return ffn.fc_out(ops.linear_gelu(y, ffn.fc_in.weight, ffn.fc_in.bias))[0]


def _fuses_gelu(ffn: Any, y: Tensor) -> bool:
    up = ffn.fc_in
    return (
        type(ffn) is MLP
        and type(up) is ColumnParallelLinear
        and type(up.quant_method) is UnquantizedLinearMethod
        and type(ffn.act) is nn.GELU
        and ffn.act.approximate == "tanh"
        and not up.skip_bias_add
        and not ffn.fuse_bias_gelu_tanh
        and up.bias is not None
        and up.weight.dtype == up.bias.dtype == y.dtype
        and all(_plain(module) for module in (ffn, up, ffn.act))
    )


def _shards() -> bool:
    """Whether this forward's tokens are shared among ranks."""
    batch = get_forward_context().forward_batch
    return bool(
        batch is not None
        and getattr(batch, "enable_sequence_shard", False)
        and theirs.get_ulysses_parallel_world_size() > 1
    )


def _sample_tokens() -> int | None:
    """Tokens before the chunk that it sees besides the sink, where sglang's interactive window limits them."""
    return getattr(get_forward_context().forward_batch, "realtime_causal_kv_sample_tokens", None)
