"""Frames to a video file while they are made, through PyAV."""

from __future__ import annotations

import os
from fractions import Fraction
from types import TracebackType
from typing import Any

import numpy as np

from lingbot_kernels.components.reading import require

CODECS = ("libx264", "mpeg4")  # the first that PyAV was built with


class _File:
    """A file that PyAV writes to and that remembers why it couldn't: an error raised within PyAV's callbacks would be
    lost, or come again when the container ends.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._raw = open(path, "wb", buffering=0)  # noqa: SIM115  (closed with the container)
        self.name = os.fspath(path)
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        try:
            while view and self.error is None:
                view = view[self._raw.write(view) or 0 :]
        except OSError as error:
            self.error = error
        return len(data)

    def close(self) -> None:
        self._raw.close()

    def check(self) -> None:
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, self.name)


class VideoWriter:
    """An MP4 file that grows by whole fragments: what was written can be played, however the writing ends.

    Args:
        path: of the file, which is written anew.
        height, width: of the frames in pixels, even.
        fps: frames a second.
        group: frames from one key frame to the next; a fragment has as many.

    Attributes:
        frames: how many have been handed over.
    """

    def __init__(
        self, path: str | os.PathLike[str], height: int, width: int, *, fps: int = 16, group: int = 12
    ) -> None:
        av = require("av")
        if height % 2 or width % 2 or min(height, width) < 2:
            raise ValueError(f"video: got {width}x{height} pixels, must be even both ways")
        if fps < 1:
            raise ValueError(f"fps: got {fps}, must be 1 or more")
        self.frames = 0
        self._shape = (height, width, 3)
        self._av = av
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        self._file = _File(path)
        self._container: Any = av.open(self._file, "w", format="mp4", options=options)
        try:
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._stream = self._container.add_stream(codec, rate=fps)
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, fps)
            self._stream.codec_context.gop_size = group
            self._stream.codec_context.max_b_frames = 0
            if codec == "libx264":
                self._stream.codec_context.options = {
                    "preset": "veryfast",
                    "tune": "zerolatency",
                }  # holds no frames back
        except BaseException:
            self._file.close()
            raise

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [N, height, width, 3].

        Raises:
            ValueError: they have another shape or dtype. OSError: the file can't be written, such as on a full disk.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            raise ValueError(f"frames: got {frames.dtype} {list(frames.shape)}, must be uint8 [N, {self._shape}]")
        for pixels in frames:
            frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = self.frames
            self._container.mux(self._stream.encode(frame))
            self._file.check()
            self.frames += 1

    def close(self) -> None:
        """Write what the encoder still holds and end the file; safe twice."""
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if self.frames:
                container.mux(self._stream.encode())
            container.close()
            self._file.check()
        finally:
            self._file.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else the first error is the one to tell
                raise
