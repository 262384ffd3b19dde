"""`lingbot-kernels bench model`: options of the model bench; `lingbot_kernels.benchmarks.model` measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, list_option, option_group, output_path, require_plots
from lingbot_kernels.commands._options import PRECISIONS
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count, Device, Pixels
from lingbot_kernels.config import PRESETS

_bench = option_group("Bench")
_output = option_group("Output")


@click.command("model", cls=GroupedCommand)
@_bench(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the network, random weights.",
)
@_bench("--layers", type=Count(most=1000), help="Blocks to really run.  [default: all]")
@_bench("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@_bench("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@_bench("--chunks", type=Count(most=10_000), default=6, show_default=True, help="Steady chunks to time.")
@list_option("Bench")(
    "--peer", "peers", item=click.Choice(["flashdreams", "sglang"]), metavar="[NAMES]", is_flag=False,
    flag_value="flashdreams", default="flashdreams", show_default=True,
    help="Engines to run as well, on the same weights: flashdreams, sglang. Alone: flashdreams.",
)  # fmt: skip
@_bench("--no-peer", is_flag=True, help="Run no other engine.")
@_bench("--compile", "compiled", is_flag=True, help="Also a step with torch.compile'd blocks; one GPU.")
@_bench("--camera-cache/--no-camera-cache", default=True, show_default=True, help="Keep the camera modulation.")
@list_option("Bench")(
    "--precision", "precisions", item=click.Choice(PRECISIONS), metavar="NAMES", default="bfloat16", show_default=True,
    help="Of the blocks' products: bfloat16, int8, int8_qk; several are measured one after the other, in one process.",
)  # fmt: skip
@_bench(
    "--prompt-tokens", type=Count(most=512),
    help="Tokens of the prompt, whose padding is then one weighted key; without a peer.  [default: no padding]",
)  # fmt: skip
@_bench("--residual-dtype", type=click.Choice(["bfloat16", "float32"]), help="Of the residual stream.")
@_bench("--gpus", type=Count(most=1024), default=1, show_default=True, help="Share the sequence over so many.")
@_bench("--device", type=Device("cuda", "cuda:N"), default="cuda", show_default=True, help="cuda or cuda:N.")
@_output(
    "--json", "json_path", type=output_path(append=True),
    help="Append the rows here.  [default: bench/results/model-<gpu>.jsonl]",
)  # fmt: skip
@_output("--plot", "plot_path", type=output_path(".png"), help="Write a picture, a PNG.")
@_output(
    "--timeline", "timeline_path", type=output_path(".json"),
    help="Write floor and step, kernel by kernel, as JSON, and print a layer of both.",
)  # fmt: skip
def command(
    preset: str,
    layers: int | None,
    height: int,
    width: int,
    chunks: int,
    peers: tuple[str, ...],
    no_peer: bool,
    compiled: bool,
    camera_cache: bool,
    precisions: tuple[str, ...],
    prompt_tokens: int | None,
    residual_dtype: str | None,
    gpus: int,
    device: str,
    json_path: Path | None,
    plot_path: Path | None,
    timeline_path: Path | None,
) -> None:
    """Measure a full-window rollout against the bare floor: the same products and attention, nothing else.

    \b
    Examples:
      lingbot-kernels bench model
      lingbot-kernels bench model --layers 8 --plot step.png --timeline step.json
      lingbot-kernels bench model --layers 8 --compile --no-peer
      lingbot-kernels bench model --preset lingbot-world-1.3b --height 480
      lingbot-kernels bench model --precision bfloat16 --precision int8
      lingbot-kernels bench model --layers 8 --peer sglang --peer flashdreams
      lingbot-kernels bench model --gpus 4

    Denoise step, context update, chunk, first chunk, where a step's time goes, memory and how busy the GPU is; the
    floor and, where they are installed, other engines on the same weights run in the same process. The gate comes
    first: two layers of this width against float64.
    """
    if plot_path is not None:
        require_plots()

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
    if no_peer or prompt_tokens:
        peers = ()
    plans = [
        ModelPlan(
            preset, layers, (height // 8, width // 8), chunks, peers, camera_cache, residual_dtype,
            timeline_path, compiled, precision, prompt_tokens,
        )
        for precision in precisions
    ]  # fmt: skip
    found = Environment.collect(torch.device("cuda"))
    with blame("--json"):
        file = RowFile(found, "model", json_path, click.echo, format_forward)
    if launch.is_main():
        click.echo(f"{found.gpu} · torch {found.torch} · commit {found.commit}")
    with launch.process_group("cuda") as group:
        where = torch.device("cuda", torch.cuda.current_device())
        report = file.report if launch.is_main() else lambda row: None
        green, timeline_error = True, None
        for plan in plans:
            if group is None:
                bench = ModelBench(plan, where, report, click.echo)
                green &= bench.run()
            else:
                bench = ShardedModelBench(plan, where, report, click.echo)
                green &= bench.run_sharded(group)
            timeline_error = bench.timeline_error
            del bench
            free()
    if not launch.is_main():
        return
    outputs = Outputs()
    outputs.rows(file)
    if timeline_path is not None and timeline_error is not None:
        outputs.failed("--timeline", timeline_path, timeline_error)
    if plot_path is not None:
        from lingbot_kernels.benchmarks.model_plot import plot

        try:
            outputs.write("--plot", plot_path, lambda path: plot(file.rows, path))
        except ValueError as error:
            outputs.failures.append(f"--plot: {error}")
    outputs.finish()
    if not green:
        raise click.exceptions.Exit(1)
