"""`lingbot-kernels bench end-to-end`: options; `lingbot_kernels.benchmarks.end_to_end` and `decoder` measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import PRECISIONS, latent_size, take
from lingbot_kernels.commands._types import Count

_bench = option_group("Bench")


@click.command("end-to-end", cls=GroupedCommand)
@_options.preset("Shape of the transformer, random weights. With tiny, the VAE is small too.")
@_options.layers("Transformer blocks to really run.  [default: all]")
@_options.size
@_bench("--chunks", type=Count(), default=100, show_default=True, help="Steady chunks to time.")
@_bench(
    "--context", type=click.Choice(("after", "beside", "both")), default="both", show_default=True,
    help="Whether a chunk's context update runs after its decoder or beside it.",
)  # fmt: skip
@_bench(
    "--precision", type=click.Choice(PRECISIONS), default="bfloat16", show_default=True, help="Of the blocks' products."
)
@_bench("--decoder-only", is_flag=True, help="The decoder alone, beside diffusers'.")
@_bench("--no-decoder", is_flag=True, help="Leave out the decoder alone.")
@_options.gpus("Ranks that share a session.")
@_options.device("auto, cuda, cuda:N or cpu, for one rank.")
@_options.rows("end_to_end")
def command(
    context: str, decoder_only: bool, no_decoder: bool, gpus: int, device: str, json_path: Path | None, **options: Any
) -> None:
    """Measure what a player waits for: from a key press to a frame in host memory, and frames a second sustained.

    \b
    Examples:
      lingbot-kernels bench end-to-end --decoder-only
      lingbot-kernels bench end-to-end --chunks 100
      lingbot-kernels bench end-to-end --gpus 2 --precision int8 --context beside --no-decoder
      lingbot-kernels bench end-to-end --preset tiny --height 64 --width 96 --chunks 4 --device cpu

    decode_chunk: the streaming decoder beside diffusers' own in one process; its gate, 60 dB against float32 and the
    same bits however the stream is cut, comes first. key_to_frame: pressed while chunks follow each other without a
    pause, and pressed at rest. frames_per_second: over all chunks, with the shares of the transformer and the decoder.
    """
    if decoder_only and no_decoder:
        raise click.UsageError("--decoder-only and --no-decoder exclude each other.")

    from lingbot_kernels.commands.session import BenchRun, bench_device, rank_device, start_ranks
    from lingbot_kernels.parallel import launch

    start_ranks(gpus)
    try:
        from lingbot_kernels.benchmarks.decoder import DecoderBench, DecoderPlan
        from lingbot_kernels.benchmarks.end_to_end import EndToEndBench, EndToEndPlan
        from lingbot_kernels.components.random_parts import REAL_VAE, TINY_VAE
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'lingbot-kernels[pipeline]'") from error
    orders = ("after", "beside") if context == "both" else (context,)
    plan = take(
        EndToEndPlan, options, latent_size=latent_size(options), orders=orders, decoder=not no_decoder,
        base_dim=TINY_VAE if options["preset"] == "tiny" else REAL_VAE,
    )  # fmt: skip
    with launch.process_group(device if device in ("cpu", "cuda") else "auto") as group:
        where = bench_device(device) if group is None else rank_device(device)
        run = BenchRun("end_to_end", where, json_path)
        if decoder_only:
            green = DecoderBench(DecoderPlan(plan.latent_size, plan.base_dim), where, run.report).run()
        else:
            green = EndToEndBench(plan, where, run.report, group).run()
    run.finish(green)
