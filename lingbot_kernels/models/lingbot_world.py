"""LingBot-World's causal video DiT: transformer, block and self-attention, in the order data flows.

A chunk of frames attends to the sink, the recent window and itself through a K/V ring that belongs to the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels import nvtx, ops
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models import unfused
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
from lingbot_kernels.models.realtime_model import RealtimeModel
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.plain import is_plain, untouched
from lingbot_kernels.quantization import PLAIN, Rows, Taken, rows_for
from lingbot_kernels.realtime.chunk_inputs import ChunkInputs, TimeEmbeddings
from lingbot_kernels.realtime.kv_cache import Int8KeyValue, KeyValue, RingLayer
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
            return self._forward_int8(x, cos_sin, kv, position, update_cache_only, shard)
        norm_q, norm_k = self.norm_q, self.norm_k
        if not (is_plain(norm_q, RMSNorm) and is_plain(norm_k, RMSNorm)):
            return unfused.self_attention(self, x, cos_sin, kv, position, update_cache_only, shard)
        if update_cache_only:
            k, v = self.qkv("k", "v", x=x)
            shard.k_norm_rope_kv_write(k, v, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps)
            return None
        q, k, v = self.qkv("q", "k", "v", x=x)
        q = shard.qk_norm_rope_kv_write(
            q, k, v, norm_q.weight, norm_k.weight, cos_sin, *kv, position.ring, norm_k.eps
        )  # K and V now lie in the ring
        return self.o(shard.exchange_output(self.attend(q, *kv, position.num_visible)))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, num_visible: int) -> Tensor:
        """Attention of q over the ring, whose K is not in int8: `ops.windowed_attention`."""
        return ops.windowed_attention(q, k_cache, v_cache, num_visible)

    def _forward_int8(
        self, x: Taken, cos_sin: Tensor, kv: Int8KeyValue, position: ChunkPosition, update_cache_only: bool,
        shard: SequenceShard,
    ) -> Tensor | None:  # fmt: skip
        """The same over a ring whose K is in int8: Q and K leave the norm and RoPE in int8 with their scales."""
        norm_q, norm_k = self.norm_q, self.norm_k
        if not (is_plain(norm_q, RMSNorm) and is_plain(norm_k, RMSNorm)):
            raise ValueError(
                f"self_attn.norm_q, norm_k: got {type(norm_q).__name__}, {type(norm_k).__name__} or hooks on them, "
                "must be RMSNorm without hooks where Q and K are in int8"
            )
        if update_cache_only:
            k, v = self.qkv("k", "v", x=x)
            shard.k_norm_rope_quantize_kv_write(k, v, norm_k.weight, cos_sin, kv, position, norm_k.eps)
            return None
        q, k, v = self.qkv("q", "k", "v", x=x)
        codes, scale = shard.qk_norm_rope_quantize_kv_write(
            q, k, v, norm_q.weight, norm_k.weight, cos_sin, kv, position, norm_k.eps
        )  # K and V now lie in the ring
        return self.o(shard.exchange_output(ops.int8_attention(codes, scale, *kv, position.num_visible)[0]))


class LingBotCrossAttention(nn.Module):
    """Attention to the text: K and V come from the session's cache, made once per prompt."""

    def __init__(self, cfg: LingBotConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads, self.text_len = cfg.num_heads, cfg.text_len
        self.q = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.k = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.v = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.o = nn.Linear(cfg.dim, cfg.dim, **factory)
        self.norm_q = RMSNorm(cfg.dim, cfg.eps, **factory)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps, **factory)

    def project_text(self, context: Tensor) -> KeyValue:
        """context [B, keys, d] -> K (normalised) and V, [B, keys, heads, head_dim] each."""
        k, v = self.norm_k(self.k(context)), self.v(context)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Taken, text_kv: KeyValue) -> Tensor:
        """x [B, S, d], or its int8 codes -> [B, S, d].

        Where there are fewer keys than text_len, the last one is the padding's and stands for all of its rows.
        """
        q, keys = self.norm_q(self.q(x)), text_kv[0].shape[1]
        return self.o(ops.windowed_attention(q, *text_kv, keys, last_key_count=1 + self.text_len - keys))


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


class CausalLingBotTransformer(RealtimeModel):
    """The causal video DiT. `state_dict()` has the official checkpoint's keys; sessions live in
    `RealtimeCausalDiTState`.

    Inference only: the ops have no gradients.
    """

    def __init__(
        self, cfg: LingBotConfig, *, device: torch.device | str | None = None, dtype: Dtype | None = None
    ) -> None:
        """Random weights in `dtype`, also given by name (torch's default where None), on `device`; NotEnoughMemory
        where they can't fit.
        """
        super().__init__(cfg, device=device, dtype=dtype)
        factory: dict[str, Any] = {"device": device, "dtype": as_dtype("dtype", dtype)}
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
        taken = [*(rows_for(block.self_attn.qkv, block.self_attn) for block in self.blocks), PLAIN]  # the head's last
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
