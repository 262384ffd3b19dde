"""`lingbot-kernels bench diffusers`: options of the diffusers bench; `lingbot_kernels.benchmarks.diffusers_wan`
measures."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("diffusers")
@click.option("--preset", default="lingbot-world-14b", show_default=True, help="Shape of the network, random weights.")
@click.option("--layers", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks to really run.")
@click.option("--frames", type=click.IntRange(min=1), default=3, show_default=True, help="Latent frames of the input.")
@click.option("--height", type=click.IntRange(min=16), default=464, show_default=True, help="Pixels of the video.")
@click.option("--width", type=click.IntRange(min=16), default=832, show_default=True, help="Pixels of the video.")
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
    import torch

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.rows import Row, append_rows, default_path
    from lingbot_kernels.commands.session import pick_device
    from lingbot_kernels.config import PRESETS

    if preset not in PRESETS:
        raise click.BadParameter(f"no {preset!r}; there are {', '.join(PRESETS)}.", param_hint="--preset")
    if height % 16 or width % 16:
        raise click.BadParameter(f"{height} x {width} must be multiples of 16.", param_hint="--height, --width")
    window, sink = 18, 3
    if causal and frames > window - sink:
        raise click.BadParameter(
            f"{frames} must be at most {window - sink} for the causal rollout; or add --no-causal.",
            param_hint="--frames",
        )
    try:
        from lingbot_kernels.benchmarks.diffusers_wan import WanBench, WanPlan
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    where = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", where.index or 0)
        torch.cuda.set_device(where)
    size = (height // 8, width // 8)
    plan = WanPlan(preset, layers, frames, size, rounds, compiled, window if causal else 0, sink)
    environment = Environment.collect(where)
    path = json_path or default_path(environment, "diffusers")
    import diffusers

    click.echo(f"{environment.gpu} · torch {environment.torch} · diffusers {diffusers.__version__}")
    count = 0

    def report(row: Row) -> None:
        nonlocal count
        count += 1
        append_rows(path, [{**row.to_json(environment), "diffusers": diffusers.__version__}])
        time = "" if row.p50_us is None else f"{row.p50_us / 1e3:10.3f} ms"
        ratio = "" if row.ratio is None else f"{row.ratio:7.4f}"
        click.echo(f"{row.backend:26} {time:>13} {ratio:>8}  {row.gate}  {row.note}".rstrip())

    green = WanBench(plan, where, report).run()
    click.echo(f"{count} rows appended to {path}")
    if not green:
        raise click.exceptions.Exit(1)
