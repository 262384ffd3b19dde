"""LingBot-World's causal video DiT: transformer, block and self-attention, in the order data flows.

A chunk of frames attends to the sink, the recent window and itself through a K/V ring that belongs to the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels import nvtx, ops
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models import checkpoint, session_forward
from lingbot_kernels.models._inputs import Dtype, as_dtype
from lingbot_kernels.models.embeddings import (
    PatchEmbedding,
    TextEmbedding,
    WideSequential,
    linear_gelu,
    linear_into,
    patchify,
    timestep_embedding,
    unpatchify,
)
from lingbot_kernels.models.fused_linear import FusedLinear, FusedLinearOwner
from lingbot_kernels.models.quantize import quantize
from lingbot_kernels.models.unfused import rope_kv_write
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.parallel.shard_group import ShardGroup
from lingbot_kernels.plain import is_plain, untouched
from lingbot_kernels.quantization import PLAIN, Int8Recipe, Rows, Taken, recipe_of, rows_for
from lingbot_kernels.realtime import memory
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.chunk_inputs import ChunkInputs, TimeEmbeddings
from lingbot_kernels.realtime.kv_cache import CacheLayout, Int8KeyValue, KeyValue, RingLayer, RingMemory
from lingbot_kernels.realtime.saved_session import SessionOwner
from lingbot_kernels.realtime.weights import WeightsIdentity, fingerprint
from lingbot_kernels.ring import ChunkPosition

WHOLE = SequenceShard()


class RMSNorm(nn.Module):
    """Full-width RMSNorm with the official model's two roundings: weight [d]."""

    def __init__(self, dim: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class CausalLingBotSelfAttention(FusedLinearOwner):
    """Self-attention of a chunk over the K/V ring: project, normalise and rotate into the ring, attend, project."""

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__()
        self.qkv = FusedLinear(cfg.dim, cfg.dim, ("q", "k", "v"), **factory)
        self.o = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.norm_q = RMSNorm(cfg.dim, cfg.eps, **factory)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps, **factory)
        self.int8_qk = False

    def extra_repr(self) -> str:
        return "int8 Q and K" if self.int8_qk else ""

    def forward(
        self,
        x: Taken,
        cos_sin: Tensor,
        kv: RingLayer,
        position: ChunkPosition,
        update_cache_only: bool = False,
        shard: SequenceShard = WHOLE,
    ) -> Tensor | None:
        """x [B, S, d], or its int8 codes -> [B, S, d], with the chunk's K and V left in the ring `kv`.

        Over several ranks x is this rank's tokens, `kv` this rank's heads; between the exchanges q is all tokens.
        With `update_cache_only` K and V are projected and written, and nothing else: returns None.
        """
        if isinstance(kv, Int8KeyValue):
            return self._forward_int8(x, cos_sin, kv, position, update_cache_only)
        norm_q, norm_k = self.norm_q, self.norm_k
        if not (is_plain(norm_q, RMSNorm) and is_plain(norm_k, RMSNorm)):
            return self._by_module(x, cos_sin, kv, position, update_cache_only, shard)
        if update_cache_only:
            k, v = self.qkv("k", "v", x=x)
            shard.k_norm_rope_kv_write(k, v, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps)
            return None
        q, k, v = self.qkv("q", "k", "v", x=x)
        q = shard.qk_norm_rope_kv_write(
            q, k, v, norm_q.weight, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps
        )  # K and V now lie in the ring
        return self.o(shard.exchange_output(ops.windowed_attention(q, *kv, position.num_visible)))

    def _by_module(
        self, x: Taken, cos_sin: Tensor, kv: KeyValue, position: ChunkPosition, update_cache_only: bool,
        shard: SequenceShard,
    ) -> Tensor | None:  # fmt: skip
        """`forward` where a norm has hooks or is of another class: norms are called, and RoPE is a pass of its own."""
        if shard.ranks > 1:
            raise ValueError(
                "norm_q, norm_k: got hooks or another class than RMSNorm, must be plain where the sequence is sharded"
            )
        *first, k, v = self.qkv(*("k", "v") if update_cache_only else ("q", "k", "v"), x=x)
        q = rope_kv_write(
            self.norm_q(first[0]) if first else None, self.norm_k(k), v, cos_sin, *kv, position.ring
        )  # fmt: skip
        return None if q is None else self.o(ops.windowed_attention(q, *kv, position.num_visible))

    def _forward_int8(
        self, x: Taken, cos_sin: Tensor, kv: Int8KeyValue, position: ChunkPosition, update_cache_only: bool
    ) -> Tensor | None:
        """The same over a ring whose K is in int8: Q and K leave the norm and RoPE in int8 with their scales."""
        norm_q, norm_k = self.norm_q, self.norm_k
        if not (is_plain(norm_q, RMSNorm) and is_plain(norm_k, RMSNorm)):
            raise ValueError(
                f"self_attn.norm_q, norm_k: got {type(norm_q).__name__}, {type(norm_k).__name__} or hooks on them, "
                "must be RMSNorm without hooks where Q and K are in int8"
            )
        if update_cache_only:
            k, v = self.qkv("k", "v", x=x)
            ops.k_norm_rope_quantize_kv_write(k, v, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps)
            return None
        q, k, v = self.qkv("q", "k", "v", x=x)
        codes, scale = ops.qk_norm_rope_quantize_kv_write(
            q, k, v, norm_q.weight, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps
        )  # K and V now lie in the ring
        return self.o(ops.int8_attention(codes, scale, *kv, position.num_visible)[0])


