"""Camera poses: checks, relative poses, and a keyboard that makes poses where there is no trajectory.
All of it is float64 on the CPU: a few 4x4 matrices a frame. Axes are OpenCV's: x right, y down, z forward."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch

# A latent frame, a quarter of a second: 0.8 units and 32 degrees a second.
DEFAULT_SPEED = 0.2
DEFAULT_TURN_RATE = 8.0
PITCH_LIMIT = 85.0

MAX_ARRAY_BYTES = 2**28  # the poses of two million pixel frames
MIN_FOCAL = 8.0  # pixels of an image of 832 x 480: a field of view of 178 degrees
_ROTATION_TOLERANCE = 1e-4  # float32 files reach 1e-6


def check_poses(poses: Any, name: str = "poses") -> np.ndarray:
    """Camera-to-world matrices as float64 [N, 4, 4].

    Raises:
        ValueError: not of that shape, empty, not finite, a rotation that is not one (to 1e-4), a bottom row other than
            (0, 0, 0, 1); the message names the argument and the first bad frame.
    """
    array = as_floats(poses, name)
    if array.ndim != 3 or array.shape[1:] != (4, 4) or len(array) == 0:
        raise ValueError(f"{name} has shape {list(array.shape)}, must be [N, 4, 4] with N >= 1")
    _refuse(~np.isfinite(array).all((1, 2)), array, name, "must be finite")
    _refuse((array[:, 3] != (0, 0, 0, 1)).any(1), array, name, "must have the bottom row (0, 0, 0, 1)")
    rotation = array[:, :3, :3]
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    _refuse(error > _ROTATION_TOLERANCE, array, name, "must have an orthonormal rotation (camera to world, no scale)")
    _refuse(np.linalg.det(rotation) < 0, array, name, "must have a rotation, but this one mirrors (determinant -1)")
    return array


def check_intrinsics(intrinsics: Any, count: int, name: str = "intrinsics") -> np.ndarray:
    """(fx, fy, cx, cy) in pixels as float64 [count, 4]; one row [4] serves all frames.

    Raises:
        ValueError: another shape, not finite, or a focal length that is not positive.
    """
    array = as_floats(intrinsics, name)
    if array.shape == (4,):
        array = np.tile(array, (count, 1))
    if array.shape != (count, 4):
        raise ValueError(f"{name} has shape {list(array.shape)}, must be [4] or [{count}, 4] (fx, fy, cx, cy)")
    _refuse(~np.isfinite(array).all(1), array, name, "must be finite")
    _refuse((array[:, :2] <= 0).any(1), array, name, "must have positive focal lengths fx, fy")
    return array


def check_pixel_intrinsics(intrinsics: Any, count: int, name: str = "intrinsics") -> np.ndarray:
    """As `check_intrinsics`, for what people pass: pixels of a whole image.

    Raises:
        ValueError: also focal lengths of less than MIN_FOCAL pixels, which are fractions of the image's size, and a
            principal point left of or above the image.
    """
    array = check_intrinsics(intrinsics, count, name)
    _refuse(
        (array[:, :2] < MIN_FOCAL).any(1), array, name,
        f"must be in pixels, with fx and fy of at least {MIN_FOCAL}; multiply fractions of the image's size by it",
    )  # fmt: skip
    _refuse((array[:, 2:] < 0).any(1), array, name, "must have a principal point cx, cy of 0 or more")
    return array


def load_array(path: str | PathLike[str]) -> np.ndarray:
    """A .npy file's array, of at most MAX_ARRAY_BYTES. Pickled objects are refused; a ValueError names the file."""
    if (size := os.stat(path).st_size) > MAX_ARRAY_BYTES:
        raise ValueError(f"{path}: has {size} bytes, must have at most {MAX_ARRAY_BYTES}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{path}: not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: an archive of arrays, must be one array (.npy)")
    return array


def as_floats(value: Any, name: str) -> np.ndarray:
    array = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, must hold real numbers")
    return array.astype(np.float64)


def _refuse(bad: Any, array: np.ndarray, name: str, requirement: str) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(f"{name}[{first}] is {array[first].tolist()}: it {requirement}")


def check_positive(value: float, name: str) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}, must be a positive finite number")
    return float(value)


