"""`lingbot-kernels quality`: options of the quality bench; `lingbot_kernels.benchmarks.quality` measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, blame, option_group
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count, Name, Number

_quality = option_group("Quality")


@click.command("quality", cls=GroupedCommand)
@_quality("--chunks", type=Count(most=10_000), default=8, show_default=True, help="Chunks of each rollout.")
@_quality("--min-psnr", type=Number(), help="dB that the worst chunk must have: says what to leave out for it.")
@_quality(
    "--leave-out", item=Name(), metavar="NAMES",
    help="Blocks or products that stay as they are: blocks.0,blocks.3.ffn_down.",
)  # fmt: skip
@_quality("--camera-products", is_flag=True, help="Judge the recipe that has the camera's four products in int8 too.")
@_quality(
    "--weights", type=click.Choice(["plain", "loud"]),
    help="Of a preset: plain, or loud as trained networks are. [default: loud]",
)  # fmt: skip
@_options.layers("Of a preset: blocks to really run. [default: all]", _quality)
@_options.residual_dtype("Of the residual stream, in every precision. [default: the network's own]", _quality)
@_quality("--no-camera", is_flag=True, help="Run without camera conditioning.")
@_options.prompt_embeds(_quality)
@_options.session
@_options.report()
@_options.plot("Draw it (needs matplotlib).")
@_options.more_rows("quality", "rollout")
@_options.quiet("Do not say what is under way.")
def command(
    chunks: int, min_psnr: float | None, leave_out: tuple[str, ...], camera_products: bool, weights: str | None,
    layers: int | None, residual_dtype: str | None, no_camera: bool, prompt_embeds: Path | None,
    json_path: Path | None, plot_path: Path | None, rows_path: Path | None, quiet: bool, **options: Any,
) -> None:  # fmt: skip
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

    from lingbot_kernels.benchmarks import plots, quality, tables
    from lingbot_kernels.benchmarks.random_weights import fill_weights
    from lingbot_kernels.commands.session import CameraOptions, append_rows, chosen_backend, make_scene
    from lingbot_kernels.quantization import PRODUCTS, Int8Recipe

    scene = make_scene(session, chunks, CameraOptions(no_camera=no_camera), prompt_embeds, num_layers=layers)
    with blame("--leave-out/--camera-products"):
        recipe = Int8Recipe(products=PRODUCTS if camera_products else PRODUCTS[:-1], leave_out=leave_out)
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
    tables.print_quality(tables.console(), report)
    outputs = Outputs()
    outputs.write_json("--json", json_path, report)
    outputs.write("--plot", plot_path, lambda file: plots.quality(report, file))
    append_rows(outputs, "quality", rows_path, scene.model.device, quality.bench_rows(report))
    outputs.finish(report["good"])
