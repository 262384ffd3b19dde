"""`lingbot-kernels bench diffusers`: options of the diffusers bench; `lingbot_kernels.benchmarks.diffusers_wan`
measures."""

from __future__ import annotations

from pathlib import Path

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, option_group, output_path
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count, Device, Pixels
from lingbot_kernels.config import PRESETS

_bench = option_group("Bench")
_output = option_group("Output")


@click.command("diffusers", cls=GroupedCommand)
@_bench(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the network, random weights.",
)
@_bench("--layers", type=Count(most=1000), default=8, show_default=True, help="Blocks to really run.")
@_bench("--frames", type=Count(most=1000), default=3, show_default=True, help="Latent frames of the input.")
@_bench("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@_bench("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@_bench("--rounds", type=Count(most=10_000), default=7, show_default=True, help="Times each variant's turn comes.")
@_bench("--compiled/--no-compiled", default=True, show_default=True, help="Also through torch.compile.")
@_bench("--causal/--no-causal", default=True, show_default=True, help="Also a step of a causal rollout.")
@_bench("--device", type=Device(), default="auto", show_default=True, help="auto, cuda, cuda:N or cpu.")
@_output(
    "--json", "json_path", type=output_path(append=True),
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

    \b
    Examples:
      lingbot-kernels bench diffusers
      lingbot-kernels bench diffusers --frames 21 --height 480 --layers 4 --no-causal

    Eager and compiled variants take turns in one process, on the same weights and inputs; the ratio is to plain eager
    diffusers. The gate comes first: two blocks of this width, both formulations against float64; the accelerated one
    may have 1.25 times the plain one's error.
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
    with blame("--json"):
        file = RowFile(found, "diffusers", json_path, click.echo, format_forward, diffusers=diffusers.__version__)
    green = WanBench(plan, where, file.report).run()
    outputs = Outputs()
    outputs.rows(file)
    outputs.finish()
    if not green:
        raise click.exceptions.Exit(1)
