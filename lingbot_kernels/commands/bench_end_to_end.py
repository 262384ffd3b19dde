"""`lingbot-kernels bench end-to-end`: options; `lingbot_kernels.benchmarks.end_to_end` and `decoder` measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, option_group, output_path
from lingbot_kernels.commands._options import PRECISIONS
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count, Device, Pixels
from lingbot_kernels.config import PRESETS

_bench = option_group("Bench")
_output = option_group("Output")


@click.command("end-to-end", cls=GroupedCommand)
@_bench(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the transformer, random weights. With tiny, the VAE is small too.",
)
@_bench("--layers", type=Count(most=1000), help="Transformer blocks to really run.  [default: all]")
@_bench("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@_bench("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@_bench("--chunks", type=Count(), default=100, show_default=True, help="Steady chunks to time.")
@_bench(
    "--context",
    type=click.Choice(("after", "beside", "both")),
    default="both",
    show_default=True,
    help="Whether a chunk's context update runs after its decoder or beside it.",
)
@_bench(
    "--precision", type=click.Choice(PRECISIONS), default="bfloat16", show_default=True, help="Of the blocks' products."
)
@_bench("--decoder-only", is_flag=True, help="The decoder alone, beside diffusers'.")
@_bench("--no-decoder", is_flag=True, help="Leave out the decoder alone.")
@_bench("--gpus", type=Count(most=1024), default=1, show_default=True, help="Ranks that share a session.")
@_bench("--device", type=Device(), default="auto", show_default=True, help="auto, cuda, cuda:N or cpu, for one rank.")
@_output(
    "--json", "json_path", type=output_path(append=True),
    help="Append the rows here.  [default: bench/results/end_to_end-<gpu>.jsonl]",
)  # fmt: skip
def command(
    preset: str,
    layers: int | None,
    height: int,
    width: int,
    chunks: int,
    context: str,
    precision: str,
    decoder_only: bool,
    no_decoder: bool,
    gpus: int,
    device: str,
    json_path: Path | None,
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

    import torch

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.rows import RowFile, format_forward
    from lingbot_kernels.commands.session import bench_device
    from lingbot_kernels.parallel import launch

    if gpus > 1 and not launch.launched():
        if torch.cuda.device_count() < gpus:
            raise click.BadParameter(f"{gpus}, but torch sees {torch.cuda.device_count()}.", param_hint="--gpus")
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        raise click.exceptions.Exit(subprocess.call([*program, "-m", "lingbot_kernels", *sys.argv[1:]]))
    try:
        from lingbot_kernels.benchmarks.decoder import DecoderBench, DecoderPlan
        from lingbot_kernels.benchmarks.end_to_end import EndToEndBench, EndToEndPlan
        from lingbot_kernels.components.random_parts import REAL_VAE, TINY_VAE
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install 'lingbot-kernels[pipeline]'") from error
    size, base_dim = (height // 8, width // 8), TINY_VAE if preset == "tiny" else REAL_VAE
    with launch.process_group(device if device in ("cpu", "cuda") else "auto") as group:
        if group is None:
            where = bench_device(device)
        else:
            on_gpu = torch.cuda.is_available() and device != "cpu"
            where = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        found = Environment.collect(where)
        say = click.echo if launch.is_main() else lambda text: None
        with blame("--json"):
            file = RowFile(found, "end_to_end", json_path, say, format_forward)
        report = file.report if launch.is_main() else lambda row: None
        say(f"{found.gpu} · torch {found.torch} · commit {found.commit}")
        if decoder_only:
            green = DecoderBench(DecoderPlan(size, base_dim), where, report).run()
        else:
            orders = ("after", "beside") if context == "both" else (context,)
            plan = EndToEndPlan(preset, layers, size, chunks, orders, base_dim, not no_decoder, precision)
            green = EndToEndBench(plan, where, report, group).run()
    if launch.is_main():
        outputs = Outputs()
        outputs.rows(file)
        outputs.finish()
        if not green:
            raise click.exceptions.Exit(1)
