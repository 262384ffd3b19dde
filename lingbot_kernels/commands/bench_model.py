"""`lingbot-kernels bench model`: options of the model bench; `lingbot_kernels.benchmarks.model` measures."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import PRECISIONS, latent_size, take
from lingbot_kernels.commands._outputs import OutputPath
from lingbot_kernels.commands._types import Count

_bench = option_group("Bench")
_output = option_group("Output")


@click.command("model", cls=GroupedCommand)
@_options.preset()
@_options.layers("Blocks to really run.  [default: all]")
@_options.size
@_bench("--chunks", type=Count(most=10_000), default=6, show_default=True, help="Steady chunks to time.")
@_bench(
    "--peer", "peers", item=click.Choice(["flashdreams", "sglang"]), metavar="[NAMES]", is_flag=False,
    flag_value="flashdreams", default="flashdreams", show_default=True,
    help="Engines to run as well, on the same weights: flashdreams, sglang. Alone: flashdreams.",
)  # fmt: skip
@_bench("--no-peer", is_flag=True, help="Run no other engine.")
@_bench("--compile", "compiled", is_flag=True, help="Also a step with torch.compile'd blocks; one GPU.")
@_bench("--camera-cache/--no-camera-cache", default=True, show_default=True, help="Keep the camera modulation.")
@_bench(
    "--precision", "precisions", item=click.Choice(PRECISIONS), metavar="NAMES", default="bfloat16", show_default=True,
    help="Of the blocks' products: bfloat16, int8, int8_qk; several are measured one after the other, in one process.",
)  # fmt: skip
@_bench(
    "--prompt-tokens", type=Count(most=512),
    help="Tokens of the prompt, whose padding is then one weighted key; without a peer.  [default: no padding]",
)  # fmt: skip
@_options.residual_dtype("Of the residual stream.")
@_options.gpus("Share the sequence over so many.")
@_options.device("cuda or cuda:N.", "cuda", "cuda:N")
@_options.rows("model")
@_options.plot()
@_output(
    "--timeline", "timeline_path", type=OutputPath(".json"),
    help="Write floor and step, kernel by kernel, as JSON, and print a layer of both.",
)  # fmt: skip
def command(
    peers: tuple[str, ...], no_peer: bool, precisions: tuple[str, ...], gpus: int, device: str, json_path: Path | None,
    plot_path: Path | None, **options: Any,
) -> None:  # fmt: skip
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
    import torch

    from lingbot_kernels.commands.session import BenchRun, start_ranks
    from lingbot_kernels.parallel import launch

    start_ranks(gpus)

    from lingbot_kernels.benchmarks import plots
    from lingbot_kernels.benchmarks.model import ModelBench, ModelPlan
    from lingbot_kernels.benchmarks.model_sharded import ShardedModelBench
    from lingbot_kernels.benchmarks.timing import free

    plan = take(
        ModelPlan, options, latent_size=latent_size(options), peers=() if no_peer or options["prompt_tokens"] else peers
    )
    if gpus > 1 and plan.compiled:
        raise click.BadParameter(f"is of one GPU, not of {gpus}.", param_hint="--compile")
    if plan.timeline_path is not None and len(precisions) > 1:
        raise click.UsageError("--timeline is of one precision.")
    if not torch.cuda.is_available():
        raise click.ClickException("bench model needs a CUDA device, and torch sees none")
    if not launch.launched():
        torch.cuda.set_device(torch.device(device).index or 0)
    run, green, timeline_error = BenchRun("model", torch.device("cuda"), json_path), True, None
    with launch.process_group("cuda") as group:
        where = torch.device("cuda", torch.cuda.current_device())
        make = ModelBench if group is None else functools.partial(ShardedModelBench, group=group)
        for precision in precisions:
            bench = make(dataclasses.replace(plan, precision=precision), where, run.report, run.say)
            green &= bench.run()
            timeline_error = bench.timeline_error
            del bench
            free()
    run.close()
    if plan.timeline_path is not None and timeline_error is not None:
        run.failed("--timeline", plan.timeline_path, timeline_error)
    run.write("--plot", plot_path if launch.is_main() else None, lambda path: plots.model_step(run.file.rows, path))
    run.finish(green)
