"""`lingbot-kernels bench diffusers`: options of the diffusers bench; `lingbot_kernels.benchmarks.diffusers_wan`
measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import latent_size, take
from lingbot_kernels.commands._types import Count

_bench = option_group("Bench")


@click.command("diffusers", cls=GroupedCommand)
@_options.preset()
@_options.layers("Blocks to really run.", default=8, show_default=True)
@_bench("--frames", type=Count(most=1000), default=3, show_default=True, help="Latent frames of the input.")
@_options.size
@_bench("--rounds", type=Count(most=10_000), default=7, show_default=True, help="Times each variant's turn comes.")
@_bench("--compiled/--no-compiled", default=True, show_default=True, help="Also through torch.compile.")
@_bench("--causal/--no-causal", default=True, show_default=True, help="Also a step of a causal rollout.")
@_options.device()
@_options.rows("diffusers")
def command(frames: int, causal: bool, device: str, json_path: Path | None, **options: Any) -> None:
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

    from lingbot_kernels.commands.session import BenchRun, bench_device

    try:
        import diffusers

        from lingbot_kernels.benchmarks.diffusers_wan import WanBench, WanPlan
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    size, window = latent_size(options), window if causal else 0
    plan = take(WanPlan, options, frames=frames, latent_size=size, window_frames=window, sink_frames=sink)
    where, head = bench_device(device), "{gpu} · torch {torch} · diffusers {diffusers}"
    run = BenchRun("diffusers", where, json_path, head, diffusers=diffusers.__version__)
    run.finish(WanBench(plan, where, run.report).run())
