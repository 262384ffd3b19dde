"""`lingbot-kernels quality`: options of the quality bench; `lingbot_kernels.benchmarks.quality` measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands._click import GroupedCommand, list_option, option_group, output_path, require_plots
from lingbot_kernels.commands._options import SessionOptions, session_options
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count, Name, Number

_quality = option_group("Quality")
_output = option_group("Output")


@click.command("quality", cls=GroupedCommand)
@_quality("--chunks", type=Count(most=10_000), default=8, show_default=True, help="Chunks of each rollout.")
@_quality("--min-psnr", type=Number(), help="dB that the worst chunk must have: says what to leave out for it.")
@list_option("Quality")(
    "--leave-out",
    item=Name(),
    metavar="NAMES",
    help="Blocks or products that stay as they are: blocks.0,blocks.3.ffn_down.",
)
@_quality("--camera-products", is_flag=True, help="Judge the recipe that has the camera's four products in int8 too.")
@_quality(
    "--weights",
    type=click.Choice(["plain", "loud"]),
    help="Of a preset: plain, or loud as trained networks are. [default: loud]",
)
@_quality("--layers", type=Count(most=1000), help="Of a preset: blocks to really run. [default: all]")
@_quality(
    "--residual-dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="Of the residual stream, in every precision. [default: the network's own]",
)
@_quality("--no-camera", is_flag=True, help="Run without camera conditioning.")
@_quality(
    "--prompt-embeds",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=".safetensors or .npy [L, text_dim]. [default: seeded noise]",
)
@session_options
@_output("--json", "json_path", type=output_path(), help="Write the report.")
@_output("--plot", "plot_path", type=output_path(".png"), help="Draw it (needs matplotlib).")
@_output(
    "--rows",
    "rows_path",
    type=output_path(".jsonl", append=True),
    help="Append a row for each rollout. [default: bench/results/quality-<gpu>.jsonl on a GPU, else none]",
)
@_output("--quiet", is_flag=True, help="Do not say what is under way.")
def command(
    chunks: int,
    min_psnr: float | None,
    leave_out: tuple[str, ...],
    camera_products: bool,
    weights: str | None,
    layers: int | None,
    residual_dtype: str | None,
    no_camera: bool,
    prompt_embeds: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
    rows_path: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Say what int8 costs a network, and whether to use it.

    \b
    Examples:
      lingbot-kernels quality --preset tiny
      lingbot-kernels quality --checkpoint LingBot-World --min-psnr 45 --json quality.json --plot quality.png
      lingbot-kernels quality --preset lingbot-world-14b --layers 4 --height 464 --weights plain

    A float32 rollout comes first. Then every chunk is denoised again after its clean chunks, in the network's own
    dtype, in int8, in int8 without the rotation and in fp8, and compared with it: PSNR of the latents per chunk. Two
    rollouts go on from their own chunks, which shows drift. Each product and each block alone in int8 says where the
    error comes from. The exit code is 1 where int8 is advised against.
    """
    session = SessionOptions.take(options)
    if session.checkpoint is not None and (weights is not None or layers is not None):
        raise click.UsageError("--checkpoint has its own weights and layers: --weights and --layers are of a preset.")
    session = dataclasses.replace(session, dtype=session.dtype or "bfloat16", precision="bfloat16")

    from rich.console import Console

    from lingbot_kernels.benchmarks import quality, quality_report, tables
    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.random_weights import fill_weights
    from lingbot_kernels.benchmarks.rows import default_path
    from lingbot_kernels.commands._click import blame
    from lingbot_kernels.commands.session import CameraOptions, chosen_backend, make_scene
    from lingbot_kernels.quantization import PRODUCTS, Int8Recipe

    if plot_path is not None:
        require_plots()
    scene = make_scene(session, chunks, CameraOptions(no_camera=no_camera), prompt_embeds, num_layers=layers)
    with blame("--leave-out/--camera-products"):
        recipe = Int8Recipe(
            products=PRODUCTS if camera_products else PRODUCTS[:-1],
            leave_out=leave_out,
        )
        recipe.check(scene.model.config.num_layers, scene.model.config.camera)
    if residual_dtype is not None:
        scene.model.config = dataclasses.replace(scene.model.config, residual_dtype=residual_dtype)
    kind = "checkpoint"
    if session.checkpoint is None:
        kind = weights or "loud"
        fill_weights(scene.model, kind, session.seed)
    notes = Console(stderr=True, quiet=quiet, soft_wrap=True)
    plan = quality.QualityPlan(kind, recipe, chunks, min_psnr)
    with chosen_backend(session.backend, scene.model):
        bench = quality.QualityBench(scene, plan, lambda text: notes.print(f"... {text}", highlight=False))
        report = bench.run()
    quality_report.print_quality(tables.console(), report)
    outputs = Outputs()
    outputs.write_json("--json", json_path, report)
    outputs.write("--plot", plot_path, lambda file: quality_report.plot(report, file))
    environment = Environment.collect(scene.model.device)
    path = rows_path or (default_path(environment, "quality") if scene.model.device.type == "cuda" else None)
    if path is not None:
        fresh = [{**row, **dataclasses.asdict(environment)} for row in quality.bench_rows(report)]
        outputs.append_rows("--rows", path, fresh)
    outputs.finish()
    if not report["good"]:
        raise click.exceptions.Exit(1)
