"""The network and the sampler once more, written for clarity alone: every forward recomputes everything, the context
update is a full forward at t = 0, and the K/V cache is a plain list of tokens. In float64 it is the oracle; in bfloat16
it is the plain eager formulation that bounds what a bfloat16 implementation may err.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import LingBotConfig


@dataclass
class CachedToken:
    """K (rotated) and V of one token, [B, heads, head_dim] each, and its absolute index."""

    index: int
    k: Tensor
    v: Tensor


@dataclass
class Session:
    """One list of tokens per layer."""

    layers: dict[int, list[CachedToken]] = field(default_factory=dict)
    chunk_start: int = -1


class Oracle:
    """The network from its weights by official name.

    Args:
        dtype: float64 computes everything in float64. bfloat16 rounds where the official eager code does: float32 for
            norms, modulation and time, complex128 for RoPE, bfloat16 for matrix products and attention.
        residual: dtype of the residual stream.
    """

    def __init__(
        self,
        cfg: LingBotConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
        residual: torch.dtype | None = None,
    ) -> None:
        self.cfg, self.dtype, self.residual = cfg, dtype, residual or dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = {name: weight.detach().to(dtype) for name, weight in weights.items()}

    def linear(self, name: str, x: Tensor, wide: bool = False) -> Tensor:
        dtype = self.wide if wide else self.dtype
        weight, bias = (self.weights[f"{name}.{part}"].to(dtype) for part in ("weight", "bias"))
        return torch.einsum("...i,oi->...o", x, weight) + bias if dtype == torch.float64 else F.linear(x, weight, bias)

    def patches(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The strided convolution over whole patches, tokens in (frame, row, column) order."""
        convolved = F.conv3d(x.to(self.dtype), weight, bias, stride=self.cfg.patch_size)
        return convolved.flatten(2).transpose(1, 2)

    def gelu(self, x: Tensor) -> Tensor:
        if self.dtype != torch.float64:
            return F.gelu(x, approximate="tanh")
        return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.dtype != torch.float64 else x / (1 + torch.exp(-x))

    def layer_norm(self, x: Tensor) -> Tensor:
        """Without parameters, in the wide dtype, not rounded."""
        x = x.to(self.wide)
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.cfg.eps)

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.to(self.wide)
        normed = wide / torch.sqrt(torch.mean(wide**2, dim=-1, keepdim=True) + self.cfg.eps)
        return normed.to(self.dtype) * self.weights[name]

    def rope(self, x: Tensor, positions: Sequence[tuple[int, int, int]]) -> Tensor:
        """x [B, S, H, head_dim] times exp(i * position * frequency), a complex product in float64."""
        spatial = 2 * (self.cfg.head_dim // 6)
        factors = []
        for axis, width in enumerate((self.cfg.head_dim - 2 * spatial, spatial, spatial)):
            place = torch.tensor([float(position[axis]) for position in positions], dtype=torch.float64)
            frequency = self.cfg.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = torch.outer(place, frequency)
            factors.append(torch.polar(torch.ones_like(angle), angle))
        turn = torch.cat(factors, dim=1)[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(self.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, hd], k and v [B, T, H, hd] -> [B, S, D]."""
        if self.dtype != torch.float64:
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            return out.transpose(1, 2).flatten(2)
        scores = torch.einsum("bshd,bthd->bhst", q, k) / self.cfg.head_dim**0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return torch.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdim=True), v).flatten(2)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.cfg.num_heads, -1))

    def time(self, t: float) -> tuple[Tensor, Tensor]:
        """e [d] and e0 [6, d]."""
        half = self.cfg.freq_dim // 2
        angles = torch.tensor([t * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
        embedding = torch.cat([torch.cos(angles), torch.sin(angles)]).to(self.wide)
        hidden = self.silu(self.linear("time_embedding.0", embedding, wide=True))
        e = self.linear("time_embedding.2", hidden, wide=True)
        return e, self.linear("time_projection.1", self.silu(e), wide=True).reshape(6, -1)

    def text(self, text: Tensor) -> Tensor:
        padded = text.new_zeros(text.shape[0], self.cfg.text_len, self.cfg.text_dim)
        padded[:, : text.shape[1]] = text
        return self.linear("text_embedding.2", self.gelu(self.linear("text_embedding.0", padded.to(self.dtype))))

    def camera(self, camera: Tensor) -> Tensor:
        weight = self.weights["patch_embedding_wancamctrl.weight"].unflatten(1, (-1, *self.cfg.patch_size))
        embedding = self.patches(camera, weight, self.weights["patch_embedding_wancamctrl.bias"])
        hidden = self.silu(self.linear("c2ws_hidden_states_layer1", embedding))
        return embedding + self.linear("c2ws_hidden_states_layer2", hidden)

    def remember(self, session: Session, layer: int, start: int, k: Tensor, v: Tensor, frame_tokens: int) -> None:
        """The chunk's tokens replace those of its earlier forwards; what exceeds the window leaves after the sink."""
        kept = [token for token in session.layers.get(layer, []) if token.index < start]
        kept += [CachedToken(start + i, k[:, i], v[:, i]) for i in range(k.shape[1])]
        window, sink = self.cfg.window_frames * frame_tokens, self.cfg.sink_frames * frame_tokens
        recent = max(0, window - sink)
        session.layers[layer] = kept[:sink] + kept[sink:][-recent:]

    def forward(
        self, session: Session, latents: Tensor, text: Tensor, t: float, start_frame: int, camera: Tensor | None
    ) -> Tensor:
        """One full forward of a chunk; the session's lists take its K and V."""
        cfg = self.cfg
        _, _, frames, height, width = latents.shape
        rows, columns = height // cfg.patch_size[1], width // cfg.patch_size[2]
        positions = [(start_frame + f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
        start = start_frame * rows * columns
        e, e0 = self.time(t)
        context = self.text(text)
        rays = None if camera is None else self.camera(camera)
        x = self.patches(latents, self.weights["patch_embedding.weight"], self.weights["patch_embedding.bias"])
        x = x.to(self.residual)
        for layer in range(cfg.num_layers):
            x = self.block(session, layer, x, e0, positions, start, rows * columns, context, rays)
        b0, b1 = (self.weights["head.modulation"].to(self.wide)[0] + e).unbind(0)
        y = self.linear("head.head", (self.layer_norm(x) * (1 + b1) + b0).to(self.dtype))
        y = y.to(self.wide).unflatten(1, (frames, rows, columns)).unflatten(-1, (*cfg.patch_size[1:], -1))
        out = y.new_empty(y.shape[0], cfg.out_channels, frames, height, width)
        for i in range(cfg.patch_size[1]):
            for j in range(cfg.patch_size[2]):
                out[..., i :: cfg.patch_size[1], j :: cfg.patch_size[2]] = y[..., i, j, :].movedim(-1, 1)
        return out

    def block(
        self, session: Session, layer: int, x: Tensor, e0: Tensor, positions: Sequence[tuple[int, int, int]],
        start: int, frame_tokens: int, context: Tensor, rays: Tensor | None,
    ) -> Tensor:  # fmt: skip
        name, wide, dtype = f"blocks.{layer}.", self.wide, self.dtype
        m = self.weights[name + "modulation"].to(wide)[0] + e0

        y = (self.layer_norm(x) * (1 + m[1]) + m[0]).to(dtype)
        q, k = (
            self.rope(
                self.heads(self.rms_norm(self.linear(f"{name}self_attn.{n}", y), f"{name}self_attn.norm_{n}.weight")),
                positions,
            )
            for n in ("q", "k")
        )
        v = self.heads(self.linear(name + "self_attn.v", y))
        self.remember(session, layer, start, k, v, frame_tokens)
        tokens = session.layers[layer]
        attended = self.attend(q, torch.stack([t.k for t in tokens], 1), torch.stack([t.v for t in tokens], 1))
        x = (x.to(wide) + self.linear(name + "self_attn.o", attended).to(wide) * m[2]).to(self.residual)

        if rays is not None:
            hidden = self.silu(self.linear(name + "cam_injector_layer1", rays))
            h = self.linear(name + "cam_injector_layer2", hidden) + rays
            x = (1 + self.linear(name + "cam_scale_layer", h)) * x + self.linear(name + "cam_shift_layer", h)

        weight, bias = (self.weights[f"{name}norm3.{part}"].to(wide) for part in ("weight", "bias"))
        y = (self.layer_norm(x) * weight + bias).to(dtype)
        q = self.rms_norm(self.linear(name + "cross_attn.q", y), name + "cross_attn.norm_q.weight")
        k = self.rms_norm(self.linear(name + "cross_attn.k", context), name + "cross_attn.norm_k.weight")
        v = self.linear(name + "cross_attn.v", context)
        x = x + self.linear(name + "cross_attn.o", self.attend(self.heads(q), self.heads(k), self.heads(v)))

        y = (self.layer_norm(x) * (1 + m[4]) + m[3]).to(dtype)
        y = self.linear(name + "ffn.2", self.gelu(self.linear(name + "ffn.0", y)))
        return (x.to(wide) + y.to(wide) * m[5]).to(self.residual)


@dataclass(frozen=True)
class Steps:
    """Times the model is told, sigmas of x0, sigmas of re-noising (one less)."""

    times: Sequence[float]
    sigmas: Sequence[float]
    noise_sigmas: Sequence[float]

    @classmethod
    def continuous(cls, timesteps: Sequence[int], shift: float) -> Steps:
        sigmas = [shift * t / (1000 + (shift - 1) * t) for t in timesteps]
        return cls([1000 * sigma for sigma in sigmas], sigmas, sigmas[1:])

    @classmethod
    def official(cls, timesteps: Sequence[int], shift: float) -> Steps:
        """By look-up in the table of truncated times, as the second-generation code does."""
        unshifted = [0.999 * (1000 - i) / 1000 for i in range(1000)]
        table = [shift * u / (1 + (shift - 1) * u) for u in unshifted]
        truncated = [int(1000 * sigma) for sigma in table]
        times = [truncated[1000 - t] for t in timesteps]
        first = [truncated.index(t) for t in times]
        second = [i + 1 if truncated[i + 1] == truncated[i] else i for i in first]
        return cls([float(t) for t in times], [table[i] for i in first], [table[i] for i in second[1:]])


def denoise_chunk(
    oracle: Oracle, session: Session, steps: Steps, noise: Tensor, renoise: Tensor, text: Tensor, start_frame: int,
    condition: Tensor | None = None, camera: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sampler's loop and a full forward of the clean chunk at t = 0. Latents are float64, or float32 for bf16."""
    cfg = oracle.cfg
    if condition is None:
        condition = noise.new_zeros(noise.shape[0], cfg.in_channels - cfg.out_channels, *noise.shape[2:])
    x = noise.to(oracle.wide)
    for step, (t, sigma) in enumerate(zip(steps.times, steps.sigmas, strict=True)):
        if step > 0:
            s = steps.noise_sigmas[step - 1]
            x = ((1 - s) * x.double() + s * renoise[step - 1].double()).to(oracle.wide)
        flow = oracle.forward(session, torch.cat([x, condition.to(x.dtype)], 1), text, t, start_frame, camera)
        x = (x.double() - sigma * flow.double()).to(oracle.wide)
    oracle.forward(session, torch.cat([x, condition.to(x.dtype)], 1), text, 0.0, start_frame, camera)
    return x


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, NaN where got holds one."""
    return float((got.double() - want.double()).norm() / want.double().norm())
