"""`lingbot-kernels generate`: a checkpoint, a prompt, an image and keys to a video file, written as chunks come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, blame, option_group
from lingbot_kernels.commands._options import DTYPES, FILE, FOLDER, PRECISIONS
from lingbot_kernels.commands._outputs import OutputPath, Outputs, progress
from lingbot_kernels.commands._types import MAX_PIXELS, MAX_SEED, Count, Device, Text
from lingbot_kernels.commands._world import read_pipeline

if TYPE_CHECKING:
    from lingbot_kernels.components.video import VideoWriter
    from lingbot_kernels.pipeline import WorldSession

_world = option_group("World")
_camera = option_group("Camera")
_run = option_group("Where and how")
_output = option_group("Output")
DEFAULT_CHUNKS = 8
INTERRUPTED = 130  # exit code, as a shell reports Ctrl-C


@click.command("generate", cls=GroupedCommand)
@_world("--checkpoint", type=FOLDER, required=True, help="Folder of a world model, official or diffusers layout.")
@_world(
    "--assets",
    type=FOLDER,
    help="Another folder, for a text encoder, tokenizer or VAE that --checkpoint lacks.",
)
@_world("--prompt", type=Text(), required=True, help="What the world is.")
@_world("--image", type=FILE, help="Its first frame. [default: none]")
@_world("--seed", type=Count(0, MAX_SEED, "integer"), default=0, show_default=True, help="Of the noise.")
@_options.camera(_camera)
@_run("--chunks", type=Count(), help="Chunks to make. [default: as long as the camera moves, else 8]")
@_run("--height", type=Count(most=MAX_PIXELS), help="Of the video. [default: about 480x832 in the image's aspect]")
@_run("--width", type=Count(most=MAX_PIXELS))
@_run("--device", type=Device(), help="cuda, cuda:N or cpu. [default: the first GPU, else the CPU]")
@_run("--dtype", type=click.Choice(DTYPES[:-1]), help="Of the transformer.")
@_run(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the transformer's products. [default: the checkpoint's]",
)
@_run("--text-device", type=Device(), help="Of the text encoder. [default: --device]")
@_output("--out", type=OutputPath(".mp4"), required=True, help="The video, an .mp4 file.")
@_output("--fps", type=Count(most=1000), default=16, show_default=True, help="Frames a second.")
@_options.report("Write what was made, and the time each chunk took.")
@_options.quiet("No progress bar.")
def command(
    chunks: int | None, out: Path, fps: int, json_path: Path | None, quiet: bool, prompt: str, image: Path | None,
    seed: int, **options: Any,
) -> None:  # fmt: skip
    """Generate a video and write it while it is made: after each chunk its frames are in the file.

    \b
    Examples:
      lingbot-kernels generate --checkpoint LingBot-World --image harbour.png --prompt 'a harbour at dawn' \\
          --actions 'w*9,w+l*6,.*3' --out world.mp4

    Ctrl-C ends it with the frames so far, and so does whatever else stops it: the file can be played.
    """
    from lingbot_kernels.components.video import VideoWriter

    steps, length = _steps(options)
    pipeline = read_pipeline(options)
    frames = pipeline.transformer.config.frames_per_chunk
    total = chunks or (DEFAULT_CHUNKS if length is None else -(-length // frames))
    if length is not None and options["poses"] is not None and total * frames > length:
        raise click.BadParameter(
            f"{options['poses']}: has {length} latent frames, must have {total * frames} for {total} chunks.",
            param_hint="--poses",
        )
    size = {"height": options["height"], "width": options["width"]}
    with blame("--prompt/--image/--height/--width/--intrinsics"):
        session = pipeline.session(prompt, image, seed=seed, intrinsics=_intrinsics(options), **size)
    with blame("--out"):
        writer = VideoWriter(out, session.height, session.width, fps=fps, group=4 * frames)
    milliseconds: list[float] = []
    stopped = _write(session, steps, frames, total, writer, milliseconds, quiet)
    outputs = Outputs()
    if json_path is not None:
        report = {
            "out": str(out), "frames": writer.frames, "width": session.width, "height": session.height, "fps": fps,
            "seed": seed, "device": str(pipeline.device), "stopped": stopped, "chunk_ms": milliseconds,
        }  # fmt: skip
        outputs.write_json("--json", json_path, report)
    video = f"{writer.frames} frames of {session.width}x{session.height}, {writer.frames / fps:.1f} s"
    click.echo(f"{out}: {video}{', stopped' if stopped else ''}")
    outputs.finish()
    if stopped:
        raise SystemExit(INTERRUPTED)


def _write(
    session: WorldSession, steps: Callable[[int, int], dict[str, Any]], frames: int, total: int, writer: VideoWriter,
    milliseconds: list[float], quiet: bool,
) -> bool:  # fmt: skip
    """Make the chunks, write each and append the time it took; whether Ctrl-C stopped them.

    Raises:
        click.ClickException: the file can't be written, or memory is out; the frames so far are in the file.
    """
    try:
        with writer, session, progress("generate", total, quiet) as advance:
            for chunk in range(total):
                begin = time.perf_counter()
                writer.write(session.step(**steps(chunk, frames)).cpu().numpy())
                milliseconds.append(1e3 * (time.perf_counter() - begin))
                advance("")
    except KeyboardInterrupt:
        return True
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror} after {writer.frames} frames") from error
    return False


def _steps(options: dict[str, Any]) -> tuple[Callable[[int, int], dict[str, Any]], int | None]:
    """(what `step` is given for a chunk of so many latent frames, latent frames of the path; None: it has no end)."""
    from lingbot_kernels.models.camera import CameraTrajectory, parse_actions

    if options["actions"] is not None and options["poses"] is not None:
        raise click.UsageError("--actions and --poses exclude each other: both say where the camera goes.")
    if options["poses"] is not None:
        with blame("--poses"):
            poses = CameraTrajectory.from_files(options["poses"]).poses
        return lambda chunk, frames: {"camera": poses[chunk * frames : (chunk + 1) * frames]}, len(poses)
    if options["actions"] is None:
        return lambda chunk, frames: {}, None
    with blame("--actions"):
        held = parse_actions(options["actions"])

    def keys(chunk: int, frames: int) -> dict[str, Any]:
        """The camera stands still once the keys have ended."""
        part = held[chunk * frames : (chunk + 1) * frames]
        return {"keys": ["+".join(sorted(each)) for each in part] + [""] * (frames - len(part))}

    return keys, len(held)


def _intrinsics(options: dict[str, Any]) -> Any:
    from lingbot_kernels.models.poses import load_array

    if options["intrinsics"] is None:
        return None
    with blame("--intrinsics"):
        array = load_array(options["intrinsics"])
        return array[0] if array.ndim == 2 else array
