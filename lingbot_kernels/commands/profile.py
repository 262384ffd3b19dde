"""`lingbot-kernels profile`: options of a profiled rollout or op; `profiling` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands._click import GroupedCommand, option_group, output_path
from lingbot_kernels.commands._options import SessionOptions, session_options

_profile = option_group("Profile")
_output = option_group("Output")


@click.command("profile", cls=GroupedCommand)
@click.argument("what", type=click.Choice(["rollout", "op"]))
@click.argument("name", required=False)
@_profile("--case", help="Of an op: a shape of `bench kernels`, such as s4524-d5120.  [default: the device's]")
@_profile("--calls", type=click.IntRange(min=1), default=20, show_default=True, help="Of an op.")
@_profile("--chunks", type=click.IntRange(min=1), default=1, show_default=True, help="Steady chunks of a rollout.")
@_profile("--no-camera", is_flag=True, help="Of a rollout: without camera conditioning.")
@_profile("--nsys/--no-nsys", default=None, help="Also run under Nsight Systems.  [default: on CUDA, where nsys is]")
@_profile("--under-nsys", is_flag=True, hidden=True, help="The run that nsys records.")
@session_options
@_output(
    "--trace", "trace_path", type=output_path(".json"), default="profile-trace.json", show_default=True,
    help="Write the trace, for chrome://tracing or ui.perfetto.dev; nsys writes next to it.",
)  # fmt: skip
@_output("--json", "json_path", type=output_path(), help="Write the table's figures.")
@_output("--plot", "plot_path", type=output_path(".png"), help="Draw them (needs matplotlib).")
def command(
    what: str,
    name: str | None,
    case: str | None,
    calls: int,
    chunks: int,
    no_camera: bool,
    nsys: bool | None,
    under_nsys: bool,
    trace_path: Path,
    json_path: Path | None,
    plot_path: Path | None,
    **options: Any,
) -> None:
    """Where the time of a steady chunk, or of one op, goes: a trace and a table.

    A rollout first fills its window. Then its ranges (chunk, step, block, phase, op) are recorded by torch.profiler:
    time of each phase, launches a block, how much of the time the GPU idles, bytes and TB/s of each op. Ranges inside a
    replayed CUDA graph can't be seen, so the recorded chunks launch every kernel; the share in which the GPU idles is
    measured with graphs as well.

    \b
    Examples:
      lingbot-kernels profile rollout --preset tiny --trace trace.json --plot profile.png
      lingbot-kernels profile rollout --preset lingbot-world-14b --height 464 --json profile.json
      lingbot-kernels profile op qk_norm_rope_kv_write --calls 50
    """
    session = SessionOptions.take(options)
    if (what == "op") != (name is not None):
        raise click.UsageError("profile op needs the op's name, and profile rollout takes none.")

    from lingbot_kernels.commands import profiling

    profiling.run(
        profiling.ProfileOptions(
            session, what, name, case, calls, chunks, no_camera, nsys, under_nsys, trace_path, json_path, plot_path
        )
    )
