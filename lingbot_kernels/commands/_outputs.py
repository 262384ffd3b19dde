"""Files that commands write: refused under their option before the work, written as a whole after it, and none of them
lost because another one can't be written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.files import check_output, replacing, write_text

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.rows import RowFile

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
        """Have `write` make the file of an option, which takes its name only once it is whole. None: nothing to do."""
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

    def failed(self, option: str, path: Path, error: OSError) -> None:
        """Note that an option's file can't be written."""
        self.failures.append(f"{option}: {path}: can't be written: {error.strerror or error}")

    def append_rows(self, option: str, path: Path, rows: list[dict[str, Any]]) -> None:
        """Append a bench's rows to a file, and say where they are."""
        from lingbot_kernels.benchmarks.rows import append_rows

        with self.kept(option, path):
            append_rows(path, rows)
            click.echo(f"{len(rows)} rows appended to {path}")

    def rows(self, file: RowFile) -> None:
        """End a bench's file of rows, the one of `--json` or the default."""
        file.close()
        if file.error is not None:
            self.failed("--json", file.path, file.error)

    def finish(self) -> None:
        """Raise ClickException (exit code 1), in one line, where a file could not be written."""
        if self.failures:
            raise click.ClickException("; ".join(self.failures))


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
