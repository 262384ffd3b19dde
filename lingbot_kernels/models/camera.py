"""Camera input: poses and intrinsics, or keyboard actions, to the Pluecker embedding that conditions the network.
Geometry is float64; the poses stay on the CPU, and only the per-pixel part runs on the caller's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from lingbot_kernels.models.poses import (
    DEFAULT_SPEED,
    DEFAULT_TURN_RATE,
    ActionStream,
    as_floats,
    check_count,
    check_intrinsics,
    check_pixel_intrinsics,
    check_poses,
    check_positive,
    largest_translation,
    load_array,
    parse_actions,
    relative_poses,
    rotations,
)

__all__ = [
    "ActionStream",
    "CameraStream",
    "CameraTrajectory",
    "example_trajectory",
    "fit_intrinsics",
    "parse_actions",
    "pluecker_embedding",
    "relative_poses",
]

IMAGE_SIZE = (832, 480)  # width, height of the image that intrinsics are given for
PIXEL_FRAMES_PER_LATENT = 4
CELL = 8  # pixels, each way, of one latent position
DEFAULT_INTRINSICS = (500.0, 500.0, 416.0, 240.0)  # about 80 degrees across


def _check_size(height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if check_count(value, name) % CELL:
            raise ValueError(f"{name} is {value}, must be a multiple of {CELL}")


def fit_intrinsics(
    intrinsics: Any, height: int, width: int, *, image_size: tuple[int, int] = IMAGE_SIZE, fit: str = "cover"
) -> np.ndarray:
    """Intrinsics [N, 4] or [4] for an image of `image_size` (width, height), carried over to height x width pixels.

    Args:
        fit: "cover": the image is scaled by one factor until it covers the output, then cropped about its centre.
            "stretch": each axis is scaled by its own factor, nothing is cropped; for frames resized without regard
            to their aspect. Both agree where the aspect is kept.
    """
    height, width = check_count(height, "height"), check_count(width, "width")
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise TypeError(f"image_size is {image_size!r}, must be (width, height)")
    for size in image_size:
        check_positive(size, "image_size")
    array = as_floats(intrinsics, "intrinsics")
    array = check_intrinsics(array, len(array) if array.ndim == 2 else 1)
    scale_x, scale_y = width / image_size[0], height / image_size[1]
    if fit == "cover":
        scale_x = scale_y = max(scale_x, scale_y)
    elif fit != "stretch":
        raise ValueError(f"fit is {fit!r}, must be 'cover' or 'stretch'")
    crop = np.array([0, 0, image_size[0] * scale_x - width, image_size[1] * scale_y - height]) / 2
    return array * (scale_x, scale_y, scale_x, scale_y) - crop


def pluecker_embedding(
    relative: Any,
    intrinsics: Any,
    height: int,
    width: int,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Translation and ray direction of every pixel, 8x8 pixels folded into channels.

    The ray of the pixel (x, y) is ((x + 0.5 - cx) / fx, (y + 0.5 - cy) / fy, 1), normalised and rotated by the relative
    pose. Channel (c * 8 + row) * 8 + column holds component c of (tx, ty, tz, dx, dy, dz) of the pixel at (row, column)
    of its cell. Computed in float64, rounded once.

    Args:
        relative: relative poses [F, 4, 4] with scaled translations.
        intrinsics: [F, 4] or [4], already for height x width (`fit_intrinsics`).
        height, width: of the output in pixels; multiples of 8.
        batch: copies along the first axis.

    Returns:
        [batch, 384, F, height / 8, width / 8] of `dtype` on `device`.
    """
    _check_size(height, width)
    poses = check_poses(relative, "relative")
    frames, rows, columns = len(poses), height // CELL, width // CELL
    camera = torch.from_numpy(check_intrinsics(intrinsics, frames)).to(device)
    pose = torch.from_numpy(poses).to(device)
    fx, fy, cx, cy = camera[:, :, None].unbind(1)
    x = (torch.arange(width, dtype=torch.float64, device=device) + 0.5 - cx) / fx  # [F, width]
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5 - cy) / fy  # [F, height]
    # From here on [component, row in cell, column in cell, F, rows, columns].
    x = x.view(frames, columns, CELL).permute(2, 0, 1)[None, :, :, None, :]
    y = y.view(frames, rows, CELL).permute(2, 0, 1)[:, None, :, :, None]
    inverse_length = (x * x + y * y + 1).rsqrt()
    entries = pose[:, :3, :, None, None].permute(1, 2, 0, 3, 4)  # [3, 4, F, 1, 1]
    embedding = torch.empty(6, CELL, CELL, frames, rows, columns, dtype=dtype, device=device)
    for axis in range(3):
        embedding[axis] = entries[axis, 3]
        ray = x * entries[axis, 0] + y * entries[axis, 1] + entries[axis, 2]
        embedding[3 + axis] = ray * inverse_length
    return embedding.view(1, 6 * CELL * CELL, frames, rows, columns).repeat(check_count(batch, "batch"), 1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class CameraTrajectory:
    """One pose and one set of intrinsics a latent frame.

    Args:
        poses: camera-to-world [N, 4, 4], OpenCV axes (x right, y down, z forward).
        intrinsics: (fx, fy, cx, cy) [N, 4] or [4], in pixels of an image of IMAGE_SIZE.
    """

    poses: np.ndarray
    intrinsics: np.ndarray

    def __post_init__(self) -> None:
        poses = check_poses(self.poses)
        object.__setattr__(self, "poses", poses)
        object.__setattr__(self, "intrinsics", check_pixel_intrinsics(self.intrinsics, len(poses)))

    @classmethod
    def from_pixel_frames(cls, poses: Any, intrinsics: Any, *, varying_intrinsics: bool = False) -> CameraTrajectory:
        """From one pose a pixel frame: pixel frames 0, 4, 8, ... are kept.

        Args:
            poses: [N, 4, 4].
            intrinsics: [N, 4] or [4]. The first row serves the whole clip, unless `varying_intrinsics`.
        """
        poses = check_poses(poses)
        intrinsics = check_pixel_intrinsics(intrinsics, len(poses))
        kept = intrinsics[::PIXEL_FRAMES_PER_LATENT] if varying_intrinsics else intrinsics[0]
        return cls(poses[::PIXEL_FRAMES_PER_LATENT], kept)

    @classmethod
    def from_files(
        cls,
        poses: str | PathLike[str],
        intrinsics: str | PathLike[str] | None = None,
        *,
        varying_intrinsics: bool = False,
    ) -> CameraTrajectory:
        """From .npy files of pixel frames; without intrinsics, DEFAULT_INTRINSICS. Errors name the file."""
        pose_array = check_poses(load_array(poses), str(poses))
        camera: Any = DEFAULT_INTRINSICS
        if intrinsics is not None:
            camera = check_pixel_intrinsics(load_array(intrinsics), len(pose_array), str(intrinsics))
        return cls.from_pixel_frames(pose_array, camera, varying_intrinsics=varying_intrinsics)

    @classmethod
    def from_actions(
        cls,
        actions: str | Iterable[str],
        *,
        intrinsics: Any = DEFAULT_INTRINSICS,
        speed: float = DEFAULT_SPEED,
        turn_rate: float = DEFAULT_TURN_RATE,
        limit: int | None = None,
    ) -> CameraTrajectory:
        """From keys held, one set a latent frame, of which the first `limit` are made; see `ActionStream`."""
        return cls(ActionStream(speed=speed, turn_rate=turn_rate).advance(actions, limit), intrinsics)

    def __len__(self) -> int:
        return len(self.poses)

    @property
    def scale(self) -> float:
        """Divisor of the whole clip's translations: their largest norm, or 1 where the camera stands still."""
        return largest_translation(relative_poses(self.poses)) or 1.0

    def embedding(self, height: int, width: int, *, scale: float | None = None, **options: Any) -> torch.Tensor:
        """The embedding [B, 384, N, height / 8, width / 8] of the whole clip; `options` are CameraStream's.

        Args:
            scale: what translations are divided by; None takes the clip's own `scale`.
        """
        stream = CameraStream(height, width, scale=self.scale if scale is None else scale, **options)
        return stream.advance(self.poses, self.intrinsics)

    def chunks(self, height: int, width: int, frames_per_chunk: int, **options: Any) -> Iterator[torch.Tensor]:
        """The embedding chunk by chunk, whole chunks only; `options` are CameraStream's."""
        stream = CameraStream(height, width, **options)
        step = check_count(frames_per_chunk, "frames_per_chunk")
        for end in range(step, len(self) + 1, step):
            yield stream.advance(self.poses[end - step : end], self.intrinsics[end - step : end])


class CameraStream:
    """Embeddings of an endless trajectory, chunk by chunk. A chunk depends on itself and on what came before, only.

    The relative pose of a chunk's first frame continues from the last frame of the chunk before. A stream cannot know
    the largest translation of the whole clip: with `scale` given, all chunks are divided by it, and equal the clip's
    embedding for that scale; with None, a chunk is divided by the largest translation up to its own end (a running
    maximum; 1 until the camera first moves), and chunks handed out earlier keep the smaller divisor.

    Args:
        height, width: of the video in pixels; multiples of 8.
        intrinsics: (fx, fy, cx, cy) [4] for an image of IMAGE_SIZE, where `advance` is not told other ones.
        scale: positive divisor of the translations, or None.
        fit: how an image of IMAGE_SIZE becomes height x width, see `fit_intrinsics`.
        batch, device, dtype: of the embeddings.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        intrinsics: Any = DEFAULT_INTRINSICS,
        scale: float | None = None,
        fit: str = "cover",
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_size(height, width)
        self._size = (height, width)
        self._intrinsics = check_pixel_intrinsics(intrinsics, 1)[0]
        fit_intrinsics(self._intrinsics, height, width, fit=fit)  # refuses another fit now, not at the first chunk
        self._fixed_scale = None if scale is None else check_positive(scale, "scale")
        self._fit = fit
        self._options: dict[str, Any] = {"batch": batch, "device": device, "dtype": dtype}
        self.reset()

    def reset(self) -> None:
        """Start anew: the next frame is a first one, and the running maximum is forgotten."""
        self._previous: np.ndarray | None = None
        self._largest = 0.0

    @property
    def scale(self) -> float:
        """What the translations of the latest chunk were divided by."""
        return self._fixed_scale or self._largest or 1.0

    def advance(self, poses: Any, intrinsics: Any = None) -> torch.Tensor:
        """The embedding [batch, 384, F, height / 8, width / 8] of the next F latent frames.

        Args:
            poses: camera-to-world [F, 4, 4], one a latent frame.
            intrinsics: [F, 4] or [4] for these frames; None takes the stream's.

        Raises:
            ValueError: bad poses or intrinsics; the stream stays where it was.
        """
        poses = check_poses(poses)
        camera = fit_intrinsics(self._intrinsics if intrinsics is None else intrinsics, *self._size, fit=self._fit)
        camera = camera[0] if len(camera) == 1 else camera
        relative = relative_poses(poses, self._previous)
        largest = max(self._largest, largest_translation(relative))
        relative[:, :3, 3] /= self._fixed_scale or largest or 1.0
        embedding = pluecker_embedding(relative, camera, *self._size, **self._options)
        self._previous, self._largest = poses[-1], largest
        return embedding


def example_trajectory(num_frames: int) -> CameraTrajectory:
    """A made path of `num_frames` latent frames: a walk ahead in wide bends, looking slightly up and down."""
    time = np.arange(check_count(num_frames, "num_frames")) / PIXEL_FRAMES_PER_LATENT  # seconds
    yaw, pitch = 0.5 * np.sin(0.4 * time), 0.1 * np.sin(0.9 * time)
    half = np.stack([yaw, pitch]) / 2
    (cy, cp), (sy, sp) = np.cos(half), np.sin(half)
    velocity = (
        DEFAULT_SPEED * (1 + 0.3 * np.sin(0.7 * time))[:, None] * np.stack([np.sin(yaw), 0 * yaw, np.cos(yaw)], 1)
    )
    poses = np.tile(np.eye(4), (len(time), 1, 1))
    poses[:, :3, :3] = rotations(np.stack([cy * cp, cy * sp, sy * cp, -sy * sp], 1))  # yaw about y after pitch about x
    poses[1:, :3, 3] = np.cumsum(velocity, 0)[:-1]
    return CameraTrajectory(poses, np.array(DEFAULT_INTRINSICS))
