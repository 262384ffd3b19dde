"""Contact sheets, films and PSNR of uint8 frames [F, H, W, 3]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[.., 3 or 4, F, H, W] from 0 to 1 -> uint8 [.., F, H, W, 3] on the CPU."""
    colour = pixels[..., :3, :, :, :].float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return colour.movedim(-4, -1).cpu().numpy()


def psnr(got: Tensor, want: Tensor) -> float:
    """In dB, of values from 0 to 1, over everything; infinite where they are equal."""
    error = (got.double() - want.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def psnr_per_chunk(got: Tensor, want: Tensor, frames: int) -> list[float]:
    """PSNR of the colours of each chunk of `frames` frames of pixels [.., 4, F, H, W]."""
    pairs = zip(got.split(frames, -3), want.split(frames, -3), strict=True)
    return [psnr(a[..., :3, :, :, :].clamp(0, 1), b[..., :3, :, :, :]) for a, b in pairs]


def sheet(rows: list[np.ndarray], scale: int = 2, gap: int = 4) -> np.ndarray:
    """One uint8 picture of rows of frames [F, H, W, 3], each frame enlarged `scale` times, on white."""
    frames, height, width, _ = rows[0].shape
    cell_height, cell_width = height * scale + gap, width * scale + gap
    out = np.full((len(rows) * cell_height + gap, frames * cell_width + gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            top, left = gap + i * cell_height, gap + j * cell_width
            out[top : top + height * scale, left : left + width * scale] = frame.repeat(scale, 0).repeat(scale, 1)
    return out


def save_sheet(path: str | Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write `sheet` as a PNG."""
    from PIL import Image

    Image.fromarray(sheet(rows, scale)).save(path)


def save_film(path: str | Path, rows: list[np.ndarray], scale: int = 4, rate: int = 8) -> None:
    """Write rows of frames, one under the other, as a film; the frames of a row follow each other in time."""
    import av

    stacked = [sheet([row[i : i + 1] for row in rows], scale) for i in range(len(rows[0]))]
    height, width = (side - side % 2 for side in stacked[0].shape[:2])
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in stacked:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


def save_curve(path: str | Path, log: list[dict[str, Any]]) -> None:
    """Loss by step, from entries with `step` and `loss`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log])
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
