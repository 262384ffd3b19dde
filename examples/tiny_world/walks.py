"""Walks by keyboard through a scene, many at once: keys, the poses they lead to, and the camera embedding of these.

The steps are those of `lingbot_kernels.models.camera.ActionStream`, with a person at the keys who keeps off walls and
pillars and looks neither far up nor far down. Headings are multiples of one turn, so that a network can tell in which
of 45 it looks; positions are free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_kernels.models.camera import CELL, DEFAULT_INTRINSICS, fit_intrinsics
from lingbot_kernels.models.poses import DEFAULT_SPEED, DEFAULT_TURN_RATE
from tiny_world.scene import FREE, Scene

HEADINGS = round(360 / DEFAULT_TURN_RATE)
MOST_LOOK = 2  # turns up or down

# How someone walks: how often each axis of the keyboard changes in a frame, and what it then is.
_CHANGES = 0.22
_AHEAD = torch.tensor([0.12, 0.40, 0.48])  # s, neither, w
_ASIDE = torch.tensor([0.12, 0.76, 0.12])  # a, neither, d
_TURN = torch.tensor([0.28, 0.44, 0.28])  # j, neither, l
_LOOK = torch.tensor([0.07, 0.86, 0.07])  # k, neither, i
_BACK = 0.3  # of the walks go back in their second half what they came in their first


@dataclass(frozen=True)
class Walks:
    """Keys and poses of some walks, one of each a frame.

    Attributes:
        keys: int64 [N, F, 4]: aside (d is 1, a is -1), ahead (w, s), turn (l, j), look (i, k), as they had effect.
        poses: float64 [N, F, 4, 4], camera to world.
    """

    keys: Tensor
    poses: Tensor

    def actions(self, walk: int) -> list[str]:
        """The keys of one walk as `parse_actions` reads them."""
        names = (("a", "d"), ("s", "w"), ("j", "l"), ("k", "i"))
        return [
            "+".join(pair[value > 0] for pair, value in zip(names, frame, strict=True) if value)
            for frame in self.keys[walk].tolist()
        ]


def random_keys(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """int64 [count, frames, 4] as `Walks.keys` has them: keys are held for some frames, several at a time."""
    device = generator.device
    axes = []
    for chances in (_ASIDE, _AHEAD, _TURN, _LOOK):
        drawn = torch.multinomial(chances.to(device), count * frames, True, generator=generator).view(count, frames) - 1
        changes = torch.rand(count, frames, generator=generator, device=device) < _CHANGES
        changes[:, 0] = True
        held = torch.where(changes, torch.arange(frames, device=device), 0).cummax(1).values
        axes.append(drawn.gather(1, held))
    keys = torch.stack(axes, -1)
    back = torch.rand(count, generator=generator, device=device) < _BACK
    half = frames // 2
    returned = keys.clone()
    returned[:, half + 1 : 2 * half + 1] = -keys[:, 1 : half + 1].flip(1)[:, : frames - half - 1]
    return torch.where(back[:, None, None], returned, keys)


def random_starts(scene: Scene, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(positions float64 [count, 2] where someone may stand, headings int64 [count] in turns from +z to the right)."""
    device = generator.device
    tries = (torch.rand(count, 32, 2, generator=generator, device=device, dtype=torch.float64) * 2 - 1) * FREE
    free = scene.free(tries[..., 0], tries[..., 1])
    first = free.to(torch.int64).argmax(1)
    headings = torch.randint(HEADINGS, (count,), generator=generator, device=device)
    return tries[torch.arange(count, device=device), first], headings


