"""Walks with what they show and what the network is given of them, and rollouts that try to show the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld
from tiny_world import latents
from tiny_world.network import SCHEDULE, constant_text
from tiny_world.scene import Scene
from tiny_world.walks import Rays, Walks


@dataclass(frozen=True)
class Journeys:
    """Some walks of a whole number of chunks.

    Attributes:
        pixels: what they show: red, green, blue, nearness [B, 4, F, H, W].
        latents: the same as latents [B, 16, F, h, w].
        condition: mask and latents of the first frame [B, 20, F, h, w].
        camera: [B, 384, F, h, w].
    """

    pixels: Tensor
    latents: Tensor
    condition: Tensor
    camera: Tensor

    @classmethod
    def make(cls, scene: Scene, walks: Walks, rays: Rays, render: Callable[..., Tensor] | None = None) -> Journeys:
        """What `walks` show in pictures of the size that `rays` were made for.

        Args:
            render: in place of `scene.render`: a compiled one.
        """
        count, frames = walks.poses.shape[:2]
        height, width = (side * latents.SIDE for side in rays.grid)
        shown = (render or scene.render)(walks.poses.flatten(0, 1).to(torch.float32), height, width)
        pixels = shown.unflatten(0, (count, frames)).transpose(1, 2)
        encoded = latents.encode(pixels)
        return cls(pixels, encoded, latents.image_condition(encoded[:, :, :1], frames), rays.embed(walks.poses))


@dataclass(frozen=True)
class Noise:
    """What a rollout of [B, 16, F, h, w] starts its steps from, the same for whoever rolls out.

    Attributes:
        first: [B, 16, F, h, w].
        again: [steps - 1, B, 16, F, h, w].
    """

    first: Tensor
    again: Tensor

    @classmethod
    def draw(cls, like: Tensor, seed: int) -> Noise:
        """By a generator of the CPU, so that a seed means the same everywhere."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(SCHEDULE.times), *like.shape, generator=generator).to(like.device)
        return cls(drawn[0], drawn[1:])


def chunks_of(frames: int, frames_per_chunk: int) -> list[slice]:
    """The frames of each chunk; ValueError where they are no whole number of chunks."""
    if frames % frames_per_chunk or not frames:
        raise ValueError(f"frames: got {frames}, must be a positive multiple of {frames_per_chunk}")
    return [slice(start, start + frames_per_chunk) for start in range(0, frames, frames_per_chunk)]


@torch.no_grad()
def roll_plain(plain: PlainLingBotWorld, journeys: Journeys, noise: Noise) -> Tensor:
    """Pixels [B, 4, F, H, W] that the plain network makes of the first frame and the camera: no kernels, no ring."""
    context, out = None, []
    text = constant_text(plain.cfg, len(noise.first), noise.first.device)
    for part in chunks_of(noise.first.shape[2], plain.cfg.frames_per_chunk):
        chunk, context = plain.denoise_chunk(
            SCHEDULE, noise.first[:, :, part], noise.again[:, :, :, part], text, part.start,
            journeys.camera[:, :, part], context, journeys.condition[:, :, part],
        )  # fmt: skip
        out.append(chunk)
    return latents.decode(torch.cat(out, 2))


@torch.no_grad()
def roll_out(
    model: CausalLingBotTransformer, journeys: Journeys, noise: Noise, *, update_context: bool = True
) -> Tensor:
    """The same by the library's stage, chunk by chunk.

    Args:
        update_context: False leaves in the window what the last denoise step left there.
    """
    stage, state, out = CausalDenoisingStage(model, schedule=SCHEDULE), RealtimeCausalDiTState(), []
    text = constant_text(model.config, len(noise.first), noise.first.device).to(model.dtype)
    for part in chunks_of(noise.first.shape[2], model.config.frames_per_chunk):
        out.append(
            stage.denoise_chunk(
                state, noise.first[:, :, part], renoise=noise.again[:, :, :, part], text=text,
                condition=journeys.condition[:, :, part], camera=journeys.camera[:, :, part],
                update_context=update_context,
            )
        )  # fmt: skip
    state.dispose()
    return latents.decode(torch.cat(out, 2))
