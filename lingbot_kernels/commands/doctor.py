"""`lingbot-kernels doctor`: the environment, every op's backend here, and why the others can't serve."""

from __future__ import annotations

import json

import click

from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import DTYPES

_output = option_group("Output")
_question = option_group("What to ask about")


@click.command("doctor", cls=GroupedCommand)
@_question("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Dtype of the tensors.")
@_output("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(dtype: str, as_json: bool) -> None:
    """Say what this machine has, which backend serves each op, and why the others can't.

    \b
    Examples:
      lingbot-kernels doctor
      lingbot-kernels doctor --dtype float32 --json

    The choice is that of `auto` (or of LINGBOT_KERNELS_BACKEND) at the 14B model's shapes, for CPU tensors, and for
    CUDA tensors where there is a GPU. The JSON object has environment, dtype, requested (the backend asked for) and
    ops: device type -> op -> backend, error, others (backend -> the reason why it can't serve, or null).
    """
    import torch

    from lingbot_kernels.benchmarks import backends, environment, tables
    from lingbot_kernels.commands._click import blame
    from lingbot_kernels.ops._dispatch import requested_backend

    with blame("LINGBOT_KERNELS_BACKEND"):
        requested = requested_backend()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    report = {
        "environment": environment.collect(),
        "dtype": dtype,
        "requested": requested,
        "ops": {device: backends.survey(device, getattr(torch, dtype)) for device in devices},
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        tables.print_doctor(tables.console(), report)
