"""`lingbot-kernels rollout`: options of a timed rollout; `lingbot_kernels.benchmarks.rollout` measures."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, option_group, output_path, require_plots
from lingbot_kernels.commands._options import SessionOptions, session_options
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import CameraScale, Count, Keys

if TYPE_CHECKING:
    import torch.distributed as dist

    from lingbot_kernels.benchmarks.rollout import Chunk, RolloutPlan
    from lingbot_kernels.benchmarks.scene import Scene
    from lingbot_kernels.commands.session import CameraOptions

_INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
_rollout = option_group("Rollout")
_camera = option_group("Camera and prompt")
_output = option_group("Output")


@click.command("rollout", cls=GroupedCommand)
@_rollout("--chunks", type=Count(), default=8, show_default=True, help="Chunks to denoise.")
@_rollout("--no-camera-cache", is_flag=True, help="Compute the camera modulation in every forward: slower, smaller.")
@_rollout("--no-cuda-graphs", is_flag=True, help="Launch every kernel of a steady chunk, instead of replaying graphs.")
@_camera("--poses", type=_INPUT, help=".npy [N, 4, 4], camera to world, one a pixel frame. [default: a made path]")
@_camera("--intrinsics", type=_INPUT, help=".npy [N, 4] or [4]: fx, fy, cx, cy for an 832x480 image.")
@_camera("--actions", type=Keys(), help="Keys held, a latent frame each: 'w*6,w+l*3,.' (wasd move, jl turn, ik look).")
@_camera("--no-camera", is_flag=True, help="Run without camera conditioning.")
@_camera(
    "--camera-scale",
    type=CameraScale(),
    default="clip",
    show_default=True,
    help="What translations are divided by: clip (the path's largest), running (the largest so far) or a number.",
)
@_camera("--prompt-embeds", type=_INPUT, help=".safetensors or .npy [L, text_dim]. [default: seeded noise]")
@session_options
@_output("--json", "json_path", type=output_path(), help="Write the whole report.")
@_output("--plot", "plot_path", type=output_path(".png"), help="Draw latency per chunk (needs matplotlib).")
@_output("--save-latents", type=output_path(".safetensors", ".npy"), help="Write [1, C, frames, height, width].")
@_output("--quiet", is_flag=True, help="No progress bar and no notes.")
def command(
    chunks: int,
    no_camera_cache: bool,
    no_cuda_graphs: bool,
    json_path: Path | None,
    plot_path: Path | None,
    save_latents: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Denoise chunk after chunk in real time order and say where the time goes.

    \b
    Examples:
      lingbot-kernels rollout --chunks 8
      lingbot-kernels rollout --preset lingbot-world-14b --height 464 --chunks 12 --json rollout.json --plot rollout.png
      lingbot-kernels rollout --checkpoint LingBot-World --poses poses.npy --intrinsics intrinsics.npy
      lingbot-kernels rollout --actions 'w*9,w+l*6,.*3' --chunks 6 --save-latents walk.safetensors
      torchrun --nproc_per_node=4 -m lingbot_kernels rollout --preset lingbot-world-14b --height 464

    Each chunk is a few denoise steps, after which its frames could be shown, and a context update, which leaves its
    clean K/V for the chunks to come. The table has one row per chunk, in milliseconds; the summary gives the first
    chunk's latency, the median of the steady ones (those that see a full window), what each cache holds, and which
    backend served each op. Without a checkpoint the weights are random: times are real, the latents mean nothing.
    """
    session = SessionOptions.take(options)
    prompt_embeds = options.pop("prompt_embeds")

    from lingbot_kernels.benchmarks import plots, tables
    from lingbot_kernels.benchmarks.rollout import RolloutPlan
    from lingbot_kernels.commands.session import CameraOptions
    from lingbot_kernels.parallel import launch

    if launch.launched() and session.device not in ("auto", "cpu", "cuda"):
        raise click.BadParameter(
            f"{session.device!r} must be auto, cuda or cpu: torchrun says which GPU a rank takes.",
            param_hint="--device",
        )
    if plot_path is not None:
        require_plots()
    plan = RolloutPlan(chunks, camera_cache=not no_camera_cache, cuda_graphs=not no_cuda_graphs)
    outputs = Outputs()
    quiet = quiet or not launch.is_main()
    try:
        with launch.process_group(session.device) as group:
            report = _measure(
                session, CameraOptions(**options), prompt_embeds, plan, group, save_latents, outputs, quiet
            )
            if not launch.is_main():
                return
            tables.print_rollout(tables.console(), report)
            outputs.write_json("--json", json_path, report)
            outputs.write("--plot", plot_path, lambda file: plots.latency_per_chunk(report, file))
            bad = [chunk["index"] for chunk in report["chunks"] if not math.isfinite(chunk["latents_rms"])]
            if bad:
                outputs.failures.insert(0, f"the latents of chunk {bad[0]} are not finite")
            outputs.finish()
    except launch.RankFailed as error:
        raise click.ClickException(str(error)) from error


def _measure(
    session: SessionOptions,
    camera: CameraOptions,
    prompt_embeds: Path | None,
    plan: RolloutPlan,
    group: dist.ProcessGroup | None,
    save_latents: Path | None,
    outputs: Outputs,
    quiet: bool,
) -> dict[str, Any]:
    """The report of the rollout, over the ranks of `group`; the first of them writes the latents."""
    from rich.console import Console

    from lingbot_kernels.benchmarks import rollout
    from lingbot_kernels.benchmarks.latents_file import LatentsFile
    from lingbot_kernels.commands.session import chosen_backend, make_scene
    from lingbot_kernels.files import check_output
    from lingbot_kernels.parallel import launch

    scene = make_scene(session, plan.chunks, camera, prompt_embeds)
    if group is not None:
        with blame("torchrun --nproc_per_node"):
            scene.model.shard_sequence(group)
    notes = Console(stderr=True, quiet=quiet, soft_wrap=True)
    for note in _notes(scene, plan.chunks * scene.model.config.frames_per_chunk):
        notes.print(f"note: {note}", highlight=False)
    latents = None
    if save_latents is not None and launch.is_main():
        latents = LatentsFile(save_latents, *scene.latents(plan.chunks))
        with blame("--save-latents"):
            check_output(save_latents, nbytes=latents.nbytes)
    with (
        chosen_backend(session.backend, scene.model),
        _progress(plan.chunks, quiet) as advance,
        latents or contextlib.nullcontext(),
    ):

        def each(chunk: Chunk, entry: dict[str, Any]) -> None:
            if latents is not None:
                latents.write(chunk.latents)
            advance(entry)

        report = rollout.measure(scene, plan, each)
    if latents is not None and latents.error is not None:
        outputs.failed("--save-latents", latents.path, latents.error)
    return report


def _notes(scene: Scene, frames: int) -> Iterator[str]:
    if scene.checkpoint is None:
        yield f"random weights, seed {scene.seed}: times are real, the latents mean nothing"
    if scene.prompt == "seeded noise":
        yield f"no --prompt-embeds: the prompt is noise, seed {scene.seed}"
    if scene.camera is not None and len(scene.camera.trajectory) < frames:
        length = len(scene.camera.trajectory)
        yield f"the camera path has {length} latent frames of {frames}: the camera then stands still"


@contextlib.contextmanager
def _progress(chunks: int, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function to call after each chunk, with its entry; draws on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("chunk"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[latest]}"))
    disabled = quiet or not sys.stderr.isatty()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disabled) as progress:
        task = progress.add_task("rollout", total=chunks, latest="")
        yield lambda entry: progress.update(task, advance=1, latest=f"{entry['total_ms']:.1f} ms")
