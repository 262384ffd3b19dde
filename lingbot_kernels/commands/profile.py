"""`lingbot-kernels profile`: options of a profiled rollout or op; `lingbot_kernels.benchmarks.profiling` measures."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, blame, option_group
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands._outputs import OutputPath, Outputs
from lingbot_kernels.commands._types import Count, Name

if TYPE_CHECKING:
    import torch

    from lingbot_kernels.benchmarks.profiling import Subject

_profile = option_group("Profile")
_output = option_group("Output")


@click.command("profile", cls=GroupedCommand)
@click.argument("what", type=click.Choice(["rollout", "op"]))
@click.argument("name", required=False)
@_profile(
    "--case", type=Name(), metavar="NAME",
    help="Of an op: a shape of `bench kernels`, such as s4524-d5120.  [default: the device's]",
)  # fmt: skip
@_profile("--calls", type=Count(), default=20, show_default=True, help="Of an op.")
@_profile("--chunks", type=Count(most=1000), default=1, show_default=True, help="Steady chunks of a rollout.")
@_profile("--no-camera", is_flag=True, help="Of a rollout: without camera conditioning.")
@_profile("--nsys/--no-nsys", default=None, help="Also run under Nsight Systems.  [default: on CUDA, where nsys is]")
@_profile("--under-nsys", is_flag=True, hidden=True, help="The run that nsys records.")
@_options.session
@_output(
    "--trace", "trace_path", type=OutputPath(".json"), default="profile-trace.json", show_default=True,
    help="Write the trace, for chrome://tracing or ui.perfetto.dev; nsys writes next to it.",
)  # fmt: skip
@_options.report("Write the table's figures.")
@_options.plot("Draw them (needs matplotlib).")
def command(
    what: str, name: str | None, case: str | None, calls: int, chunks: int, no_camera: bool, nsys: bool | None,
    under_nsys: bool, trace_path: Path, json_path: Path | None, plot_path: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Where the time of a steady chunk, or of one op, goes: a trace and a table.

    \b
    Examples:
      lingbot-kernels profile rollout --preset tiny --trace trace.json --plot profile.png
      lingbot-kernels profile rollout --preset lingbot-world-14b --height 464 --json profile.json
      lingbot-kernels profile op qk_norm_rope_kv_write --calls 50

    A rollout first fills its window. Then its ranges (chunk, step, block, phase, op) are recorded by torch.profiler:
    time of each phase, launches per block, how much of the time the GPU idles, bytes and TB/s of each op. Ranges inside
    a replayed CUDA graph can't be seen, so the recorded chunks launch every kernel; the share in which the GPU idles is
    measured with graphs as well.
    """
    session = SessionOptions.take(options)
    if (what == "op") != (name is not None):
        raise click.UsageError("profile op needs the op's name, and profile rollout takes none.")

    from lingbot_kernels.benchmarks import plots, profiling, tables
    from lingbot_kernels.commands.session import CameraOptions, make_scene, pick_device
    from lingbot_kernels.ops import BackendUnavailable, use_backend
    from lingbot_kernels.ops._dispatch import requested_backend

    device = pick_device(session.device)
    nsys_program = _nsys_program(nsys, device) if not under_nsys else None
    with blame("LINGBOT_KERNELS_BACKEND"):
        backend = session.backend or requested_backend()
    with use_backend(backend), blame("--backend", BackendUnavailable):
        if name is None:
            length = functools.partial(profiling.rollout_chunks, chunks=chunks)
            subject = profiling.rollout_subject(make_scene(session, length, CameraOptions(no_camera=no_camera)), chunks)
        else:
            subject = _op(session, name, case, calls, device)
        subject.run()
        if under_nsys:
            profiling.record_for_nsys(subject)
            return
        outputs = Outputs()
        report = profiling.measure(subject, functools.partial(_keep_trace, outputs, trace_path))
    tables.print_profile(tables.console(), report)
    if not outputs.failures:
        click.echo("open the trace in https://ui.perfetto.dev or chrome://tracing")
    outputs.write_json("--json", json_path, report)
    outputs.write("--plot", plot_path, lambda file: plots.profile(report, file))
    if nsys_program is not None:
        output = trace_path.with_suffix(".nsys-rep")
        again = profiling.nsys_command(nsys_program, output, [*sys.argv[1:], "--under-nsys"])
        done = subprocess.run(again, check=False)
        if done.returncode != 0:
            outputs.failures.append(f"nsys ended with exit code {done.returncode}")
        else:
            click.echo(f"nsys: {output}")
    outputs.finish()


def _keep_trace(outputs: Outputs, path: Path, trace: Path) -> None:
    outputs.write("--trace", path, lambda file: shutil.copyfile(trace, file))


def _op(session: SessionOptions, name: str, case: str | None, calls: int, device: torch.device) -> Subject:
    import torch

    from lingbot_kernels.benchmarks.kernel_cases import KERNEL_CASES, default_kernel_cases
    from lingbot_kernels.benchmarks.profiling import op_subject
    from lingbot_kernels.ops._dispatch import OPS

    if name not in OPS:
        raise click.BadParameter(f"no op {name!r}; there are {', '.join(OPS)}.", param_hint="NAME")
    case = case or default_kernel_cases(device.type, quick=True)[0]
    if case not in KERNEL_CASES:
        raise click.BadParameter(f"no case {case!r}; there are {', '.join(KERNEL_CASES)}.", param_hint="--case")
    dtype = getattr(torch, session.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with blame("--case"):
        return op_subject(name, KERNEL_CASES[case], device, dtype, calls, session.seed)


def _nsys_program(wanted: bool | None, device: torch.device) -> str | None:
    """The path of nsys where it is to be run."""
    found = shutil.which("nsys")
    if wanted and (found is None or device.type != "cuda"):
        missing = "nsys is not on PATH" if found is None else f"nsys records CUDA work, and the device is {device}"
        raise click.UsageError(f"--nsys: {missing}.")
    return found if (device.type == "cuda" if wanted is None else wanted) else None
