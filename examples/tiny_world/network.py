"""The plain reference network over whole clips at once, for training: what chunk-by-chunk inference computes, in one
forward with gradients.

A clip goes in twice. The history is what the past looks like once it is there: clean latents at time 0. The noisy copy
is what is being denoised, each chunk at a time of its own. Chunk c of either copy attends to itself and, of the
history's chunks before c, to those that the window and the sink still hold: exactly what the ring would show it.
To the plain network's layers every chunk of every copy is an element of a batch [2 * clips * chunks, S, d].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.reference import rope_cos_sin
from lingbot_kernels.reference.lingbot_world import KeyValue, PlainLingBotWorld
from lingbot_kernels.stages.schedule import Schedule

TIMESTEPS, SHIFT = (1000, 750, 500, 250), 5.0
SCHEDULE = Schedule.continuous(TIMESTEPS, SHIFT)


def world_config(**fields: Any) -> LingBotConfig:
    """The network's shape, 7.8 million parameters; `fields` replace single ones.

    A token is 3 x 3 latent positions, 6 x 6 pixels: 144 numbers that a residual stream of 256 has room for.
    """
    shape: dict[str, Any] = {
        "dim": 256, "num_heads": 4, "num_layers": 6, "ffn_dim": 448, "patch_size": (1, 3, 3), "text_dim": 16,
        "text_len": 1, "freq_dim": 64, "frames_per_chunk": 3, "window_frames": 12, "sink_frames": 3,
        "residual_dtype": "float32",
    }  # fmt: skip
    return LingBotConfig(**{**shape, **fields})


def constant_text(cfg: LingBotConfig, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """[batch, 1, text_dim]: the one prompt of a world that has no other."""
    return torch.ones(batch, 1, cfg.text_dim, device=device)


def past_frames(cfg: LingBotConfig, chunk: int) -> list[int]:
    """Frames before `chunk` that are still in its window: the sink, and the latest."""
    start = chunk * cfg.frames_per_chunk
    recent = start + cfg.frames_per_chunk - (cfg.window_frames - cfg.sink_frames)
    return [frame for frame in range(start) if frame < cfg.sink_frames or frame >= recent]


class ClipNetwork(PlainLingBotWorld):
    """The plain network's layers over both copies of some clips.

    Args:
        cfg, weights, dtype: as `PlainLingBotWorld` takes them; gradients flow back to `weights`.
        clips, chunks: of the batch.
    """

    def __init__(
        self, cfg: LingBotConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, clips: int, chunks: int
    ) -> None:
        super().__init__(cfg, weights, dtype)
        self.copies = (2, clips, chunks)

    def self_attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, past: KeyValue | tuple[None, None], frame_tokens: int
    ) -> tuple[Tensor, KeyValue]:
        """q, k, v [2 * clips * chunks, S, heads, head_dim] -> what each chunk gets from its window."""
        q, k, v = (x.unflatten(0, self.copies) for x in (q, k, v))
        grid = (self.cfg.frames_per_chunk, frame_tokens)
        history = [x[0].unflatten(2, grid).flatten(1, 2).unbind(1) for x in (k, v)]  # frames of [clips, tokens, ..]
        out = []
        for chunk in range(self.copies[2]):
            window = []
            for own, frames in zip((k, v), history, strict=True):
                seen = [frames[frame].expand(2, *frames[frame].shape) for frame in past_frames(self.cfg, chunk)]
                window.append(torch.cat([*seen, own[:, :, chunk]], 2).flatten(0, 1).transpose(1, 2))
            heads = F.scaled_dot_product_attention(q[:, :, chunk].flatten(0, 1).transpose(1, 2), *window)
            out.append(heads.transpose(1, 2).flatten(2).unflatten(0, self.copies[:2]))
        return self.linear(f"{name}.o", torch.stack(out, 2).flatten(0, 2)), (k, v)

    def camera_modulation(self, name: str, camera: Tensor) -> KeyValue:
        """Camera embedding [clips * chunks, S, d], the same for both copies."""
        scale, shift = super().camera_modulation(name, camera)
        return scale.repeat(2, 1, 1), shift.repeat(2, 1, 1)


def _block(
    cfg: LingBotConfig, dtype: torch.dtype, copies: tuple[int, int], frame_tokens: int, names: tuple[str, ...],
    weights: list[Tensor], x: Tensor, e0: Tensor, cos_sin: Tensor, text: Tensor, camera: Tensor,
) -> Tensor:  # fmt: skip
    """One block as a function of tensors, which is compiled once for all blocks."""
    network = ClipNetwork(cfg, dict(zip(names, weights, strict=True)), dtype, *copies)
    return network.block(0, x, e0, cos_sin, (None, None), frame_tokens, text, camera)[0]


class ClipFlow:
    """The flow of every chunk of a batch of clips.

    Args:
        cfg: the network.
        dtype: of the products; weights are rounded to it.
        compiled: whether the blocks go through `torch.compile`.
    """

    def __init__(self, cfg: LingBotConfig, dtype: torch.dtype, compiled: bool = False) -> None:
        self.cfg, self.dtype = cfg, dtype
        self._block: Callable[..., Tensor] = torch.compile(_block, dynamic=False) if compiled else _block

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        noisy: Tensor,
        history: Tensor,
        condition: Tensor,
        times: Tensor,
        camera: Tensor,
        gap: int = 0,
    ) -> Tensor:
        """Flow float32 [B, 16, F, h, w].

        Args:
            noisy, history: latents [B, 16, F, h, w] of whole chunks.
            condition: mask and image latents [B, 20, F, h, w].
            times: [B, chunks], what the model is told of each chunk of `noisy`.
            camera: [B, 384, F, h, w].
            gap: frames that passed between the first chunk and the second, in which nothing happened: long rollouts
                have the sink so far back.
        """
        cfg = self.cfg
        clips, _, frames, rows, columns = noisy.shape
        _, ph, pw = cfg.patch_size
        grid = (cfg.frames_per_chunk, rows // ph, columns // pw)
        frame_tokens, chunks = grid[1] * grid[2], frames // cfg.frames_per_chunk
        outer = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
        network = ClipNetwork(cfg, outer, self.dtype, clips, chunks)

        def by_chunk(x: Tensor) -> Tensor:
            return x.unflatten(1, (chunks, -1)).flatten(0, 1)

        x = torch.cat([torch.cat([history, condition], 1), torch.cat([noisy, condition], 1)])
        x = by_chunk(network.embed(x))
        e, e0 = network.time(torch.cat([torch.zeros_like(times), times]).view(-1, 1), noisy.device)
        rays = by_chunk(network.camera(camera))
        text = network.text(constant_text(cfg, len(x), x.device))
        cos_sin = _positions(cfg, chunks, frame_tokens, grid[2], gap, str(noisy.device)).repeat(2 * clips, 1, 1)
        for layer in range(cfg.num_layers):
            names, tensors = layer_weights(weights, layer)
            x = self._block(
                cfg, self.dtype, (clips, chunks), frame_tokens, names, tensors, x, e0, cos_sin, text, rays
            )  # fmt: skip
        half = clips * chunks
        out = network.head(x[half:], e[half:], grid).unflatten(0, (clips, chunks))  # [B, chunks, 16, f, h, w]
        return out.transpose(1, 2).flatten(2, 3)


def layer_weights(weights: Mapping[str, Tensor], layer: int) -> tuple[tuple[str, ...], list[Tensor]]:
    """(names as block 0 has them, weights) of one block."""
    own = {name: weight for name, weight in weights.items() if name.startswith(f"blocks.{layer}.")}
    return tuple(name.replace(f"blocks.{layer}.", "blocks.0.", 1) for name in own), list(own.values())


@functools.lru_cache(maxsize=64)
def _positions(cfg: LingBotConfig, chunks: int, frame_tokens: int, columns: int, gap: int, device: str) -> Tensor:
    """RoPE of every chunk's tokens, float32 [chunks, S, head_dim]."""
    size = cfg.frames_per_chunk * frame_tokens
    starts = [chunk * size + (gap * frame_tokens if chunk else 0) for chunk in range(chunks)]
    return torch.stack(
        [rope_cos_sin(size, start, frame_tokens, columns, cfg.head_dim, cfg.rope_theta, device) for start in starts]
    )


