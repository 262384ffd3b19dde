"""`lingbot-kernels bench caching`: options of the caching bench; `lingbot_kernels.benchmarks.caching` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import SessionOptions, take
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Count

_bench = option_group("Bench")


@click.command("caching", cls=GroupedCommand)
@_bench("--chunks", type=Count(2), default=12, show_default=True, help="Chunks of each rollout.")
@_bench("--repeats", type=Count(most=1000), default=3, show_default=True, help="Rollouts of each variant.")
@_bench(
    "--interleave", type=click.Choice(["auto", "chunk", "rollout"]), default="auto", show_default=True,
    help="What alternates between variants; auto: chunks, where all sessions fit in three quarters of the free memory.",
)  # fmt: skip
@_bench(
    "--cuda-graphs/--no-cuda-graphs", default=True, show_default=True,
    help="Replay graphs where a variant can: without some caches none can.",
)  # fmt: skip
@_options.layers("Blocks to really run; nothing is extrapolated. [default: all]")
@_options.session
@_options.report()
@_options.more_rows("caching", "switch")
def command(layers: int | None, json_path: Path | None, rows_path: Path | None, **options: Any) -> None:
    """Measure what each cache of a session is worth.

    \b
    Examples:
      lingbot-kernels bench caching
      lingbot-kernels bench caching --preset lingbot-world-14b --layers 8 --height 464 --chunks 16 --repeats 1

    The same rollout runs with each of the RoPE, time-embedding, camera and text K/V caches switched off, with a full
    forward at t = 0 in place of the context update's `update_cache_only`, and with all of it off. The latents must be
    the same, bit for bit: if not, the exit code is 1. Variants alternate and their order rotates, so that all of them
    meet the same machine; a saving is the median of the differences within the same chunk.
    """
    session = SessionOptions.take(options)
    if layers is not None and session.checkpoint is not None:
        raise click.UsageError("--layers and --checkpoint exclude each other: a checkpoint has its own layers.")

    from lingbot_kernels.benchmarks import caching, tables
    from lingbot_kernels.commands.session import append_rows, chosen_backend, make_scene

    plan = take(caching.CachingPlan, options)
    scene = make_scene(session, plan.chunks, num_layers=layers)
    with chosen_backend(session.backend, scene.model):
        report = caching.measure(scene, plan)
    tables.print_caching(tables.console(), report)
    outputs = Outputs()
    outputs.write_json("--json", json_path, report)
    append_rows(outputs, "caching", rows_path, scene.model.device, caching.bench_rows(report))
    differing = [row["off"] for row in report["rows"] if not row["bit_identical"]]
    if differing:
        outputs.failures.insert(0, f"the latents differ without: {', '.join(map(str, differing))}")
    outputs.finish()
