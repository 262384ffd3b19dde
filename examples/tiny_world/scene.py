"""The world: a courtyard under an open sky, made from a seed and rendered by casting one ray a sample.

Axes are OpenCV's (x right, y down, z forward); a camera at y = 0 stands one unit above the ground. Everything that one
may want to tell apart has a look of its own: four walls, ground that changes its tint from corner to corner, pillars,
a sun, and mountains all around.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.models.camera import DEFAULT_INTRINSICS, fit_intrinsics

DEFAULT_SEED = 19
HALF = 6.0  # units from the middle of the courtyard to a wall
FREE = 4.6  # how far from the middle someone may stand
GROUND = 1.0  # y of the ground
WALL_TOP = -0.9  # y of the walls' upper edge
CLEARANCE = 0.4  # units to keep from a pillar
PILLARS = 7
_FAR = 1e6

# Colours of the walls towards +z, +x, -z, -x, a light and a dark one of each.
_WALLS = (
    ((0.85, 0.35, 0.25), (0.60, 0.20, 0.18)),
    ((0.90, 0.78, 0.30), (0.62, 0.50, 0.16)),
    ((0.30, 0.50, 0.85), (0.18, 0.30, 0.58)),
    ((0.40, 0.75, 0.42), (0.20, 0.48, 0.26)),
)
_PILLARS = (
    (0.92, 0.92, 0.88), (0.25, 0.22, 0.28), (0.80, 0.25, 0.65), (0.95, 0.55, 0.15),
    (0.20, 0.75, 0.78), (0.55, 0.35, 0.20), (0.95, 0.90, 0.40),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a seed decides: where pillars stand and how thick and tall they are, the sun, the mountains.

    Attributes:
        pillars: (x, z, radius, height) [PILLARS, 4].
        sun: azimuth of the sun in radians, 0 towards +z and growing to the right.
        ridges: amplitude and phase [4, 2] of the mountains' outline.
    """

    pillars: Tensor
    sun: float
    ridges: Tensor

    @classmethod
    def make(cls, seed: int = DEFAULT_SEED, device: torch.device | str = "cpu") -> Scene:
        """The scene of `seed`, the same on every device."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

        pillars: list[tuple[float, ...]] = []
        while len(pillars) < PILLARS:
            angle, distance = uniform(0, 2 * math.pi), uniform(1.6, 4.4)
            x, z, radius, height = distance * math.sin(angle), distance * math.cos(angle), uniform(0.28, 0.5), 0.0
            height = uniform(1.3, 2.7)
            if all(math.hypot(x - other[0], z - other[1]) > 1.9 for other in pillars):
                pillars.append((x, z, radius, height))
        sun = uniform(0, 2 * math.pi)
        ridges = [(uniform(0.02, 0.04), uniform(0, 2 * math.pi)) for _ in range(4)]
        return cls(torch.tensor(pillars, device=device), sun, torch.tensor(ridges, device=device))

    def free(self, x: Tensor, z: Tensor) -> Tensor:
        """Whether someone may stand at (x, z): inside, and clear of every pillar; bool of x's shape."""
        px, pz, radius, _ = self.pillars.to(x.dtype).unbind(1)
        distance = torch.hypot(x[..., None] - px, z[..., None] - pz)
        return (x.abs() <= FREE) & (z.abs() <= FREE) & (distance >= radius + CLEARANCE).all(-1)

    def render(
        self,
        poses: Tensor,
        height: int,
        width: int,
        samples: int = 2,
        cast: Callable[..., list[Tensor]] | None = None,
    ) -> Tensor:
        """Pictures float32 [N, 4, height, width] of poses [N, 4, 4] camera to world: red, green and blue from 0 to 1,
        and nearness 1 / (1 + depth along the camera's axis), 0 for the sky; a pixel is the mean of samples x samples
        rays.

        Args:
            cast: in place of `self.cast`: a compiled one.
        """
        rays = camera_rays(height, width, samples, str(poses.device))
        poses = poses.to(torch.float32)
        directions = torch.einsum("nij,jp->nip", poses[:, :3, :3], rays)
        origins = poses[:, :3, 3, None]
        values = torch.stack((cast or self.cast)(*origins.unbind(1), *directions.unbind(1)), 1)  # [N, 4, rays]
        values = values.view(len(poses), 4, height, samples, width, samples)
        return values.mean((3, 5))

    def cast(self, ox: Any, oy: Any, oz: Any, dx: Any, dy: Any, dz: Any) -> list[Tensor]:
        """(red, green, blue, nearness) of the nearest surface along rays from (ox, oy, oz) towards (dx, dy, dz). The
        rays' z is 1 in the camera's axes: the distance along a ray is the depth.
        """
        depth = torch.full_like(dx, _FAR)
        colour = self._sky(dx, dy, dz)

        t = _positive((GROUND - oy) / _nonzero(dy))
        depth, colour = _nearer(t, depth, colour, _ground(ox + t * dx, oz + t * dz))

        tx, tz = (_positive((HALF * d.sign() - o) / _nonzero(d)) for o, d in ((ox, dx), (oz, dz)))
        t = torch.minimum(tx, tz)
        y = oy + t * dy
        t = torch.where(y > WALL_TOP, t, _FAR)
        facing = torch.where(tz < tx, torch.where(dz > 0, 0, 2), torch.where(dx > 0, 1, 3))
        along = torch.where(tz < tx, ox + t * dx, oz + t * dz)
        depth, colour = _nearer(t, depth, colour, _wall(facing, along, y))

        light = (math.sin(self.sun), math.cos(self.sun))
        squared = dx * dx + dz * dz
        for number, base in enumerate(_PILLARS):
            px, pz, radius, tall = self.pillars[number].unbind()
            half = dx * (ox - px) + dz * (oz - pz)
            inside = half * half - squared * ((ox - px) ** 2 + (oz - pz) ** 2 - radius**2)
            t = torch.where(inside > 0, _positive((-half - inside.clamp_min(0).sqrt()) / squared), _FAR)
            rise = (GROUND - oy - t * dy) / tall  # 0 at the foot, 1 at the top
            t = torch.where((rise >= 0) & (rise <= 1), t, _FAR)
            normal_x, normal_z = (ox + t * dx - px) / radius, (oz + t * dz - pz) / radius
            shade = 0.72 + 0.28 * (normal_x * light[0] + normal_z * light[1]).clamp(-1, 1)
            shade = shade * torch.where((rise * 4).floor() % 2 == 0, 1.0, 0.8)  # four drums
            depth, colour = _nearer(t, depth, colour, [shade * channel for channel in base])
        nearness = torch.where(depth < _FAR, 1 / (1 + depth), 0.0)
        return [*(channel.expand_as(nearness) for channel in colour), nearness]

    def _sky(self, dx: Tensor, dy: Tensor, dz: Tensor) -> list[Tensor]:
        azimuth, level = torch.atan2(dx, dz), torch.hypot(dx, dz)
        elevation = torch.atan2(-dy, level)
        high = (elevation / 0.7).clamp(0, 1)
        sky = [0.80 - 0.50 * high, 0.86 - 0.38 * high, 0.95 - 0.15 * high]
        beside = torch.remainder(azimuth - self.sun + math.pi, 2 * math.pi) - math.pi
        distance = torch.hypot(beside, elevation - 0.34)
        glow = torch.exp(-((distance / 0.14) ** 2))
        sky = [value + glow * (target - value) for value, target in zip(sky, (1.0, 0.93, 0.6), strict=True)]
        outline = 0.18 + sum(
            self.ridges[n, 0] * torch.sin((n + 2) * azimuth + self.ridges[n, 1]) for n in range(len(self.ridges))
        )
        mountain = elevation < outline
        tint = 0.5 + 0.5 * torch.sin(azimuth)
        rock = [0.36 + 0.14 * tint, 0.34 + 0.04 * tint, 0.52 - 0.14 * tint]
        return [torch.where(mountain, stone, value) for stone, value in zip(rock, sky, strict=True)]


