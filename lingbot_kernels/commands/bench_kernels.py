"""`lingbot-kernels bench kernels`: options of the kernel bench; `lingbot_kernels.benchmarks` measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.kernels import KernelPlan


class NameList(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(name.strip() for name in value.split(","))
        if not all(names):
            self.fail(f"{value!r} is not a list of names separated by commas.", param, ctx)
        return names


def _known(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no {name!r}; there are {', '.join(known)}.", param_hint=option)


@click.command("kernels")
@click.option("--ops", type=NameList(), default=(), help="Ops to measure, separated by commas.  [default: all]")
@click.option("--cases", type=NameList(), default=(), help="Shapes, such as s4524-d5120.  [default: the device's]")
@click.option(
    "--backends",
    type=NameList(),
    default=(),
    help="cuda, triton, cpu, reference; fa4, cudnn, sdpa; auto (linear_gelu).",
)
@click.option("--device", default="auto", show_default=True, help="auto, cuda, cuda:N or cpu.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Measure what people use today as well.")
@click.option("--quick", is_flag=True, help="Two shapes, short samples, no peer that compiles.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
    help="Append the rows here.  [default: bench/results/kernels-<gpu>.jsonl]",
)  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture, a PNG.")
@click.option("--update-winners", is_flag=True, help="Regenerate the table that `auto` goes by, from the file's rows.")
@click.option(
    "--from", "source", type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Measure nothing: plot, or update the winners, from the rows of this file.",
)  # fmt: skip
def command(
    ops: tuple[str, ...],
    cases: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    peers: bool,
    quick: bool,
    json_path: Path | None,
    plot_path: Path | None,
    update_winners: bool,
    source: Path | None,
) -> None:
    """Measure every op and backend against a copy of the same bytes.

    The correctness gate comes first: against float64, with outputs and caches full of NaN. A result that fails it has
    no speed, and the exit code is 1. Times are of CUDA-graph replays over rotated inputs; wall is the host's time of a
    call from Python.

    \b
    Examples:
      lingbot-kernels bench kernels --quick
      lingbot-kernels bench kernels --ops qk_norm_rope_kv_write --json rows.jsonl --plot rows.png
      lingbot-kernels bench kernels --from rows.jsonl --update-winners
    """
    from lingbot_kernels.benchmarks.rows import read_rows

    def read(path: Path, option: str) -> list[dict[str, Any]]:
        try:
            return read_rows(path) if path.exists() else []
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint=option) from error

    if source is not None:
        rows = read(source, "--from")
        _conclude(rows, rows, plot_path, update_winners)
        return
    plan = _plan(ops, cases, backends, device, peers, quick)
    if json_path:
        read(json_path, "--json")  # refuse a file of other rows before anything is measured

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.kernels import KernelBench, format_row
    from lingbot_kernels.benchmarks.rows import RowFile

    found = Environment.collect(plan.device)
    file = RowFile(found, "kernels", json_path, click.echo, format_row)
    click.echo(
        f"{found.gpu} · driver {found.driver} · torch {found.torch} · CUDA {found.cuda} · triton {found.triton}"
        f" · commit {found.commit}"
    )
    green = KernelBench(plan, file.report).run()
    file.close()
    _conclude(file.rows, read(file.path, "--json"), plot_path, update_winners)
    if not green:
        click.echo("A gate is not green: see the rows above that have no times.", err=True)
        raise click.exceptions.Exit(1)


def _plan(
    ops: tuple[str, ...], cases: tuple[str, ...], backends: tuple[str, ...], device: str, peers: bool, quick: bool
) -> KernelPlan:
    """The options as a plan; a name that doesn't exist is a usage error."""
    from lingbot_kernels.benchmarks.kernel_cases import KERNEL_CASES, default_kernel_cases
    from lingbot_kernels.benchmarks.kernels import BACKENDS, KernelPlan
    from lingbot_kernels.commands.session import bench_device
    from lingbot_kernels.ops._dispatch import OPS

    _known("--ops", ops, OPS)
    _known("--cases", cases, KERNEL_CASES)
    _known("--backends", backends, BACKENDS)
    where = bench_device(device)
    return KernelPlan(cases or default_kernel_cases(where.type, quick), where, ops, backends, peers, quick)


def _conclude(
    drawn: list[dict[str, Any]], known: list[dict[str, Any]], plot_path: Path | None, update_winners: bool
) -> None:
    """Draw the rows of this run and update the winners from all that are known."""
    if plot_path is not None:
        from lingbot_kernels.benchmarks.kernels_plot import plot

        try:
            plot(drawn, plot_path)
        except ImportError as error:
            raise click.ClickException(f"--plot needs matplotlib: install lingbot-kernels[plot] ({error})") from error
        except ValueError as error:
            raise click.ClickException(f"--plot: {error}") from error
        click.echo(f"plot: {plot_path}")
    if update_winners:
        from lingbot_kernels.benchmarks import winners

        try:
            table = winners.update(known)
        except ValueError as error:
            raise click.ClickException(f"--update-winners: {error}") from error
        click.echo(f"winners: default {table.default}, {len(table.rules)} rules")