def check_count(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be an integer >= 1")
    return int(value)


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices [N, 3, 3] of quaternions (w, x, y, z) [N, 4], normalised first."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.array(rows).transpose(2, 0, 1)


def relative_poses(poses: Any, previous: Any = None) -> np.ndarray:
    """Each pose [N, 4, 4] seen from the one before: inverse(pose[i - 1]) @ pose[i].

    Args:
        poses: camera-to-world, one a latent frame.
        previous: the pose [4, 4] before the first; None makes the first relative pose the identity.
    """
    poses = check_poses(poses)
    first = poses[:1] if previous is None else check_poses(np.asarray(previous)[None], "previous")
    before = np.concatenate([first, poses[:-1]])
    back = before[:, :3, :3].transpose(0, 2, 1)
    result = np.tile(np.eye(4), (len(poses), 1, 1))
    result[:, :3, :3] = back @ poses[:, :3, :3]
    # Differences first: a camera that stands still far from the origin has a translation of exactly zero.
    result[:, :3, 3] = (back @ (poses[:, :3, 3] - before[:, :3, 3])[:, :, None])[:, :, 0]
    if previous is None:
        result[0] = np.eye(4)
    return result


def largest_translation(relative: np.ndarray) -> float:
    """The largest norm of the translations of relative poses [N, 4, 4]."""
    return float(np.linalg.norm(relative[:, :3, 3], axis=1).max())


# Keyboard

MAX_ACTION_FRAMES = 1_000_000  # latent frames: three days of video; 128 bytes of pose each
_REPEAT_DIGITS = 18  # what fits 64 bits

_MOVES = {"w": (0.0, 1.0), "s": (0.0, -1.0), "a": (-1.0, 0.0), "d": (1.0, 0.0)}  # right, forward
_TURNS = {"i": (0.0, 1.0), "k": (0.0, -1.0), "j": (-1.0, 0.0), "l": (1.0, 0.0)}  # right, up


def parse_actions(actions: str | Iterable[str], limit: int | None = None) -> list[frozenset[str]]:
    """The keys held in each latent frame.

    Args:
        actions: "wwwl." is one key a frame, "." none. With a comma, a plus or a star, frames are separated by commas
            and keys by pluses, and a star repeats: "w*6,w+l*3,.". A sequence has one entry a frame: ["w", "w+l", ""].
        limit: latent frames that are wanted: those after them are checked, but not made.

    Raises:
        ValueError: a key other than w a s d i j k l, a bad repeat, or, without a limit, more than MAX_ACTION_FRAMES
            latent frames; the message names it and its place.
    """
    if isinstance(actions, str):
        items: Iterable[str] = actions.split(",") if any(mark in actions for mark in ",+*") else actions
    else:
        items = actions
    frames: list[frozenset[str]] = []
    count = 0
    for place, item in enumerate(items):
        held, repeat = _held_keys(item, place)
        count += repeat
        if limit is None and count > MAX_ACTION_FRAMES:
            raise ValueError(
                f"actions[{place}] is {_shown(item)}: with it there are {count} latent frames, must be at most "
                f"{MAX_ACTION_FRAMES}"
            )
        frames += [held] * min(repeat, repeat if limit is None else limit - len(frames))
    if not count:
        raise ValueError("actions is empty, must have at least one latent frame")
    return frames


def _held_keys(item: str, place: int) -> tuple[frozenset[str], int]:
    """The keys of one entry and how many latent frames it stands for."""
    if not isinstance(item, str):
        raise ValueError(f"actions[{place}] is {item!r}, must be a string of keys such as 'w+l'")
    keys, star, repeat = item.strip().lower().partition("*")
    repeat = repeat.strip()
    if len(repeat) > _REPEAT_DIGITS:
        raise ValueError(f"actions[{place}] is {_shown(item)}, must have at most {_REPEAT_DIGITS} digits after '*'")
    if star and not (repeat.isascii() and repeat.isdecimal() and int(repeat) > 0):
        raise ValueError(f"actions[{place}] is {_shown(item)}, must have a positive integer after '*'")
    held = frozenset(key.strip() for key in keys.split("+")) - {"", "."}
    if unknown := sorted(held - _MOVES.keys() - _TURNS.keys()):
        raise ValueError(
            f"actions[{place}] is {_shown(item)}: unknown key {_shown(unknown[0])}, must be of w a s d i j k l"
        )
    return held, int(repeat) if star else 1


def _shown(text: str) -> str:
    """A value as a message shows it: long ones cut."""
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}... ({len(text)} characters)"


class ActionStream:
    """Poses of someone who walks by keyboard, a chunk at a time, one pose a latent frame.

    w and s walk forward and back, a and d step left and right, all on the ground (the x-z plane of the start pose),
    whatever the pitch; several at once keep the same speed. j and l turn left and right, i and k look up and down, up
    to 85 degrees. A frame's keys act on the way to that frame; the very first frame shows the start, so its keys do
    nothing.

    Args:
        speed: distance a latent frame. Give it to CameraStream as `scale`, and a full step has length 1.
        turn_rate: degrees a latent frame.
        start: pose [4, 4] of the first frame; None is the identity.
    """

    def __init__(
        self, *, speed: float = DEFAULT_SPEED, turn_rate: float = DEFAULT_TURN_RATE, start: Any = None
    ) -> None:
        self.speed = check_positive(speed, "speed")
        self.turn_rate = check_positive(turn_rate, "turn_rate")
        self._start = np.eye(4) if start is None else check_poses(as_floats(start, "start")[None], "start")[0]
        self._position = np.zeros(3)
        self._yaw = self._pitch = 0.0  # degrees, right and up
        self._moving = False

    def advance(self, actions: str | Iterable[str], limit: int | None = None) -> np.ndarray:
        """Poses [F, 4, 4] of the next F latent frames, at most `limit`, for the keys held in each (see
        `parse_actions`).
        """
        frames = parse_actions(actions, limit)
        poses = np.empty((len(frames), 4, 4))
        for pose, keys in zip(poses, frames, strict=True):
            pose[:] = self._step(keys)
        return poses

    def _step(self, keys: frozenset[str]) -> np.ndarray:
        if self._moving:
            right, up = (sum(_TURNS[key][axis] for key in keys & _TURNS.keys()) for axis in (0, 1))
            # Kept within a turn, so that an endless walk loses no precision.
            self._yaw = math.remainder(self._yaw + right * self.turn_rate, 360.0)
            self._pitch = min(max(self._pitch + up * self.turn_rate, -PITCH_LIMIT), PITCH_LIMIT)
            aside, ahead = (sum(_MOVES[key][axis] for key in keys & _MOVES.keys()) for axis in (0, 1))
            step = np.array([aside, 0.0, ahead])
            if aside or ahead:
                self._position += self._heading() @ (step * (self.speed / np.linalg.norm(step)))
        self._moving = True
        pitch = math.radians(self._pitch)
        tilt = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
        pose = np.eye(4)
        pose[:3, :3] = self._heading() @ tilt
        pose[:3, 3] = self._position
        return self._start @ pose

    def _heading(self) -> np.ndarray:
        yaw = math.radians(self._yaw)
        return np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