def initial_weights(cfg: LingBotConfig, names: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Float32 weights to begin with, by official names: a network whose flow is the noisy latents themselves.

    Half of a flow is the noise that went in, and a token has more than half as many numbers as the residual stream.
    So the patch embedding and the head begin as a rotation into the stream and its inverse, and every branch as
    nothing: the noise passes from the first step on. A constant besides it steadies the norms.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {}
    for name, shape in names.items():
        if name.endswith((".o.weight", "ffn.2.weight", "cam_scale_layer.weight", "cam_shift_layer.weight")):
            weights[name] = torch.zeros(shape)
        elif name.endswith(".modulation"):
            weights[name] = torch.zeros(shape)
            if shape[1] == 6:
                weights[name][:, 2::3] = 1  # the gates
        elif "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            gain = 0.1 if name == "time_embedding.2.weight" else 1.0  # what it gives is added to the head's scale
            weights[name] = normal(*shape) * gain / shape[1:].numel() ** 0.5
    volume, latent = cfg.patch_volume, cfg.out_channels
    width = latent * volume
    if width < cfg.dim:
        basis = torch.linalg.qr(normal(cfg.dim, width + 1)).Q
        into, beside = basis[:, :width], basis[:, width] * cfg.dim**0.5
        embedding = weights["patch_embedding.weight"].flatten(1)
        embedding[:, :width] = into  # (channel, row, column) of the noisy latents, which come first
        weights["patch_embedding.bias"] = beside
        spread = (1 + width / cfg.dim) ** 0.5  # of the stream, which the head's norm divides by
        back = into.t().view(latent, volume, cfg.dim).transpose(0, 1).flatten(0, 1)  # (row, column, channel)
        weights["head.head.weight"] = back * spread
    return weights
