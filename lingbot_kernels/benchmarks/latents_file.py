"""A rollout's latents as one array in a file, written chunk by chunk: what a rollout holds does not grow with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lingbot_kernels.files import replacing

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float64: "F64"}


class LatentsFile:
    """Writes [1, C, frames, H, W] while the frames come; the file has its name once it is whole.

    Where it can't be written, the rollout goes on: `error` then says why, and what the name stood for is still there.

    Args:
        path: ends in .npy, or in .safetensors for one tensor named latents.
        shape: of the whole.
        dtype: float32 or float64.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.error: OSError | None = None
        self._frames = 0

    def __enter__(self) -> LatentsFile:
        self._stack = contextlib.ExitStack()
        try:
            part = self._stack.enter_context(replacing(self.path))
            self._file = self._stack.enter_context(part.open("wb"))
            self._write_header()
        except OSError as error:
            self.error = error
        return self

    def write(self, latents: Tensor) -> None:
        """Append the frames of a chunk, [1, C, F, H, W]."""
        _, channels, frames, height, width = self.shape
        first, count = self._frames, latents.shape[2]
        if latents.shape != (1, channels, count, height, width) or first + count > frames:
            raise ValueError(f"latents: got {list(latents.shape)} after {first} frames, must fit {list(self.shape)}")
        if self.error is not None:
            return
        values = latents.detach().to("cpu", self.dtype).contiguous()[0].numpy()
        try:
            for channel in range(channels):
                place = (channel * frames + first) * height * width * self.dtype.itemsize
                self._file.seek(self._begin + place)
                self._file.write(values[channel].tobytes())
            self._file.flush()
            self._frames += count
        except OSError as error:
            self.error = error

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        if raised is None and self.error is None and self._frames < self.shape[2]:
            raised = self.error = OSError(None, f"got {self._frames} of {self.shape[2]} frames")
        reason = raised or self.error
        try:
            self._stack.__exit__(type(reason) if reason else None, reason, None)
        except OSError as error:
            self.error = self.error or error

    def _write_header(self) -> None:
        if self.path.suffix == ".npy":
            about = {"descr": np.dtype(str(self.dtype).removeprefix("torch.")).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(self._file, {**about, "shape": self.shape})  # type: ignore[arg-type]
        else:
            about = {"dtype": _SAFETENSORS_NAMES[self.dtype], "shape": self.shape, "data_offsets": [0, self.nbytes]}
            header = json.dumps({"latents": about}).encode()
            header += b" " * (-len(header) % 8)
            self._file.write(len(header).to_bytes(8, "little") + header)
        self._begin = self._file.tell()
        self._file.truncate(self._begin + self.nbytes)
        os.fsync(self._file.fileno())