class LingBotCrossAttention(nn.Module):
    """Attention to the text: K and V come from the session's cache, made once per prompt."""

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.q = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.k = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.v = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.o = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.norm_q = RMSNorm(cfg.dim, cfg.eps, **factory)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps, **factory)

    def project_text(self, context: Tensor) -> KeyValue:
        """context [B, text_len, d] -> K (normalised) and V, [B, text_len, heads, head_dim] each."""
        k, v = self.norm_k(self.k(context)), self.v(context)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Taken, text_kv: KeyValue) -> Tensor:
        """x [B, S, d], or its int8 codes -> [B, S, d]."""
        q = self.norm_q(self.q(x))
        return self.o(ops.windowed_attention(q, *text_kv, text_kv[0].shape[1]))


class FeedForward(nn.Sequential):
    """Linear, GELU(tanh) in its epilogue, Linear."""

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__(
            nn.Linear(cfg.dim, cfg.ffn_dim, **factory),
            nn.GELU(approximate="tanh"),
            nn.Linear(cfg.ffn_dim, cfg.dim, **factory),
        )

    def forward(self, x: Taken) -> Tensor:
        up, activation, down = self
        return down(linear_gelu(up, x, activation))


class LingBotTransformerBlock(nn.Module):
    """Self-attention, camera modulation, cross-attention, MLP; between two matrix products one fused pass.

    The layer norm that opens a block is fused with the residual addition that closes the one before. So blocks hand on
    the residual stream x together with y, its norm as the next block (or the head) modulates it.
    """

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim, **factory) / cfg.dim**0.5)
        self.self_attn = CausalLingBotSelfAttention(cfg, **factory)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps, **factory)
        self.cross_attn = LingBotCrossAttention(cfg, **factory)
        self.ffn = FeedForward(cfg, **factory)
        if cfg.camera:
            self.cam_injector_layer1 = nn.Linear(cfg.dim, cfg.dim, **factory)
            self.cam_injector_layer2 = nn.Linear(cfg.dim, cfg.dim, **factory)
            self.cam_scale_layer = nn.Linear(cfg.dim, cfg.dim, **factory)
            self.cam_shift_layer = nn.Linear(cfg.dim, cfg.dim, **factory)

    def camera_modulation(self, embedding: Tensor, out: KeyValue | None = None) -> KeyValue:
        """Camera embedding [B, S, d] -> this block's (scale, shift), [B, S, d] each, into `out` where given."""
        h = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(embedding))) + embedding
        scale, shift = out or (None, None)
        return linear_into(scale, h, self.cam_scale_layer), linear_into(shift, h, self.cam_shift_layer)

    def forward(
        self,
        x: Tensor,
        y: Taken,
        modulation: Tensor,
        following: Tensor,
        cos_sin: Tensor,
        kv: RingLayer,
        position: ChunkPosition,
        text_kv: KeyValue,
        camera: KeyValue | None = None,
        update_cache_only: bool = False,
        shard: SequenceShard = WHOLE,
        rows: Rows = PLAIN,
    ) -> tuple[Tensor, Taken] | None:
        """One block over a chunk, or over this rank's tokens of it: (x, y) -> (x, y) for what follows.

        Args:
            x: residual stream [B, S, d].
            y: layer_norm(x), scaled and shifted by this block's modulation, [B, S, d], or its int8 codes.
            modulation: float32 [6, d]: shift, scale, gate of self-attention, then of the MLP.
            following: float32 [>= 2, d]: shift and scale of the next block's self-attention, or of the head.
            cos_sin: float32 [S, head_dim].
            kv: this layer's ring, K and V [B, capacity, heads of this rank, head_dim], K's scales between them where it
                is in int8, written in the chunk's slots.
            text_kv: this layer's text K and V.
            camera: this layer's (scale, shift) [B, S, d], or None.
            update_cache_only: stop after the K/V write and return None.
            shard: which tokens x has; one rank's whole chunk by default.
            rows: how what follows takes its y.
        """
        _, _, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(0)
        with nvtx.range("self_attn"):
            attended = self.self_attn(y, cos_sin, kv, position, update_cache_only, shard)
        if attended is None:
            return None
        with nvtx.range("camera"):
            x, y = self._camera_norm(x, attended, gate_sa, camera)
        with nvtx.range("cross_attn"):
            crossed = self.cross_attn(y, text_kv)
            x, y = rows_for(self.ffn[0], self.ffn).residual_norm_modulate(x, crossed, shift_ffn, scale_ffn, self.eps)
        with nvtx.range("ffn"):
            return rows.residual_norm_modulate(x, self.ffn(y), following[0], following[1], self.eps, gate_ffn)

    def _camera_norm(
        self, x: Tensor, attended: Tensor, gate: Tensor, camera: KeyValue | None
    ) -> tuple[Tensor, Taken]:  # fmt: skip
        """(x, y): what self-attention gave added and modulated by the camera, and norm3 of it."""
        norm3, (scale, shift) = self.norm3, camera or (None, None)
        if is_plain(norm3, nn.LayerNorm):
            return rows_for(self.cross_attn.q, self.cross_attn).gated_residual_camera_norm(
                x, attended, gate, scale, shift, norm3.weight, norm3.bias, self.eps
            )
        unit = attended.new_ones(attended.shape[-1])  # the norm of this pass is not used
        x, _ = ops.gated_residual_camera_norm(x, attended, gate, scale, shift, unit, unit, self.eps)
        return x, norm3(x.to(attended.dtype))


