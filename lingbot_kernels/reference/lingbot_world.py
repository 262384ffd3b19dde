"""The whole network in plain torch, any dtype up to float64: no ring, no caches, weights by their official names.
What tests, benches and the demo compare `CausalLingBotTransformer` with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.reference.gated_residual import gated_residual
from lingbot_kernels.reference.gated_residual_camera_norm import gated_residual_camera_norm
from lingbot_kernels.reference.layer_norm_modulate import layer_norm_modulate
from lingbot_kernels.reference.residual_norm_modulate import residual_norm_modulate
from lingbot_kernels.reference.rms_norm import rms_norm
from lingbot_kernels.reference.rope_cos_sin import apply_rope, rope_cos_sin

KeyValue = tuple[Tensor, Tensor]


class ScheduleLike(Protocol):
    """What a denoising loop reads of a schedule, as `stages.schedule.Schedule` has it."""

    @property
    def times(self) -> tuple[float, ...]: ...
    @property
    def sigmas(self) -> tuple[float, ...]: ...
    @property
    def noise_sigmas(self) -> tuple[float, ...]: ...


class PlainLingBotWorld:
    """The network as a function of its weights.

    What a chunk attends to is `context`: for each layer, K and V [B, T, heads, head_dim] of the tokens that are left of
    the past, oldest first, the sink at the front; None for the first chunk. A forward returns the context that the next
    chunk would see, and changes nothing.

    Args:
        cfg: the shape.
        weights: a state dict with official names.
        dtype: what everything is computed in; the weights' own where None.
    """

    def __init__(self, cfg: LingBotConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        self.cfg = cfg
        self.dtype = dtype or weights["head.head.weight"].dtype
        self.weights = {name: weight.to(self.dtype) for name, weight in weights.items()}
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.residual_dtype = torch.promote_types(self.dtype, getattr(torch, cfg.residual_dtype))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The layer `name` in x's dtype."""
        return F.linear(x, self.weights[f"{name}.weight"].to(x.dtype), self.weights[f"{name}.bias"].to(x.dtype))

    def mlp(self, first: str, second: str, x: Tensor) -> Tensor:
        """Linear, SiLU, Linear."""
        return self.linear(second, F.silu(self.linear(first, x)))

    def gelu_mlp(self, first: str, second: str, x: Tensor) -> Tensor:
        """Linear, GELU(tanh), Linear."""
        return self.linear(second, F.gelu(self.linear(first, x), approximate="tanh"))

    def tokens(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, S, C * ph * pw], both in (.., row, column) order."""
        _, ph, pw = self.cfg.patch_size
        cells = x.to(self.dtype).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, F, rows, columns, ph, pw]
        return cells.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.cfg.num_heads, self.cfg.head_dim))

    def time(self, timestep: float | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(e [d], e0 [6, d]) of cat[cos, sin](t * 10000^(-i / half)), made in float64; of times [B, 1], one for each
        element of a batch, (e [B, d], e0 [B, 6, d]).
        """
        half = self.cfg.freq_dim // 2
        angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.wide)
        e = self.mlp("time_embedding.0", "time_embedding.2", embedding)
        return e, self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))

    def modulation(self, name: str, e: Tensor) -> tuple[Tensor, ...]:
        """The rows of the modulation `name` [1, n, d] with e [n or 1, d], or [B, n or 1, d]: n of [d], or of [B, d]."""
        return (self.weights[f"{name}.modulation"][0].to(self.wide) + e).unbind(-2)

    def text(self, text: Tensor) -> Tensor:
        """[B, L, text_dim] -> [B, text_len, d], zero-padded first."""
        padded = F.pad(text.to(self.dtype), (0, 0, 0, self.cfg.text_len - text.shape[1]))
        return self.gelu_mlp("text_embedding.0", "text_embedding.2", padded)

    def camera(self, camera: Tensor) -> Tensor:
        """Pluecker embedding [B, 384, F, H, W] -> [B, S, d]."""
        embedding = self.linear("patch_embedding_wancamctrl", self.tokens(camera))
        return embedding + self.mlp("c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2", embedding)

    def window(self, past: Tensor | None, new: Tensor, frame_tokens: int) -> Tensor:
        """The past and the new tokens; what is too much for the window leaves right after the sink."""
        tokens = new if past is None else torch.cat([past, new], dim=1)
        excess = max(0, tokens.shape[1] - self.cfg.window_frames * frame_tokens)
        sink = self.cfg.sink_frames * frame_tokens
        return tokens if excess == 0 else torch.cat([tokens[:, :sink], tokens[:, sink + excess :]], dim=1)

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, tokens, heads, head_dim] -> [B, S, d], through the output projection."""
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.linear(f"{name}.o", out.transpose(1, 2).flatten(2))

    def normed(self, name: str, part: str, x: Tensor) -> Tensor:
        """Projection `part` (q or k) of an attention, full-width RMSNorm, then heads."""
        return self.heads(
            rms_norm(self.linear(f"{name}.{part}", x), self.weights[f"{name}.norm_{part}.weight"], self.cfg.eps)
        )

    def self_attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, past: KeyValue | tuple[None, None], frame_tokens: int
    ) -> tuple[Tensor, KeyValue]:
        """(what a chunk gets from its window [B, S, d], the K and V of the window) of the chunk's own q, k, v."""
        keys, values = (self.window(old, new, frame_tokens) for old, new in zip(past, (k, v), strict=True))
        return self.attend(name, q, keys, values), (keys, values)

    def camera_modulation(self, name: str, camera: Tensor) -> KeyValue:
        """Camera embedding [B, S, d] -> the block's (scale, shift), [B, S, d] each."""
        h = self.mlp(f"{name}.cam_injector_layer1", f"{name}.cam_injector_layer2", camera) + camera
        return self.linear(f"{name}.cam_scale_layer", h), self.linear(f"{name}.cam_shift_layer", h)

    def block(
        self,
        i: int,
        x: Tensor,
        e0: Tensor,
        cos_sin: Tensor,
        past: KeyValue | tuple[None, None],
        frame_tokens: int,
        text: Tensor,
        camera: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """(x, the layer's K and V in the window) after block i."""
        b, w, eps = f"blocks.{i}", self.weights, self.cfg.eps
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = self.modulation(b, e0)
        y = layer_norm_modulate(x, shift_sa, scale_sa, eps, out_dtype=self.dtype)
        q, k = (apply_rope(self.normed(f"{b}.self_attn", part, y), cos_sin) for part in ("q", "k"))
        v = self.heads(self.linear(f"{b}.self_attn.v", y))
        attended, window = self.self_attend(f"{b}.self_attn", q, k, v, past, frame_tokens)
        cam_scale, cam_shift = (None, None) if camera is None else self.camera_modulation(b, camera)
        norm3 = (w[f"{b}.norm3.weight"], w[f"{b}.norm3.bias"])
        x, y = gated_residual_camera_norm(x, attended, gate_sa, cam_scale, cam_shift, *norm3, eps)
        q, text_k = self.normed(f"{b}.cross_attn", "q", y), self.normed(f"{b}.cross_attn", "k", text)
        text_v = self.heads(self.linear(f"{b}.cross_attn.v", text))
        x, y = residual_norm_modulate(x, self.attend(f"{b}.cross_attn", q, text_k, text_v), shift_ffn, scale_ffn, eps)
        return gated_residual(x, self.gelu_mlp(f"{b}.ffn.0", f"{b}.ffn.2", y), gate_ffn), window

    def embed(self, latents: Tensor) -> Tensor:
        """[B, in_channels, F, H, W] -> the residual stream [B, S, d]."""
        weight, bias = self.weights["patch_embedding.weight"].flatten(1), self.weights["patch_embedding.bias"]
        return F.linear(self.tokens(latents), weight, bias).to(self.residual_dtype)

    def head(self, x: Tensor, e: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Residual stream [B, S, d] -> flow [B, out_channels, F, H, W] for `grid` (frames, rows, columns) of tokens."""
        shift, scale = self.modulation("head", e.unsqueeze(-2))
        out = self.linear("head.head", layer_norm_modulate(x, shift, scale, self.cfg.eps, out_dtype=self.dtype))
        _, ph, pw = self.cfg.patch_size
        out = out.unflatten(1, grid).unflatten(-1, (ph, pw, self.cfg.out_channels)).permute(0, 6, 1, 2, 4, 3, 5)
        return out.flatten(5).flatten(3, 4).to(self.wide)

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: float,
        start_frame: int,
        camera: Tensor | None = None,
        context: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """(flow [B, out_channels, F, H, W], context with this chunk in it) of latents [B, in_channels, F, H, W]."""
        cfg = self.cfg
        _, _, frames, height, width = latents.shape
        _, ph, pw = cfg.patch_size
        rows, columns = height // ph, width // pw
        frame_tokens = rows * columns
        table = (frames * frame_tokens, start_frame * frame_tokens, frame_tokens, columns, cfg.head_dim, cfg.rope_theta)
        cos_sin = rope_cos_sin(*table, latents.device, dtype=self.wide)
        e, e0 = self.time(timestep, latents.device)
        text, cameras = self.text(text), None if camera is None else self.camera(camera)
        x = self.embed(latents)
        updated: list[KeyValue] = []
        for i in range(cfg.num_layers):
            past = (None, None) if context is None else context[i]
            x, layer = self.block(i, x, e0, cos_sin, past, frame_tokens, text, cameras)
            updated.append(layer)
        return self.head(x, e, (frames, rows, columns)), updated

    @torch.no_grad()
    def denoise_chunk(
        self,
        schedule: ScheduleLike,
        noise: Tensor,
        renoise: Tensor,
        text: Tensor,
        start_frame: int,
        camera: Tensor | None = None,
        context: list[KeyValue] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """(clean latents, context after the context update); noise, renoise and condition as
        `CausalDenoisingStage.denoise_chunk` takes them.
        """
        if condition is None:
            condition = noise.new_zeros(noise.shape[0], self.cfg.in_channels - noise.shape[1], *noise.shape[2:])
        x = noise
        for step, (time, sigma) in enumerate(zip(schedule.times, schedule.sigmas, strict=True)):
            if step:
                s = schedule.noise_sigmas[step - 1]
                x = ((1 - s) * x.double() + s * renoise[step - 1].double()).to(noise.dtype)
            flow, _ = self.forward(torch.cat([x, condition], 1), text, time, start_frame, camera, context)
            x = (x.double() - sigma * flow.double()).to(noise.dtype)
        return x, self.forward(torch.cat([x, condition], 1), text, 0.0, start_frame, camera, context)[1]
