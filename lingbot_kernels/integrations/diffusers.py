"""`accelerate(transformer)`: diffusers' Wan transformer on this library's ops, in place; `restore` undoes it.

Weights, state dict, configuration and call stay diffusers' own. With a `kv_cache` window the same module also denoises
a video chunk by chunk, as a causal rollout over a ring of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lingbot_kernels import ops
from lingbot_kernels.models.embeddings import linear_gelu
from lingbot_kernels.plain import is_plain, untouched
from lingbot_kernels.quantization import Int8Linear, Int8Recipe, Taken, recipe_of, rows_for
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.kv_cache import CacheLayout, CrossAttentionCache, KVCache
from lingbot_kernels.realtime.runtime_cache import Store, TensorIdentity
from lingbot_kernels.realtime.weights import WeightsIdentity
from lingbot_kernels.ring import ChunkPlan

try:
    from diffusers.models.activations import GELU
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.transformers import transformer_wan as wan
except ImportError as error:
    raise ImportError(
        f"diffusers with its Wan transformer is not importable ({error}); install lingbot-kernels[diffusers]"
    ) from error

from lingbot_kernels.integrations._wan_attention import Chunk, FusedWanAttnProcessor
from lingbot_kernels.integrations._wan_hooks import (
    change_class,
    check_no_cache_around,
    check_no_offloading,
    drop_leftovers,
    without_block_caches,
)
from lingbot_kernels.integrations._wan_int8 import check_quantizable, quantize_layers, restore_layers
from lingbot_kernels.integrations._wan_support import THETA, check_supported, register_block

__all__ = ["FusedWanAttnProcessor", "KVWindow", "accelerate", "is_accelerated", "restore"]


@dataclass(frozen=True)
class KVWindow:
    """The window of a causal rollout, in latent frames: `window_frames` seen in all, the first `sink_frames` of the
    video always among them.
    """

    window_frames: int = 18
    sink_frames: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.sink_frames < self.window_frames:
            raise ValueError(
                f"sink_frames: got {self.sink_frames}, must be from 0 to window_frames - 1 = {self.window_frames - 1}"
            )


def accelerate(
    transformer: nn.Module, kv_cache: KVWindow | None = None, precision: str | Int8Recipe = "bfloat16"
) -> None:
    """Make a `WanTransformer3DModel` run on this library's ops, in place. For inference: the ops have no gradients.

    Self-attention: full-width RMSNorm and RoPE of Q and K in one pass, the attention library that
    `ops.windowed_attention` takes (or the backend that diffusers' `set_attention_backend` names). Blocks: layer norm,
    modulation, gates and residuals fused into one pass each; GELU in the epilogue of its product. The RoPE table is
    made once for a video size, exact for any frame index. Timesteps per token (Wan 2.2 TI2V 5B) keep diffusers' own
    passes between the products, since their modulation is a tensor of the activations' size; attention is fused all
    the same.

    Args:
        transformer: of class `WanTransformer3DModel`, with diffusers' own attention processors.
        kv_cache: a window makes causal forwards possible:
            `transformer(latents, timestep, text, state=state, start_frame=n)` sees latents [B, C, F, H, W] as frames
            n .. n + F - 1 of the video whose keys and values `state`, a `RealtimeCausalDiTState`, holds;
            `update_cache_only=True` writes the chunk's clean K and V and returns None. A call without `state` is an
            ordinary one.
        precision: "int8", or an Int8Recipe: the blocks' products run on int8 rows and int8 weights; the layers that
            these replace wait in host memory for `restore`, before which the state dict is not diffusers' own.

    Raises:
        TypeError: another model class, or processors that are not diffusers' `WanAttnProcessor`; named.
        ValueError: accelerated already; a forward patched by other hooks than those of torch, diffusers and accelerate;
            another RoPE, norm or layout than Wan's. Nothing is changed then.
    """
    if is_accelerated(transformer):
        raise ValueError("transformer: is accelerated already; restore(transformer) first")
    check_supported(transformer)
    recipe = recipe_of(precision)
    if recipe is not None:
        check_no_offloading(transformer, "layers are quantised")
    layers = {} if recipe is None else check_quantizable(transformer, recipe)
    register_block(AcceleratedWanTransformerBlock)
    drop_leftovers(transformer)
    change_class(transformer, AcceleratedWanTransformer3DModel)
    accelerated: Any = transformer
    accelerated.lingbot_kv_window = kv_cache
    accelerated.lingbot_owner = object()
    accelerated.lingbot_weights = WeightsIdentity()
    accelerated.lingbot_layers = {} if recipe is None else quantize_layers(transformer, layers, recipe)
    change_class(accelerated.rope, AcceleratedWanRotaryPosEmbed)
    accelerated.rope.lingbot_tables = Store(4)
    for block in accelerated.blocks:
        change_class(block, AcceleratedWanTransformerBlock)
        block.lingbot_processors = (block.attn1.processor, block.attn2.processor)
        for attention in (block.attn1, block.attn2):
            processor = FusedWanAttnProcessor()
            processor._attention_backend = attention.processor._attention_backend
            attention.set_processor(processor)


def restore(transformer: nn.Module) -> None:
    """Undo `accelerate`: the module computes what it did before, bit for bit. Hooks and adapters that came since stay.

    Raises:
        ValueError: the transformer is not accelerated, or offloading hooks stand around int8 layers; nothing is
            changed then.
    """
    if not isinstance(transformer, AcceleratedWanTransformer3DModel):
        raise ValueError(f"transformer: got {type(transformer).__name__}, which is not accelerated")
    accelerated: Any = transformer
    if accelerated.lingbot_layers:
        check_no_offloading(transformer, "int8 layers are replaced")
    drop_leftovers(transformer)
    restore_layers(accelerated, accelerated.lingbot_layers)
    for block in accelerated.blocks:
        for attention, processor in zip((block.attn1, block.attn2), block.lingbot_processors, strict=True):
            processor._attention_backend = getattr(attention.processor, "_attention_backend", None)
            attention.set_processor(processor)
        del block.lingbot_processors
        change_class(block, wan.WanTransformerBlock)
    del accelerated.rope.lingbot_tables, accelerated.lingbot_kv_window
    del accelerated.lingbot_owner, accelerated.lingbot_weights, accelerated.lingbot_layers
    change_class(accelerated.rope, wan.WanRotaryPosEmbed)
    change_class(transformer, wan.WanTransformer3DModel)


def is_accelerated(transformer: nn.Module) -> bool:
    """Whether `accelerate` has changed this module, and `restore` has not."""
    return isinstance(transformer, AcceleratedWanTransformer3DModel)


class AcceleratedWanRotaryPosEmbed(wan.WanRotaryPosEmbed):
    """RoPE as one float32 table cos‖sin [S, head_dim], kept for the latest video sizes."""

    lingbot_tables: Store

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: latents [B, C, F, H, W]."""
        if not isinstance(self, AcceleratedWanRotaryPosEmbed):  # called by what kept this forward, after restore
            return wan.WanRotaryPosEmbed.forward(self, hidden_states)
        frames, height, width = (
            size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)
        )
        return self.table(frames * height * width, 0, (height, width), hidden_states.device)

    def table(self, num_tokens: int, token_start: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The rows of `num_tokens` tokens from `token_start` of a video with `grid` (rows, columns) tokens a frame."""
        if self._forward_hooks or self._forward_pre_hooks:
            raise ValueError(
                "rope: got forward hooks, must have none: its table has another form than diffusers', and is kept"
            )
        key = (num_tokens, token_start, grid[0] * grid[1], grid[1], self.attention_head_dim, THETA, device)
        if torch.compiler.is_compiling():
            return ops.rope_cos_sin(*key)
        return self.lingbot_tables.get_or_compute(key, lambda: ops.rope_cos_sin(*key))


class AcceleratedWanTransformerBlock(wan.WanTransformerBlock):
    """Wan's block with one fused pass between two matrix products."""

    lingbot_processors: tuple[Any, Any]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, ...],
        temb: Tensor,
        rotary_emb: Tensor | Chunk,
    ) -> Tensor | None:
        """hidden_states [B, S, D] -> [B, S, D]; None after a chunk's write-only pass.

        Args:
            encoder_hidden_states: context [B, L, D], or its K and V for this block.
            temb: [B, 6, D]; [B, S, 6, D] with timesteps per token.
            rotary_emb: see `FusedWanAttnProcessor`.
        """
        if not isinstance(self, AcceleratedWanTransformerBlock):  # called by what kept this forward, after restore
            return wan.WanTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
        x = hidden_states
        for attention in (self.attn1, self.attn2):
            if type(attention.processor) is not FusedWanAttnProcessor:
                raise TypeError(
                    f"processor: got {type(attention.processor).__name__}, which was set after accelerate; must be "
                    "FusedWanAttnProcessor (restore the transformer to use another)"
                )
        if torch.is_grad_enabled() and self._wants_gradients(x, encoder_hidden_states, temb):
            raise RuntimeError(
                "accelerate: the ops have no gradients; call the transformer under torch.no_grad() or "
                "torch.inference_mode(), or restore(transformer) to train it"
            )
        if temb.ndim == 4 or not self.has_plain_norms():
            return super().forward(x, encoder_hidden_states, temb, rotary_emb)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        modulation = (self.scale_shift_table + temb.float()).to(wide)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation.unbind(1)

        first = self.attn1.to_qkv if self.attn1.fused_projections else self.attn1.to_q
        y = rows_for(first, self.attn1).layer_norm_modulate(x, shift_sa, scale_sa, self.norm1.eps, x.dtype)
        attended = self.attn1(y, None, None, rotary_emb)
        if attended is None:
            return None
        if isinstance(self.norm2, nn.Identity):
            x = y = ops.gated_residual(x, attended, gate_sa)
        else:
            # The affine norm as a modulated one: its parameters may be float32 where activations are not.
            shift, scale = self.norm2.bias.to(wide), self.norm2.weight.to(wide) - 1
            rows = rows_for(self.attn2.to_q, self.attn2)
            x, y = rows.residual_norm_modulate(x, attended, shift, scale, self.norm2.eps, gate_sa)
        attended = self.attn2(y, encoder_hidden_states, None, None)
        rows = rows_for(self.ffn.net[0].proj, self.ffn.net[0], self.ffn)
        x, y = rows.residual_norm_modulate(x, attended, shift_ff, scale_ff, self.norm3.eps)
        return ops.gated_residual(x, self._feed_forward(y), gate_ff)

    def _feed_forward(self, y: Taken) -> Tensor:
        first, *rest = self.ffn.net
        up = first.proj
        # A LoRA layer, a quantised one or one with hooks is called as it is; autocast casts what is called.
        if not (is_plain(first, GELU) and untouched(self.ffn)):
            return self.ffn(y)
        fused = isinstance(up, Int8Linear) or (
            is_plain(up, nn.Linear) and isinstance(y, Tensor) and up.weight.dtype == y.dtype
        )
        hidden = linear_gelu(up, y) if fused else first(y)
        for layer in rest:
            hidden = layer(hidden)
        return hidden

    def has_plain_norms(self) -> bool:
        """Whether the block's passes may read the norms themselves, so that no norm is called."""
        return (
            is_plain(self.norm1, wan.FP32LayerNorm)
            and is_plain(self.norm2, wan.FP32LayerNorm, nn.Identity)
            and is_plain(self.norm3, wan.FP32LayerNorm)
        )

    def ends_with_write(self) -> bool:
        """Whether a write-only pass may leave out what follows the write: no hook expects to see it."""
        return self.has_plain_norms() and untouched(self) and untouched(self.attn1)

    def _wants_gradients(self, x: Tensor, context: Tensor | tuple[Tensor, ...], temb: Tensor) -> bool:
        given = (x, temb, *(context if isinstance(context, tuple) else (context,)))
        return any(tensor.requires_grad for tensor in given) or any(w.requires_grad for w in self.parameters())