class Head(nn.Module):
    """The projection of the modulated norm to a token's output channels, (pt, ph, pw, c) order."""

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim, **factory) / cfg.dim**0.5)
        self.head = nn.Linear(cfg.dim, cfg.out_channels * cfg.patch_volume, **factory)

    def forward(self, y: Tensor) -> Tensor:
        """y [B, S, d], layer_norm(x) as the head modulates it -> [B, S, pt * ph * pw * out_channels]."""
        return self.head(y)


class CausalLingBotTransformer(nn.Module):
    """The causal video DiT. `state_dict()` has the official checkpoint's keys; sessions live in
    `RealtimeCausalDiTState`.

    Inference only: the ops have no gradients.
    """

    def __init__(
        self,
        cfg: LingBotConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Random weights in `dtype`, also given by name (torch's default where None), on `device`; NotEnoughMemory
        where they can't fit.
        """
        dtype = as_dtype("dtype", dtype)
        memory.check_weights(cfg, dtype, device)
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = cfg
        self.recipe: Int8Recipe | None = None
        self.cuda_graphs = True
        self.shard_group = ShardGroup()
        self._weights = WeightsIdentity()
        self._disown_sessions()
        d = cfg.dim
        self.patch_embedding = PatchEmbedding(cfg.in_channels, d, cfg.patch_size, **factory)
        self.text_embedding = TextEmbedding(cfg.text_dim, d, cfg.text_len, **factory)
        self.time_embedding = WideSequential(
            nn.Linear(cfg.freq_dim, d, **factory), nn.SiLU(), nn.Linear(d, d, **factory)
        )
        self.time_projection = WideSequential(nn.SiLU(), nn.Linear(d, 6 * d, **factory))
        if cfg.camera:
            self.patch_embedding_wancamctrl = nn.Linear(cfg.camera_channels * cfg.patch_volume, d, **factory)
            self.c2ws_hidden_states_layer1 = nn.Linear(d, d, **factory)
            self.c2ws_hidden_states_layer2 = nn.Linear(d, d, **factory)
        self.blocks: Sequence[LingBotTransformerBlock] = nn.ModuleList(  # type: ignore[assignment]
            LingBotTransformerBlock(cfg, **factory) for _ in range(cfg.num_layers)
        )
        self.head = Head(cfg, **factory)
        self.register_load_state_dict_post_hook(CausalLingBotTransformer._disown_sessions)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: Dtype | None = None,
        device: torch.device | str = "cpu",
        cfg: LingBotConfig | None = None,
        precision: str | Int8Recipe | None = None,
    ) -> CausalLingBotTransformer:
        """The model of a checkpoint folder (safetensors shards in any of the three namings), in `dtype` on `device`.

        The configuration is `cfg`, or the folder's config.json, or read off the shapes. Weights go from the mapped file
        straight into the parameters: memory stays near one copy, of the int8 weights where they are quantised.

        Args:
            dtype: also by name, such as "bfloat16", "bf16" or "torch.bfloat16"; bfloat16 where None.
            precision: "bfloat16": the products in `dtype`; "int8", "int8_qk" or an Int8Recipe: quantised while loading.
                None: as `save_pretrained` wrote the folder, which is "bfloat16" for every other checkpoint.

        Raises:
            CheckpointError: naming every missing, unexpected, wrongly shaped or unreadable entry, in one message.
            NotEnoughMemory: the weights can't fit on `device`; nothing has been allocated there.
            ValueError: no such dtype or precision, or another precision than the folder's weights are quantised in.
        """
        dtype = as_dtype("dtype", dtype)
        stored = checkpoint.stored_recipe(folder)
        recipe = stored if precision is None else recipe_of(precision)
        cfg, dtype = cfg or checkpoint.infer_config(folder), dtype or torch.bfloat16
        memory.check_weights(cfg, dtype, device, recipe)
        with torch.device("meta"):
            model = cls(cfg, dtype=dtype)
        checkpoint.load_checkpoint(model, folder, device=device, recipe=recipe)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights under their official names as safetensors shards with an index, and config.json.

        Quantised weights are written as they are: int8 with float32 scales, and the recipe in config.json.
        """
        checkpoint.save_checkpoint(self, folder)

    def quantize(self, recipe: Int8Recipe | None = None) -> None:
        """Run the recipe's products (the default one's where None) in int8 from now on: each weight is replaced by its
        codes, in place and one after the other. Sessions begun before must start again.

        Raises:
            ValueError: the recipe names what this network has not, or attention in int8 where that can't be (the model
                is not bfloat16, its heads are not of 64 or 128, or ranks share its chunks), a weight can't be
                quantised, or they already are; the model is then as it was.
        """
        quantize(self, recipe or Int8Recipe())
        self._disown_sessions()

    def shard_sequence(self, group: dist.ProcessGroup | None = None, layout: str = "ulysses") -> None:
        """Share every later chunk among the ranks of `group`, the default process group where None.

        Called on every rank, with the same weights; from then on each rank calls forward with the same arguments and
        gets the same result. Sessions begun before must start again. GPUs of one host that reach each other's memory
        write to it; otherwise the exchanges are all-to-all collectives, and `shard_group.exchange` says why.

        Raises:
            ValueError, RuntimeError: on every rank alike, as `ShardGroup.join` says. A model whose self-attention has Q
                and K in int8 is refused by more than one rank.
        """
        self.shard_group = ShardGroup.join(group, layout, self)
        self._disown_sessions()

    def weights_changed(self) -> None:
        """Say that weights were written where it can't be seen: sessions then drop what the old ones made, their text
        K/V, time embeddings, camera modulation and CUDA graphs, and go on with their window's keys and values.

        Needed after writes through `parameter.data` (`parameter.data += delta`) and to weights made in inference mode.
        Everything else is noticed: parameters or modules replaced, writes in place, adapters merged or switched. After
        `load_state_dict` of the whole model a session that has begun is refused.
        """
        self._weights.renew()

    def _disown_sessions(self, _: object = None) -> None:
        """Refuse sessions that have begun: all of the weights, or the ranks, are others."""
        self._owner = SessionOwner(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.modulation.dtype

    @property
    def device(self) -> torch.device:
        return self.head.modulation.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has sessions of its own."""
        super().__setstate__(state)
        self._disown_sessions()

    @property
    def session_owner(self) -> object:
        """What sessions of this model belong to; another one once it was loaded or shared anew."""
        return self._owner

    def session_facts(self) -> dict[str, Any]:
        """What must be the same in a model that is to go on with a saved session, the weights apart."""
        recipe = None if self.recipe is None else repr(self.recipe)
        return {**self.config.to_dict(), "dtype": str(self.dtype), "recipe": recipe, "ranks": self.shard_group.ranks}

    def weights_fingerprint(self) -> str:
        """What stands for the values of the parameters; reads all of them."""
        return fingerprint(self)

    def session_memory(self, state: RealtimeCausalDiTState, layout: CacheLayout) -> RingMemory | None:
        """What the rings of a session that begins lie in; NotEnoughMemory where it can't fit."""
        return session_forward.ring_memory(self, state, layout, self.config.frames_per_chunk, self.config.camera)

    @property
    def precision(self) -> str:
        """What the blocks' products run in: the dtype's name, or "int8" or "int8_qk" where they are quantised."""
        return str(self.dtype).removeprefix("torch.") if self.recipe is None else self.recipe.precision

    @property
    def int8_qk(self) -> bool:
        """Whether self-attention has Q and K in int8."""
        return self.recipe is not None and self.recipe.attention == "int8_qk"

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: the configured one, or the model's own where that is wider."""
        return torch.promote_types(self.dtype, getattr(torch, self.config.residual_dtype))

    @torch.inference_mode(False)  # what a session keeps may be written again outside the caller's inference mode
    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: float,
        *,
        state: RealtimeCausalDiTState,
        start_frame: int,
        camera: Tensor | None = None,
        step_index: int = 0,
        update_cache_only: bool = False,
    ) -> Tensor | None:
        """One forward of a chunk: a denoise step, or the context update. It waits, on the device, for a context update
        of the session that still runs on another stream.

        Args:
            latents: [B, in_channels, F, H, W]: noisy latents, then mask and image condition.
            text: [B, L <= text_len, text_dim] text embeddings; zero-padded to text_len inside.
            timestep: one value for the chunk, a Python float; a tensor is refused, since reading it would wait.
            state: the session; its ring takes the chunk's K and V.
            start_frame: absolute index of the chunk's first latent frame; the next one, or the current chunk's.
            camera: [B, 384, F, H, W] Pluecker embedding, 8 x 8 pixels folded into channels; None: no camera.
            step_index: index in the denoising loop; -1 in the context update.
            update_cache_only: write K/V, skip all that only the output needs, and return None.

        Returns:
            Flow prediction, float32 [B, out_channels, F, H, W] (float64 from a float64 model), or None.

        Raises:
            ValueError, TypeError: naming the argument; the session is then as it was.
            NotEnoughMemory: a session begins and can't fit; nothing has been allocated for it.
        """
        return session_forward.forward(
            self, latents, text, timestep, state=state, start_frame=start_frame, camera=camera, step_index=step_index,
            update_cache_only=update_cache_only,
        )  # fmt: skip

    def _run(
        self,
        inputs: ChunkInputs,
        layers: Sequence[RingLayer],
        position: ChunkPosition,
        update_cache_only: bool,
        shard: SequenceShard = WHOLE,
    ) -> Tensor | None:
        """Everything between the caches and the output: a function of tensors, which a CUDA graph can capture.

        latents [B, C, F, H, W] -> x, y [B, S, d] of this rank's tokens, through the blocks -> [B, out, F, H, W].
        """
        time = inputs.time
        x = self.patch_embedding(inputs.latents, shard.tokens).to(self.residual_dtype)
        shift, scale = time.blocks[0, :2]
        taken = [
            *(rows_for(block.self_attn.qkv, block.self_attn) for block in self.blocks),
            PLAIN,
        ]  # the last is the head's
        y = taken[0].layer_norm_modulate(x, shift, scale, self.config.eps, self.dtype)
        last = len(self.blocks) - 1
        ends_early = update_cache_only and untouched(self.blocks[last]) and untouched(self.blocks[last].self_attn)
        for i, block in enumerate(self.blocks):
            with nvtx.range(f"block {i}"):
                after = block(
                    x,
                    y,
                    time.blocks[i],
                    time.head if i == last else time.blocks[i + 1],
                    inputs.cos_sin,
                    layers[i],
                    position,
                    inputs.text_kv[i],
                    None if inputs.camera is None else inputs.camera[i],
                    update_cache_only=ends_early and i == last,
                    shard=shard,
                    rows=taken[i + 1],
                )
            if after is None:
                return None
            x, y = after
        if update_cache_only:  # a hook has seen the last block in full
            return None
        assert isinstance(y, Tensor)
        _, _, frames, height, width = inputs.latents.shape
        with nvtx.range("head"):
            out = shard.gather(self.head(y))
            out = unpatchify(out, self.config.patch_size, frames, height, width)
        return out.to(torch.promote_types(self.dtype, torch.float32))

    def cache_layout(self, batch: int, grid: tuple[int, int]) -> CacheLayout:
        """The K/V ring of a session of `batch` videos with `grid` (rows, columns) tokens a frame, on this rank."""
        cfg = self.config
        return CacheLayout(
            cfg.num_layers, batch, cfg.num_heads // self.shard_group.ranks, cfg.head_dim, grid, cfg.window_frames,
            cfg.sink_frames, self.dtype, self.device, torch.int8 if self.int8_qk else None,
        )  # fmt: skip

    def _prepare_cached_rope_for_sequence_shard(
        self, state: RealtimeCausalDiTState, num_tokens: int, token_start: int
    ) -> Tensor:
        return session_forward.rope(self, state, num_tokens, token_start)

    def _prepare_cached_time_embeddings(
        self, state: RealtimeCausalDiTState, timestep: float, step_index: int
    ) -> TimeEmbeddings:
        return session_forward.time_embeddings(self, state, timestep, step_index)

    def _embed_time(self, timestep: float) -> TimeEmbeddings:
        dtype = torch.promote_types(self.dtype, torch.float32)
        e = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim, self.device).to(dtype))
        e0 = self.time_projection(e).unflatten(0, (6, -1))
        blocks = torch.cat([block.modulation for block in self.blocks]).to(dtype) + e0
        return TimeEmbeddings(blocks, self.head.modulation[0].to(dtype) + e)

    def _embed_camera(self, camera: Tensor, shard: SequenceShard = WHOLE) -> Tensor:
        tokens = patchify(camera.to(self.dtype), self.config.patch_size)[:, shard.tokens]
        embedding = self.patch_embedding_wancamctrl(tokens)
        return embedding + self.c2ws_hidden_states_layer2(F.silu(self.c2ws_hidden_states_layer1(embedding)))
