"""`lingbot-kernels bench kernels`: options of the kernel bench; `lingbot_kernels.benchmarks` measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, list_option, option_group, output_path, require_plots
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Device, Name

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.kernels import KernelPlan


_bench = option_group("Bench")
_names = list_option("Bench")
_output = option_group("Output")


def _known(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no {name!r}; there are {', '.join(known)}.", param_hint=option)


@click.command("kernels", cls=GroupedCommand)
@_names("--ops", item=Name(), metavar="NAMES", help="Ops to measure, separated by commas.  [default: all]")
@_names("--cases", item=Name(), metavar="NAMES", help="Shapes, such as s4524-d5120.  [default: the device's]")
@_names(
    "--backends",
    item=Name(),
    metavar="NAMES",
    help="cuda, triton, cpu, reference; fa4, fa3, cudnn, sdpa; auto (linear_gelu).",
)
@_bench("--device", type=Device(), default="auto", show_default=True, help="auto, cuda, cuda:N or cpu.")
@_bench("--peers/--no-peers", default=True, show_default=True, help="Measure what people use today as well.")
@_bench("--quick", is_flag=True, help="Two shapes, short samples, no peer that compiles.")
@_output(
    "--json", "json_path", type=output_path(append=True),
    help="Append the rows here.  [default: bench/results/kernels-<gpu>.jsonl]",
)  # fmt: skip
@_output("--plot", "plot_path", type=output_path(".png"), help="Write a picture, a PNG.")
@_output("--update-winners", is_flag=True, help="Regenerate the table that `auto` goes by, from the file's rows.")
@_bench(
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

    \b
    Examples:
      lingbot-kernels bench kernels --quick
      lingbot-kernels bench kernels --ops qk_norm_rope_kv_write --json rows.jsonl --plot rows.png
      lingbot-kernels bench kernels --from rows.jsonl --update-winners

    The correctness gate comes first: against float64, with outputs and caches full of NaN. A result that fails it has
    no speed, and the exit code is 1. Times are of CUDA-graph replays over rotated inputs; wall is the host's time of a
    call from Python.
    """
    if plot_path is not None:
        require_plots()

    from lingbot_kernels.benchmarks.rows import read_rows

    def read(path: Path, option: str) -> list[dict[str, Any]]:
        try:
            return read_rows(path) if path.exists() else []
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint=option) from error

    if source is not None:
        rows = read(source, "--from")
        outputs = Outputs()
        _conclude(rows, rows, plot_path, update_winners, outputs)
        outputs.finish()
        return
    plan = _plan(ops, cases, backends, device, peers, quick)
    if json_path:
        read(json_path, "--json")  # refuse a file of other rows before anything is measured

    from lingbot_kernels.benchmarks.environment import Environment
    from lingbot_kernels.benchmarks.kernels import KernelBench, format_row
    from lingbot_kernels.benchmarks.rows import RowFile

    found = Environment.collect(plan.device)
    with blame("--json"):
        file = RowFile(found, "kernels", json_path, click.echo, format_row)
    click.echo(
        f"{found.gpu} · driver {found.driver} · torch {found.torch} · CUDA {found.cuda} · triton {found.triton}"
        f" · commit {found.commit}"
    )
    green = KernelBench(plan, file.report).run()
    outputs = Outputs()
    outputs.rows(file)
    _conclude(file.rows, read(file.path, "--json"), plot_path, update_winners, outputs)
    outputs.finish()
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
    drawn: list[dict[str, Any]],
    known: list[dict[str, Any]],
    plot_path: Path | None,
    update_winners: bool,
    outputs: Outputs,
) -> None:
    """Draw the rows of this run and update the winners from all that are known; what fails, `outputs` says."""
    if plot_path is not None:
        from lingbot_kernels.benchmarks.kernels_plot import plot

        try:
            outputs.write("--plot", plot_path, lambda path: plot(drawn, path))
        except ValueError as error:
            outputs.failures.append(f"--plot: {error}")
    if update_winners:
        from lingbot_kernels.benchmarks import winners

        try:
            table, libraries = winners.update(known)
        except (ValueError, OSError) as error:
            outputs.failures.append(f"--update-winners: {error}")
        else:
            click.echo(
                f"winners: default {table.default}, {len(table.rules)} rules; attention {len(libraries.rules)} rules"
            )
