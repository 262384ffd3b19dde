"""`lingbot-kernels doctor`: the environment, every op's backend here, and why the others can't serve."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import DTYPES

_output = option_group("Output")
_question = option_group("What to ask about")


@click.command("doctor", cls=GroupedCommand)
@_question("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Dtype of the tensors.")
@_question(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also of this folder: its precision, and the memory that it takes.",
)
@_output("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(dtype: str, checkpoint: Path | None, as_json: bool) -> None:
    """Say what this machine has, which backend serves each op, and why the others can't.

    \b
    Examples:
      lingbot-kernels doctor
      lingbot-kernels doctor --dtype float32 --json
      lingbot-kernels doctor --checkpoint LingBot-World

    The choice is that of `auto` (or of LINGBOT_KERNELS_BACKEND) at the 14B model's shapes, for CPU tensors, and for
    CUDA tensors where there is a GPU. Then what the networks take, in that dtype and in int8. The JSON object has
    environment, dtype, requested (the backend asked for), ops: device type -> op -> backend, error, others (backend ->
    the reason why it can't serve, or null), and networks: name -> precision, int8_attention, int8_products, left_out,
    weights and session (bytes).
    """
    import torch

    from lingbot_kernels.benchmarks import backends, environment, tables
    from lingbot_kernels.commands._click import blame
    from lingbot_kernels.ops._dispatch import requested_backend

    with blame("LINGBOT_KERNELS_BACKEND"):
        requested = requested_backend()
    with blame("--checkpoint"):
        networks = backends.networks(getattr(torch, dtype), checkpoint)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    report = {
        "environment": environment.collect(),
        "dtype": dtype,
        "requested": requested,
        "ops": {device: backends.survey(device, getattr(torch, dtype)) for device in devices},
        "networks": networks,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        tables.print_doctor(tables.console(), report)
