"""Options that rollouts and benches share: which network, where it runs, its window and its schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands._click import list_option, option_group
from lingbot_kernels.commands._types import MAX_PIXELS, Count, Device, Number, Seed
from lingbot_kernels.config import PRESETS

DTYPES = ("bfloat16", "float16", "float32", "float64")
PRECISIONS = ("bfloat16", "int8", "int8_qk")
MAX_FRAMES = 10_000  # of a window: hours of video
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """The values of `session_options`; a None stands for the default that depends on the others."""

    preset: str | None = None
    checkpoint: Path | None = None
    device: str = "auto"
    dtype: str | None = None
    precision: str | None = None
    backend: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames_per_chunk: int | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    schedule: str = "continuous"
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0

    @classmethod
    def take(cls, options: dict[str, Any]) -> SessionOptions:
        """Take this class's values out of a command's options."""
        taken = cls(**{field.name: options.pop(field.name) for field in dataclasses.fields(cls)})
        if taken.preset and taken.checkpoint:
            raise click.UsageError("--preset and --checkpoint exclude each other: a checkpoint has its own shape.")
        return taken


_model = option_group("Network")
_run = option_group("Where and how it runs")
_window = option_group("Chunk, window and schedule")

_OPTIONS = (
    _model("--preset", type=click.Choice(list(PRESETS)), help="Random weights of this shape. [default: tiny]"),
    _model(
        "--checkpoint",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of safetensors shards: official, FastVideo / sglang or diffusers names.",
    ),
    _model(
        "--seed",
        type=Seed(),
        default=0,
        show_default=True,
        metavar="INTEGER",
        help="Of random weights, noise and prompt.",
    ),
    _run(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        help="cpu, cuda or cuda:N; auto takes a GPU where there is one.",
    ),
    _run(
        "--dtype", type=click.Choice(DTYPES), help="Of weights and caches. [default: bfloat16 on a GPU, else float32]"
    ),
    _run(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Of the blocks' products: bfloat16 stands for --dtype. [default: a quantised checkpoint's own, else "
        "bfloat16]",
    ),
    _run(
        "--backend",
        type=click.Choice(BACKENDS),
        help="Of every op that has a home there; auto takes the measured winner. "
        "[default: LINGBOT_KERNELS_BACKEND, else auto]",
    ),
    _window("--height", type=Count(most=MAX_PIXELS), help="Pixels of the video. [default: 480; tiny: 128]"),
    _window("--width", type=Count(most=MAX_PIXELS), help="Pixels of the video. [default: 832; tiny: 224]"),
    _window("--frames-per-chunk", type=Count(most=MAX_FRAMES), help="Latent frames denoised together. [default: 3]"),
    _window(
        "--window-frames",
        type=Count(most=MAX_FRAMES),
        help="Latent frames that attention sees: sink, recent and the chunk. [default: 18]",
    ),
    _window("--sink-frames", type=Count(0, MAX_FRAMES), help="First latent frames, never evicted. [default: 3]"),
    _window(
        "--schedule",
        type=click.Choice(["continuous", "official"]),
        default="continuous",
        show_default=True,
        help="continuous: exact warped times, as serving engines; official: the reference code's truncated ones.",
    ),
    list_option("Chunk, window and schedule")(
        "--timesteps",
        item=Number(least=0, most=1000),
        metavar="NUMBERS",
        default="1000,750,500,250",
        show_default=True,
        help="Unwarped times from 1000 to 0, one a denoise step.",
    ),
    _window("--shift", type=Number(above=0), default=5.0, show_default=True, help="Time shift of the schedule."),
)


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options, in their groups, to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
