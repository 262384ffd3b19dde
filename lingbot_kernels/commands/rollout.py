"""`lingbot-kernels rollout`: the options of a timed rollout; `timed_rollout` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands._click import GroupedCommand, option_group, output_path
from lingbot_kernels.commands._options import SessionOptions, session_options

_INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
_rollout = option_group("Rollout")
_camera = option_group("Camera and prompt")
_output = option_group("Output")


@click.command("rollout", cls=GroupedCommand)
@_rollout("--chunks", type=click.IntRange(min=1), default=8, show_default=True, help="Chunks to denoise.")
@_rollout("--no-camera-cache", is_flag=True, help="Compute the camera modulation in every forward: slower, smaller.")
@_rollout("--no-cuda-graphs", is_flag=True, help="Launch every kernel of a steady chunk, instead of replaying graphs.")
@_camera("--poses", type=_INPUT, help=".npy [N, 4, 4], camera to world, one a pixel frame. [default: a made path]")
@_camera("--intrinsics", type=_INPUT, help=".npy [N, 4] or [4]: fx, fy, cx, cy for an 832x480 image.")
@_camera("--actions", help="Keys held, a latent frame each: 'w*6,w+l*3,.' (w a s d move, j l turn, i k look).")
@_camera("--no-camera", is_flag=True, help="Run without camera conditioning.")
@_camera(
    "--camera-scale",
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

    Each chunk is a few denoise steps, after which its frames could be shown, and a context update, which leaves its
    clean K/V for the chunks to come. The table has a row a chunk, in milliseconds; the summary gives the first chunk's
    latency, the median of the steady ones (those that see a full window), what each cache holds, and which backend
    served each op. Without a checkpoint the weights are random: times are real, the latents mean nothing.

    \b
    Examples:
      lingbot-kernels rollout --chunks 8
      lingbot-kernels rollout --preset lingbot-world-14b --height 464 --chunks 12 --json rollout.json --plot rollout.png
      lingbot-kernels rollout --checkpoint LingBot-World --poses poses.npy --intrinsics intrinsics.npy
      lingbot-kernels rollout --actions 'w*9,w+l*6,.*3' --chunks 6 --save-latents walk.safetensors
      torchrun --nproc_per_node=4 -m lingbot_kernels rollout --preset lingbot-world-14b --height 464
    """
    session = SessionOptions.take(options)
    prompt_embeds = options.pop("prompt_embeds")

    from lingbot_kernels.commands import timed_rollout
    from lingbot_kernels.commands.session import CameraOptions
    from lingbot_kernels.parallel import launch

    if launch.launched() and session.device not in ("auto", "cpu", "cuda"):
        raise click.BadParameter(
            f"{session.device!r} must be auto, cuda or cpu: torchrun says which GPU a rank takes.",
            param_hint="--device",
        )
    rollout = timed_rollout.RolloutOptions(
        session=session,
        camera=CameraOptions(**options),
        chunks=chunks,
        prompt_embeds=prompt_embeds,
        camera_cache=not no_camera_cache,
        cuda_graphs=not no_cuda_graphs,
        json_path=json_path,
        plot_path=plot_path,
        save_latents=save_latents,
        quiet=quiet or not launch.is_main(),
    )
    try:
        with launch.process_group(session.device) as group:
            timed_rollout.run(rollout, group)
    except launch.RankFailed as error:
        raise click.ClickException(str(error)) from error
