"""`lingbot-kernels cases`: the CI case parser, with all arguments its own."""

from __future__ import annotations

import click

from lingbot_kernels.commands._click import Passthrough


@click.command("cases", cls=Passthrough)
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """List the CI cases of a diffusion test suite."""
    from lingbot_kernels.tools.diffusion_case_parser import main

    ctx.exit(main(list(arguments)))