def walk(scene: Scene, keys: Tensor, positions: Tensor, headings: Tensor) -> Walks:
    """The walks of `keys` [N, F, 4] from positions [N, 2] and headings [N]. Keys that lead into a wall or a pillar, or
    past the highest and lowest look, are let go; so is the first frame's, which shows the start.
    """
    place, heading, look = positions.clone(), headings.clone(), torch.zeros_like(headings)
    taken, poses = torch.zeros_like(keys), []
    for frame in range(keys.shape[1]):
        if frame:
            aside, ahead, turn, up = keys[:, frame].unbind(1)
            up = torch.where((look + up).abs() <= MOST_LOOK, up, 0)
            heading, look = heading + turn, look + up
            angle = heading.double() * math.radians(DEFAULT_TURN_RATE)
            length = torch.hypot(aside.double(), ahead.double()).clamp_min(1)
            right, forward = (axis * (DEFAULT_SPEED / length) for axis in (aside, ahead))
            step = torch.stack(
                [right * angle.cos() + forward * angle.sin(), forward * angle.cos() - right * angle.sin()], 1
            )
            there = place + step
            free = scene.free(there[:, 0], there[:, 1])
            place = torch.where(free[:, None], there, place)
            taken[:, frame] = torch.stack([torch.where(free, aside, 0), torch.where(free, ahead, 0), turn, up], 1)
        poses.append(_poses(place, heading, look))
    return Walks(taken, torch.stack(poses, 1))


def random_walks(scene: Scene, count: int, frames: int, generator: torch.Generator) -> Walks:
    """Walks that nobody planned: all that training sees, and, by another seed, what it is judged on."""
    positions, headings = random_starts(scene, count, generator)
    return walk(scene, random_keys(count, frames, generator), positions, headings)


def _poses(place: Tensor, heading: Tensor, look: Tensor) -> Tensor:
    """float64 [N, 4, 4]: turned to the right by heading, then up by look, as `ActionStream` does."""
    yaw, pitch = (turns.double() * math.radians(DEFAULT_TURN_RATE) for turns in (heading, look))
    (cy, sy), (cp, sp) = ((angle.cos(), angle.sin()) for angle in (yaw, pitch))
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    x, z = place.unbind(1)
    rows = (cy, sy * sp, sy * cp, x, zero, cp, -sp, zero, -sy, cy * sp, cy * cp, z, zero, zero, zero, one)
    return torch.stack(rows, 1).view(-1, 4, 4)


def relative(poses: Tensor) -> Tensor:
    """Each pose [N, F, 4, 4] seen from the one before, the first as the identity, translations divided by a full step:
    what `CameraStream(scale=DEFAULT_SPEED)` embeds.
    """
    before = torch.cat([poses[:, :1], poses[:, :-1]], 1)
    back = before[..., :3, :3].transpose(-1, -2)
    result = torch.zeros_like(poses)
    result[..., :3, :3] = back @ poses[..., :3, :3]
    result[..., :3, 3:] = back @ (poses[..., :3, 3:] - before[..., :3, 3:]) / DEFAULT_SPEED
    result[..., 3, 3] = 1
    return result


class Rays:
    """Camera embeddings of many poses at once: `pluecker_embedding` for the default intrinsics, in float32.

    Args:
        rows, columns: of the latents.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        height, width = rows * CELL, columns * CELL
        fx, fy, cx, cy = fit_intrinsics(DEFAULT_INTRINSICS, height, width)[0]
        x, y = (
            (torch.arange(count, dtype=torch.float64) + 0.5 - centre) / focal
            for count, centre, focal in ((width, cx, fx), (height, cy, fy))
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        rays = torch.nn.functional.normalize(torch.stack([x, y, torch.ones_like(x)]), dim=0)
        cells = rays.view(3, rows, CELL, columns, CELL).permute(0, 2, 4, 1, 3)  # [3, row in cell, column in cell, ..]
        self.rays = cells.to(device, torch.float32).flatten(1)
        self.grid = (rows, columns)

    def embed(self, poses: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, 384, F, rows, columns] of whole walks' poses [N, F, 4, 4]."""
        steps = relative(poses).to(torch.float32)
        count, frames = steps.shape[:2]
        turned = torch.einsum("nfij,jp->nifp", steps[..., :3, :3], self.rays).to(dtype)
        cells = CELL * CELL
        turned = turned.view(count, 3, frames, cells, *self.grid).transpose(2, 3)
        moved = steps[..., :3, 3].to(dtype).transpose(1, 2)[:, :, None, :, None, None].expand_as(turned)
        return torch.cat([moved, turned], 1).flatten(1, 2)