@functools.lru_cache(maxsize=16)
def camera_rays(height: int, width: int, samples: int, device: str) -> Tensor:
    """float32 [3, (height * samples) * (width * samples)]: rays of the default camera through each sample, z = 1."""
    fx, fy, cx, cy = fit_intrinsics(DEFAULT_INTRINSICS, height, width)[0]
    x, y = (
        ((torch.arange(count * samples, dtype=torch.float64) + 0.5) / samples - centre) / focal
        for count, centre, focal in ((width, cx, fx), (height, cy, fy))
    )
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(device, torch.float32)


def _ground(x: Tensor, z: Tensor) -> list[Tensor]:
    """Large tiles, light and dark; redder towards +x, bluer towards +z."""
    tile = torch.where(((x / 1.5).floor() + (z / 1.5).floor()) % 2 == 0, 1.0, 0.78)
    east, north = ((value / (2 * HALF) + 0.5).clamp(0, 1) for value in (x, z))
    return [tile * (0.40 + 0.32 * east), tile * 0.48, tile * (0.36 + 0.36 * north)]


def _wall(facing: Tensor, along: Tensor, y: Tensor) -> list[Tensor]:
    """Stripes, checks, bands or diamonds, by the wall; brighter towards one end, so that it tells where along it."""
    rise = GROUND - y
    patterns = (
        (along / 0.8).floor() % 2,
        ((along / 1.0).floor() + (rise / 0.65).floor()) % 2,
        (rise / 0.5).floor() % 2,
        ((along / 1.6 - (along / 1.6).floor() - 0.5).abs() * 1.6 + (rise - 0.95).abs() < 0.75).to(y.dtype),
    )
    bright = 0.85 + 0.15 * along / HALF
    out = [torch.zeros_like(y)] * 3
    for number, (pattern, (light, dark)) in enumerate(zip(patterns, _WALLS, strict=True)):
        here = facing == number
        for channel in range(3):
            value = (dark[channel] + (light[channel] - dark[channel]) * pattern) * bright
            out[channel] = torch.where(here, value, out[channel])
    return out


def _positive(t: Tensor) -> Tensor:
    """Distances in front of the camera; others are far away."""
    return torch.where(t > 1e-3, t, _FAR).clamp_max(_FAR)


def _nonzero(d: Tensor) -> Tensor:
    return torch.where(d.abs() < 1e-6, 1e-6, d)


def _nearer(t: Tensor, depth: Tensor, colour: list[Tensor], other: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    closer = t < depth
    mixed = [torch.where(closer, new, old) for new, old in zip(other, colour, strict=True)]
    return torch.where(closer, t, depth), mixed
