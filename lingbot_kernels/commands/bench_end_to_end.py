"""`lingbot-kernels bench end-to-end`: options; `lingbot_kernels.benchmarks.end_to_end` and `decoder` measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from lingbot_kernels.commands._options import PRECISIONS, Pixels
from lingbot_kernels.config import PRESETS


@click.command("end-to-end")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="lingbot-world-14b",
    show_default=True,
    help="Shape of the transformer, random weights. With tiny, the VAE is small too.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Transformer blocks to really run.  [default: all]")
@click.option("--height", type=Pixels(), default=464, show_default=True, help="Pixels of the video.")
@click.option("--width", type=Pixels(), default=832, show_default=True, help="Pixels of the video.")
@click.option("--chunks", type=click.IntRange(min=1), default=100, show_default=True, help="Steady chunks to time.")
@click.option(
    "--context",
    type=click.Choice(("after", "beside", "both")),
    default="both",
    show_default=True,
    help="Whether a chunk's context update runs after its decoder or beside it.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="bfloat16", show_default=True, help="Of the blocks' products."
)
@click.option("--decoder-only", is_flag=True, help="The decoder alone, beside diffusers'.")
@click.option("--no-decoder", is_flag=True, help="Leave out the decoder alone.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks that share a session.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N or cpu, for one rank.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
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

    decode_chunk: the streaming decoder beside diffusers' own in one process; its gate, 60 dB against float32 and the
    same bits however the stream is cut, comes first. key_to_frame: pressed while chunks follow each other without a
    pause, and pressed at rest. frames_per_second: over all chunks, with the shares of the transformer and the decoder.

    \b
    Examples:
      lingbot-kernels bench end-to-end --decoder-only
      lingbot-kernels bench end-to-end --chunks 100
      lingbot-kernels bench end-to-end --gpus 2 --precision int8 --context beside --no-decoder
      lingbot-kernels bench end-to-end --preset tiny --height 64 --width 96 --chunks 4 --device cpu
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
        file.close()
        if not green:
            raise click.exceptions.Exit(1)
