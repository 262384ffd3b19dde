"""`lingbot-kernels rollout`: options of a timed rollout; `lingbot_kernels.benchmarks.rollout` measures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, blame, option_group
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands._outputs import OutputPath, Outputs, progress
from lingbot_kernels.commands._types import CameraScale, Count

if TYPE_CHECKING:
    import torch.distributed as dist

    from lingbot_kernels.benchmarks.rollout import Chunk, RolloutPlan
    from lingbot_kernels.benchmarks.scene import Scene
    from lingbot_kernels.commands.session import CameraOptions

_rollout = option_group("Rollout")
_camera = option_group("Camera and prompt")
_output = option_group("Output")


@click.command("rollout", cls=GroupedCommand)
@_rollout("--chunks", type=Count(), default=8, show_default=True, help="Chunks to denoise.")
@_rollout("--no-camera-cache", is_flag=True, help="Compute the camera modulation in every forward: slower, smaller.")
@_rollout("--no-cuda-graphs", is_flag=True, help="Launch every kernel of a steady chunk, instead of replaying graphs.")
@_options.camera(_camera, " [default: a made path]")
@_camera("--no-camera", is_flag=True, help="Run without camera conditioning.")
@_camera(
    "--camera-scale", type=CameraScale(), default="clip", show_default=True,
    help="What translations are divided by: clip (the path's largest), running (the largest so far) or a number.",
)  # fmt: skip
@_options.prompt_embeds(_camera)
@_options.session
@_options.report("Write the whole report.")
@_options.plot("Draw latency per chunk (needs matplotlib).")
@_output("--save-latents", type=OutputPath(".safetensors", ".npy"), help="Write [1, C, frames, height, width].")
@_options.quiet("No progress bar and no notes.")
def command(
    chunks: int, no_camera_cache: bool, no_cuda_graphs: bool, json_path: Path | None, plot_path: Path | None,
    save_latents: Path | None, quiet: bool, **options: Any,
) -> None:  # fmt: skip
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
    session: SessionOptions, camera: CameraOptions, prompt_embeds: Path | None, plan: RolloutPlan,
    group: dist.ProcessGroup | None, save_latents: Path | None, outputs: Outputs, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
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
        progress("rollout", plan.chunks, quiet, latest=True) as advance,
        latents or contextlib.nullcontext(),
    ):

        def each(chunk: Chunk, entry: dict[str, Any]) -> None:
            if latents is not None:
                latents.write(chunk.latents)
            advance(f"{entry['total_ms']:.1f} ms")

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
