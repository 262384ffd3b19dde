"""Options that several commands have, each declared once: which network, where it runs, its window and its schedule,
what a bench is of, and the files that are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lingbot_kernels.commands._click import option_group
from lingbot_kernels.commands._outputs import OutputPath
from lingbot_kernels.commands._types import MAX_PIXELS, MAX_SEED, Count, Device, Keys, Number, Pixels
from lingbot_kernels.config import PRESETS

DTYPES = ("bfloat16", "float16", "float32", "float64")
PRECISIONS = ("bfloat16", "int8", "int8_qk")
MAX_FRAMES = 10_000  # of a window: hours of video
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

Option = Callable[[Any], Any]
Values = TypeVar("Values")


def take(kind: type[Values], options: dict[str, Any], **more: Any) -> Values:
    """A dataclass made of `more` and of the options that are named as its fields, which are taken out of `options`."""
    names = {field.name for field in dataclasses.fields(kind)} & options.keys()  # type: ignore[arg-type]
    return kind(**{name: options.pop(name) for name in names}, **more)


def together(*options: Option) -> Option:
    """Several options as one, in this order in `--help`."""

    def declare(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return declare


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """The values of the options of `session`; a None stands for the default that depends on the others."""

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
        taken = take(cls, options)
        if taken.preset and taken.checkpoint:
            raise click.UsageError("--preset and --checkpoint exclude each other: a checkpoint has its own shape.")
        return taken


_model = option_group("Network")
_run = option_group("Where and how it runs")
_window = option_group("Chunk, window and schedule")
_bench = option_group("Bench")
_output = option_group("Output")

session = together(
    _model("--preset", type=click.Choice(list(PRESETS)), help="Random weights of this shape. [default: tiny]"),
    _model("--checkpoint", type=FOLDER, help="Folder of safetensors shards: official, FastVideo / sglang or diffusers "
           "names."),
    _model("--seed", type=Count(0, MAX_SEED, "integer"), default=0, show_default=True,
           help="Of random weights, noise and prompt."),
    _run("--device", type=Device(), default="auto", show_default=True, help="cpu, cuda or cuda:N; auto takes a GPU "
         "where there is one."),
    _run("--dtype", type=click.Choice(DTYPES), help="Of weights and caches. [default: bfloat16 on a GPU, else "
         "float32]"),
    _run("--precision", type=click.Choice(PRECISIONS), help="Of the blocks' products: bfloat16 stands for --dtype. "
         "[default: a quantised checkpoint's own, else bfloat16]"),
    _run("--backend", type=click.Choice(BACKENDS), help="Of every op that has a home there; auto takes the measured "
         "winner. [default: LINGBOT_KERNELS_BACKEND, else auto]"),
    _window("--height", type=Count(most=MAX_PIXELS), help="Pixels of the video. [default: 480; tiny: 128]"),
    _window("--width", type=Count(most=MAX_PIXELS), help="Pixels of the video. [default: 832; tiny: 224]"),
    _window("--frames-per-chunk", type=Count(most=MAX_FRAMES), help="Latent frames denoised together. [default: 3]"),
    _window("--window-frames", type=Count(most=MAX_FRAMES), help="Latent frames that attention sees: sink, recent and "
            "the chunk. [default: 18]"),
    _window("--sink-frames", type=Count(0, MAX_FRAMES), help="First latent frames, never evicted. [default: 3]"),
    _window("--schedule", type=click.Choice(["continuous", "official"]), default="continuous", show_default=True,
            help="continuous: exact warped times, as serving engines; official: the reference code's truncated ones."),
    _window("--timesteps", item=Number(least=0, most=1000), metavar="NUMBERS", default="1000,750,500,250",
            show_default=True, help="Unwarped times from 1000 to 0, one a denoise step."),
    _window("--shift", type=Number(above=0), default=5.0, show_default=True, help="Time shift of the schedule."),
)  # fmt: skip


def preset(of: str = "Shape of the network, random weights.") -> Option:
    """Which network a bench is of."""
    names = click.Choice(list(PRESETS))
    return _bench("--preset", type=names, default="lingbot-world-14b", show_default=True, help=of)


def layers(text: str, group: Callable[..., Option] = _bench, **settings: Any) -> Option:
    return group("--layers", type=Count(most=1000), help=text, **settings)


size = together(
    _bench("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video."),
    _bench("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video."),
)


def latent_size(options: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of the latents of the options of `size`, which are taken out of `options`."""
    return options.pop("height") // 8, options.pop("width") // 8


def device(text: str = "auto, cuda, cuda:N or cpu.", *kinds: str) -> Option:
    """Where a bench runs."""
    default = kinds[0] if kinds else "auto"
    return _bench("--device", type=Device(*kinds), default=default, show_default=True, help=text)


def gpus(text: str) -> Option:
    return _bench("--gpus", type=Count(most=1024), default=1, show_default=True, help=text)


def residual_dtype(text: str, group: Callable[..., Option] = _bench) -> Option:
    return group("--residual-dtype", type=click.Choice(["bfloat16", "float32"]), help=text)


def camera(group: Callable[..., Option], poses: str = "") -> Option:
    """Where the camera goes, from files or from keys."""
    keys = "Keys held, a latent frame each: 'w*6,w+l*3,.' (wasd move, jl turn, ik look)."
    lens = ".npy [N, 4] or [4]: fx, fy, cx, cy for an 832x480 image."
    return together(
        group("--poses", type=FILE, help=f".npy [N, 4, 4], camera to world, one a pixel frame.{poses}"),
        group("--intrinsics", type=FILE, help=lens),
        group("--actions", type=Keys(), help=keys),
    )


def prompt_embeds(group: Callable[..., Option]) -> Option:
    return group("--prompt-embeds", type=FILE, help=".safetensors or .npy [L, text_dim]. [default: seeded noise]")


def report(text: str = "Write the report.") -> Option:
    return _output("--json", "json_path", type=OutputPath(), help=text)


def plot(text: str = "Write a picture, a PNG.") -> Option:
    return _output("--plot", "plot_path", type=OutputPath(".png"), help=text)


def rows(bench: str) -> Option:
    """The file that a bench's rows are appended to."""
    text = f"Append the rows here.  [default: bench/results/{bench}-<gpu>.jsonl]"
    return _output("--json", "json_path", type=OutputPath(append=True), help=text)


def more_rows(bench: str, each: str) -> Option:
    """The same for what has a report as well, and keeps no rows of a CPU's unless it is told to."""
    text = f"Append a row for each {each}. [default: bench/results/{bench}-<gpu>.jsonl on a GPU, else none]"
    return _output("--rows", "rows_path", type=OutputPath(".jsonl", append=True), help=text)


def quiet(text: str) -> Option:
    return _output("--quiet", is_flag=True, help=text)
