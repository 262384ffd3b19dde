"""`lingbot-kernels bench model`: options of the model bench; `lingbot_kernels.benchmarks.model` measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from lingbot_kernels.commands._click import output_path
from lingbot_kernels.commands._options import PRECISIONS, Pixels
from lingbot_kernels.config import PRESETS


@click.command("model")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the network, random weights.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Blocks to really run.  [default: all]")
@click.option("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@click.option("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@click.option("--chunks", type=click.IntRange(min=1), default=6, show_default=True, help="Steady chunks to time.")
@click.option("--peer/--no-peer", default=True, show_default=True, help="Run FlashDreams' network as well.")
@click.option("--compile", "compiled", is_flag=True, help="Also a step with torch.compile'd blocks; one GPU.")
@click.option("--camera-cache/--no-camera-cache", default=True, show_default=True, help="Keep the camera modulation.")
@click.option(
    "--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True, default=("bfloat16",), show_default=True,
    help="Of the blocks' products; several are measured one after the other, in one process.",
)  # fmt: skip
@click.option("--residual-dtype", type=click.Choice(["bfloat16", "float32"]), help="Of the residual stream.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Share the sequence over so many."
)
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
    help="Append the rows here.  [default: bench/results/model-<gpu>.jsonl]",
)  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture, a PNG.")
@click.option(
    "--timeline", "timeline_path", type=output_path(".json"),
    help="Write floor and step, kernel by kernel, as JSON, and print a layer of both.",
)  # fmt: skip
def command(
    preset: str,
    layers: int | None,
    height: int,
    width: int,
    chunks: int,
    peer: bool,
    compiled: bool,
    camera_cache: bool,
    precisions: tuple[str, ...],
    residual_dtype: str | None,
    gpus: int,
    device: str,
    json_path: Path | None,
    plot_path: Path | None,
    timeline_path: Path | None,
) -> None:
    """Measure a full-window rollout against the bare floor: the same products and attention, nothing else.

    Denoise step, context update, chunk, first chunk, where a step's time goes, memory and how busy the GPU is; the
    floor and, where it is installed, FlashDreams' network on the same weights run in the same process. The gate comes
    first: two layers of this width against float64.

    \b
    Examples:
      lingbot-kernels bench model
      lingbot-kernels bench model --layers 8 --plot step.png --timeline step.json
      lingbot-kernels bench model --layers 8 --compile --no-peer
      lingbot-kernels bench model --preset lingbot-world-1.3b --height 480
      lingbot-kernels bench model --precision bfloat16 --precision int8
      lingbot-kernels bench model --gpus 4
    """
    import torch

    from lingbot_kernels.parallel import launch

    if gpus > 1 and not launch.launched():
        if torch.cuda.device_count() < gpus:
            raise click.BadParameter(f"{gpus}, but torch sees {torch.cuda.device_count()}.", param_hint="--gpus")
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        raise click.exceptions.Exit(subprocess.call([*program, "-m", "lingbot_kernels", *sys.argv[1:]]))

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.model import ModelBench, ModelPlan, free
    from lingbot_kernels.benchmarks.model_sharded import ShardedModelBench
    from lingbot_kernels.benchmarks.rows import RowFile, format_forward

    if gpus > 1 and compiled:
        raise click.BadParameter(f"is of one GPU, not of {gpus}.", param_hint="--compile")
    if timeline_path is not None and len(precisions) > 1:
        raise click.UsageError("--timeline is of one precision.")
    if not torch.cuda.is_available():
        raise click.ClickException("bench model needs a CUDA device, and torch sees none")
    if not launch.launched():
        torch.cuda.set_device(torch.device(device).index or 0)
    plans = [
        ModelPlan(
            preset, layers, (height // 8, width // 8), chunks, peer, camera_cache, residual_dtype, timeline_path,
            compiled, precision,
        )
        for precision in precisions
    ]  # fmt: skip
    found = Environment.collect(torch.device("cuda"))
    file = RowFile(found, "model", json_path, click.echo, format_forward)
    if launch.is_main():
        click.echo(f"{found.gpu} · torch {found.torch} · commit {found.commit}")
    with launch.process_group("cuda") as group:
        where = torch.device("cuda", torch.cuda.current_device())
        report = file.report if launch.is_main() else lambda row: None
        green = True
        for plan in plans:
            if group is None:
                green &= ModelBench(plan, where, report, click.echo).run()
            else:
                green &= ShardedModelBench(plan, where, report, click.echo).run_sharded(group)
            free()
    if not launch.is_main():
        return
    file.close()
    if plot_path is not None:
        from lingbot_kernels.benchmarks.model_plot import plot

        plot(file.rows, plot_path)
        click.echo(f"plot: {plot_path}")
    if not green:
        raise click.exceptions.Exit(1)
