"""Files that commands write: refused under their option before the work, written as a whole after it, and none of them
lost because another one can't be written."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lingbot_kernels.files import check_output, replacing, write_text

Write = Callable[[Path], object]


class OutputPath(click.ParamType):
    """A file to write.

    Args:
        suffixes: one of which it must have, where there are any.
        append: whether the file grows, rather than being replaced.
    """

    name = "file"

    def __init__(self, *suffixes: str, append: bool = False) -> None:
        self.suffixes, self.append = suffixes, append

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if str(path) == "-":
            self.fail("'-' is no file; to have it printed, give /dev/stdout.", param, ctx)
        if self.suffixes and path.suffix not in self.suffixes:
            self.fail(f"{path}: must end in {' or '.join(self.suffixes)}.", param, ctx)
        try:
            check_output(path, append=self.append)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        return path


class Outputs:
    """A command's files, written one by one; what can't be written of them is said by `finish`, after the others.

    Attributes:
        failures: a line for each file that could not be written.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    def write(self, option: str, path: Path | None, write: Write) -> None:
        """Have `write` make the file of an option, which takes its name only once it is whole. None: nothing to do.
        A ValueError of `write`, which finds nothing to make it of, is noted as well.
        """
        if path is not None:
            with self.kept(option, path):
                with replacing(path) as file:
                    write(file)
                click.echo(f"{option.lstrip('-')}: {path}")

    def write_json(self, option: str, path: Path | None, report: Mapping[str, Any]) -> None:
        if path is not None:
            with self.kept(option, path):
                write_text(path, json.dumps(report, indent=2) + "\n")

    @contextlib.contextmanager
    def kept(self, option: str, path: Path) -> Iterator[None]:
        """Within the block, a file that can't be written is noted for `finish`."""
        try:
            yield
        except OSError as error:
            self.failed(option, path, error)
        except ValueError as error:
            self.failures.append(f"{option}: {error}")

    def failed(self, option: str, path: Path, error: OSError) -> None:
        """Note that an option's file can't be written."""
        self.failures.append(f"{option}: {path}: can't be written: {error.strerror or error}")

    def finish(self, good: bool = True) -> None:
        """ClickException (exit code 1), in one line, where a file could not be written; exit with 1 where not good."""
        if self.failures:
            raise click.ClickException("; ".join(self.failures))
        if not good:
            raise click.exceptions.Exit(1)


@contextlib.contextmanager
def progress(title: str, chunks: int, quiet: bool, latest: bool = False) -> Iterator[Callable[[str], None]]:
    """A function to call after each chunk, with a text of its own where there is a column for the `latest`; draws on
    stderr where that is a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    told = [TextColumn("{task.fields[latest]}")] if latest else []
    columns = (TextColumn("chunk"), MofNCompleteColumn(), BarColumn(), *told, TimeRemainingColumn())
    disabled = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as shown:
        task = shown.add_task(title, total=chunks, latest="")
        yield lambda text: shown.update(task, advance=1, latest=text)


def check_distinct(ctx: click.Context) -> None:
    """Refuse an output that another option names as well, be it to read or to write.

    Raises:
        click.UsageError: naming both options.
    """
    seen: dict[Path, click.Parameter] = {}
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if not isinstance(value, Path) or (value.exists() and not value.is_file()):
            continue
        other = seen.setdefault(value.resolve(), parameter)
        if other is not parameter and OutputPath in (type(parameter.type), type(other.type)):
            names = " and ".join(each.opts[0] for each in (other, parameter))
            raise click.UsageError(f"{names}: got one file, {value}, for both; must be two.")