class AcceleratedWanTransformer3DModel(wan.WanTransformer3DModel):
    """Wan's transformer, which also takes a session's `state` where it was given a K/V window."""

    lingbot_kv_window: KVWindow | None
    lingbot_owner: object
    lingbot_weights: WeightsIdentity
    lingbot_layers: dict[str, nn.Linear]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        state: RealtimeCausalDiTState | None = None,
        start_frame: int | None = None,
        update_cache_only: bool = False,
    ) -> Any:
        """diffusers' own call; with `state`, a causal forward of one chunk.

        Args:
            state: the session; see `accelerate`.
            start_frame: absolute latent frame of the chunk's first one: the session's next frame, or the current
                chunk's again, whose K and V are then replaced.
            update_cache_only: write K and V and return None; the last block ends with its write.

        Raises:
            ValueError, TypeError: naming the argument; the session is then as it was.
        """
        if not isinstance(self, AcceleratedWanTransformer3DModel):  # called by what kept this forward, after restore
            if state is not None or start_frame is not None or update_cache_only:
                raise ValueError("state: got a causal call, but the transformer is not accelerated any more")
            return wan.WanTransformer3DModel.forward(
                self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, return_dict,
                attention_kwargs=attention_kwargs,
            )  # fmt: skip
        if state is None:
            if start_frame is not None or update_cache_only:
                raise ValueError(
                    "state: got None, must be a RealtimeCausalDiTState with start_frame, update_cache_only"
                )
            return super().forward(
                hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, return_dict,
                attention_kwargs=attention_kwargs,
            )  # fmt: skip
        if attention_kwargs:
            raise ValueError(f"attention_kwargs: got {sorted(attention_kwargs)}, must be None in a causal forward")
        out = self._causal_forward(
            hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, state, start_frame,
            update_cache_only,
        )  # fmt: skip
        if out is None:
            return None
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def weights_changed(self) -> None:
        """Say that weights were written through `.data`, which can't be seen: sessions then drop their text K/V. Other
        changes are noticed, see `realtime.weights`.
        """
        self.lingbot_weights.renew()

    @torch.compiler.disable(recursive=False)
    def _causal_forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None, state: RealtimeCausalDiTState,
        start_frame: int | None, update_cache_only: bool,
    ) -> Tensor | None:  # fmt: skip
        """The session's bookkeeping around `_causal_pass`; where it raises, the session is as it was."""
        with state.attempt():
            self._check_chunk(latents, timestep, text, image, start_frame)
            assert start_frame is not None
            kv, plan = self._enter_chunk(state, latents, start_frame)
            with without_block_caches(self):
                out = self._causal_pass(latents, timestep, text, image, state, start_frame, update_cache_only, kv, plan)
            state.commit(plan)
        return out

    def _causal_pass(
        self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None, state: RealtimeCausalDiTState,
        start_frame: int, update_cache_only: bool, kv: KVCache, plan: ChunkPlan,
    ) -> Tensor | None:  # fmt: skip
        batch, _, frames, height, width = latents.shape
        patch = self.config.patch_size
        grid = (height // patch[1], width // patch[2])
        x = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        tokens = grid[0] * grid[1]
        # The table of a session's chunk is shared by its forwards: the rope module keeps the latest few.
        cos_sin = self.rope.table(frames * tokens, start_frame * tokens, grid, latents.device)
        temb, modulation, context, image_context = self.condition_embedder(timestep, text, image)
        modulation = modulation.unflatten(1, (6, -1))
        if image_context is not None:
            context = torch.cat([image_context, context], dim=1)
        text_kv = self._text_kv(state, text, image, context)
        cursor, sink, num_visible = self._write_chunk(state, kv, plan)
        last = len(self.blocks) - 1
        ends_early = update_cache_only and self.blocks[last].ends_with_write()
        for i, block in enumerate(self.blocks):
            k_cache, v_cache, *_ = kv.layers[i]  # never in int8
            place = Chunk(cos_sin, k_cache, v_cache, cursor, sink, num_visible, ends_early and i == last)
            x = block(x, text_kv[i] or context, modulation, place)
        if update_cache_only:
            return None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).to(wide).unbind(1)
        if is_plain(self.norm_out, wan.FP32LayerNorm):
            y = ops.layer_norm_modulate(x, shift, scale, self.norm_out.eps)
        else:
            y = (self.norm_out(x.to(wide)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(x.dtype)
        y = self.proj_out(y)
        y = y.view(batch, frames, *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _check_chunk(
        self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None, start_frame: int | None
    ) -> None:
        if self.lingbot_kv_window is None:
            raise ValueError("state: got one, but accelerate was not given a kv_cache window")
        check_no_cache_around(self)
        if not isinstance(start_frame, int) or isinstance(start_frame, bool) or start_frame < 0:
            raise ValueError(f"start_frame: got {start_frame!r}, must be an int of 0 or more")
        cfg = self.config
        patch, channels = cfg.patch_size, cfg.in_channels
        if patch[0] != 1:
            raise ValueError(f"patch_size: got {patch}, must be 1 in its first place: the window counts latent frames")
        if latents.ndim != 5 or latents.shape[1] != channels or any(
            size < 1 or size % p for size, p in zip(latents.shape[2:], patch, strict=True)
        ):  # fmt: skip
            raise ValueError(
                f"hidden_states: got {list(latents.shape)}, must be [B, {channels}, F, H, W] with H, W multiples of "
                f"{patch[1]}, {patch[2]}"
            )
        batch = latents.shape[0]
        if timestep.shape != (batch,):
            raise ValueError(f"timestep: got shape {list(timestep.shape)}, must be [{batch}] in a causal forward")
        if timestep.device.type == "cpu" and not timestep.isfinite().all():  # to read a device's would wait for it
            raise ValueError(f"timestep: got {timestep.tolist()}, must be finite")
        given = [("encoder_hidden_states", text, cfg.text_dim)]
        if image is not None:
            given.append(("encoder_hidden_states_image", image, cfg.image_dim))
        for name, x, dim in given:
            if x.ndim != 3 or x.shape[0] != batch or x.shape[1] < 1 or x.shape[2] != dim:
                raise ValueError(f"{name}: got shape {list(x.shape)}, must be [{batch}, L >= 1, {dim}]")

    def _enter_chunk(
        self, state: RealtimeCausalDiTState, latents: Tensor, start_frame: int
    ) -> tuple[KVCache, ChunkPlan]:
        """The session's cache, allocated where it begins, and what the chunk is going to do to it."""
        window, cfg = self.lingbot_kv_window, self.config
        assert window is not None
        batch, _, frames, height, width = latents.shape
        grid = (height // cfg.patch_size[1], width // cfg.patch_size[2])
        layout = CacheLayout(
            cfg.num_layers, batch, cfg.num_attention_heads, cfg.attention_head_dim, grid,
            window.window_frames, window.sink_frames, _computed_dtype(latents), latents.device,
        )  # fmt: skip
        plan = state.plan(self.lingbot_owner, layout, start_frame, frames)
        if state.kv_cache is None:
            with torch.inference_mode(False):
                state.begin(layout, owner=self.lingbot_owner)
        assert state.kv_cache is not None
        state.use_weights(self.lingbot_weights.token(self))
        return state.kv_cache, plan

    @torch.compiler.disable
    def _write_chunk(self, state: RealtimeCausalDiTState, kv: KVCache, plan: ChunkPlan) -> tuple[Tensor, int, int]:
        """(cursor, sink, visible slots) of the chunk, whose keys and values are written from now on."""
        state.write(plan)
        with torch.inference_mode(False):
            place = kv.device_position(plan)
        assert place.ring.cursor is not None
        return place.ring.cursor, place.ring.sink, place.num_visible

    @torch.compiler.disable
    def _text_kv(
        self, state: RealtimeCausalDiTState, text: Tensor, image: Tensor | None, context: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Every block's K and V of the context; made once per prompt. Of a block whose weights a hook may bring only
        while it runs, nothing.
        """

        def compute() -> CrossAttentionCache:
            layers: list[Any] = [
                b.attn2.processor.project(b.attn2, context) if "forward" not in b.__dict__ | b.attn2.__dict__ else ()
                for b in self.blocks
            ]  # fmt: skip
            return CrossAttentionCache(layers)

        key = (TensorIdentity(text), None if image is None else TensorIdentity(image))
        return state.runtime_cache["text"].get_or_compute(key, compute).layers


# diffusers tells modules apart by the names of their classes (compile_repeated_blocks, _no_split_modules, config.json).
for _accelerated in (AcceleratedWanTransformer3DModel, AcceleratedWanTransformerBlock, AcceleratedWanRotaryPosEmbed):
    _accelerated.__name__ = _accelerated.__base__.__name__


def _computed_dtype(latents: Tensor) -> torch.dtype:
    """What products of the latents come out in: autocast's dtype within autocast."""
    device = latents.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else latents.dtype
