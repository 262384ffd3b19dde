"""`lingbot-kernels bench diffusers`: options of the diffusers bench; `lingbot_kernels.benchmarks.diffusers_wan`
measures."""

from __future__ import annotations

from pathlib import Path

import click

from lingbot_kernels.commands._options import Pixels
from lingbot_kernels.config import PRESETS


@click.command("diffusers")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the network, random weights.",
)
@click.option("--layers", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks to really run.")
@click.option("--frames", type=click.IntRange(min=1), default=3, show_default=True, help="Latent frames of the input.")
@click.option("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@click.option("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Times each variant's turn comes."
)
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Also through torch.compile.")
@click.option("--causal/--no-causal", default=True, show_default=True, help="Also a step of a causal rollout.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N or cpu.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
    help="Append the rows here.  [default: bench/results/diffusers-<gpu>.jsonl]",
)  # fmt: skip
def command(
    preset: str,
    layers: int,
    frames: int,
    height: int,
    width: int,
    rounds: int,
    compiled: bool,
    causal: bool,
    device: str,
    json_path: Path | None,
) -> None:
    """Measure what `accelerate` is worth: diffusers' Wan transformer as it is, against the same module accelerated.

    Eager and compiled variants take turns in one process, on the same weights and inputs; the ratio is to plain eager
    diffusers. The gate comes first: two blocks of this width, both formulations against float64; the accelerated one
    may have 1.25 times the plain one's error.

    \b
    Examples:
      lingbot-kernels bench diffusers
      lingbot-kernels bench diffusers --frames 21 --height 480 --layers 4 --no-causal
    """
    window, sink = 18, 3
    if causal and frames > window - sink:
        raise click.BadParameter(
            f"{frames} must be at most {window - sink} for the causal rollout; or add --no-causal.",
            param_hint="--frames",
        )

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.rows import RowFile, format_forward
    from lingbot_kernels.commands.session import bench_device

    try:
        import diffusers

        from lingbot_kernels.benchmarks.diffusers_wan import WanBench, WanPlan
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    where = bench_device(device)
    size = (height // 8, width // 8)
    plan = WanPlan(preset, layers, frames, size, rounds, compiled, window if causal else 0, sink)
    found = Environment.collect(where)
    click.echo(f"{found.gpu} · torch {found.torch} · diffusers {diffusers.__version__}")
    file = RowFile(found, "diffusers", json_path, click.echo, format_forward, diffusers=diffusers.__version__)
    green = WanBench(plan, where, file.report).run()
    file.close()
    if not green:
        raise click.exceptions.Exit(1)
