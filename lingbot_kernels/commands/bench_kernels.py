"""`lingbot-kernels bench kernels`: options of the kernel bench; `lingbot_kernels.benchmarks` measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.commands import _options
from lingbot_kernels.commands._click import GroupedCommand, option_group
from lingbot_kernels.commands._options import FILE
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.commands._types import Name

_bench = option_group("Bench")
_output = option_group("Output")
_HEAD = "{gpu} · driver {driver} · torch {torch} · CUDA {cuda} · triton {triton} · commit {commit}"


@click.command("kernels", cls=GroupedCommand)
@_bench("--ops", item=Name(), metavar="NAMES", help="Ops to measure, separated by commas.  [default: all]")
@_bench("--cases", item=Name(), metavar="NAMES", help="Shapes, such as s4524-d5120.  [default: the device's]")
@_bench(
    "--backends", item=Name(), metavar="NAMES",
    help="cuda, triton, cpu, reference; fa4, fa3, cudnn, sdpa; auto (linear_gelu).",
)  # fmt: skip
@_options.device()
@_bench("--peers/--no-peers", default=True, show_default=True, help="Measure what people use today as well.")
@_bench("--quick", is_flag=True, help="Two shapes, short samples, no peer that compiles.")
@_options.rows("kernels")
@_options.plot()
@_output("--update-winners", is_flag=True, help="Regenerate the table that `auto` goes by, from the file's rows.")
@_bench("--from", "source", type=FILE, help="Measure nothing: plot, or update the winners, from the rows of this file.")
def command(
    ops: tuple[str, ...], cases: tuple[str, ...], backends: tuple[str, ...], device: str, peers: bool, quick: bool,
    json_path: Path | None, plot_path: Path | None, update_winners: bool, source: Path | None,
) -> None:  # fmt: skip
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
    if source is not None:
        outputs, rows = Outputs(), _read(source, "--from")
        _conclude(rows, rows, plot_path, update_winners, outputs)
        outputs.finish()
        return

    from lingbot_kernels.benchmarks.kernel_cases import KERNEL_CASES, default_kernel_cases
    from lingbot_kernels.benchmarks.kernels import BACKENDS, KernelBench, KernelPlan, format_row
    from lingbot_kernels.commands.session import BenchRun, bench_device
    from lingbot_kernels.ops._dispatch import OPS

    for option, names, known in (("ops", ops, OPS), ("cases", cases, KERNEL_CASES), ("backends", backends, BACKENDS)):
        _check_names(f"--{option}", names, known)
    where = bench_device(device)
    plan = KernelPlan(cases or default_kernel_cases(where.type, quick), where, ops, backends, peers, quick)
    if json_path:
        _read(json_path, "--json")  # refuse a file of other rows before anything is measured
    run = BenchRun("kernels", where, json_path, _HEAD, format_row)
    green = KernelBench(plan, run.report).run()
    run.close()
    _conclude(run.file.rows, _read(run.file.path, "--json"), plot_path, update_winners, run)
    run.finish()
    if not green:
        click.echo("A gate is not green: see the rows above that have no times.", err=True)
        raise click.exceptions.Exit(1)


def _check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no {name!r}; there are {', '.join(known)}.", param_hint=option)


def _read(path: Path, option: str) -> list[dict[str, Any]]:
    """The rows of an option's file, none where it isn't there yet."""
    from lingbot_kernels.benchmarks.rows import read_rows

    try:
        return read_rows(path) if path.exists() else []
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def _conclude(
    drawn: list[dict[str, Any]], known: list[dict[str, Any]], plot_path: Path | None, update: bool, outputs: Outputs
) -> None:
    """Draw the rows of this run and update the winners from all that are known; what fails, `outputs` says."""
    from lingbot_kernels.benchmarks import plots, winners

    outputs.write("--plot", plot_path, lambda path: plots.kernels(drawn, path))
    if update:
        try:
            table, libraries = winners.update(known)
        except (ValueError, OSError) as error:
            outputs.failures.append(f"--update-winners: {error}")
        else:
            click.echo(
                f"winners: default {table.default}, {len(table.rules)} rules; attention {len(libraries.rules)} rules"
            )
