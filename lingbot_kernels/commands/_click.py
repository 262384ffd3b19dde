"""What click lacks: subcommands imported on demand, options in named groups, arguments handed on untouched.
Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are run.

    Args:
        table: name -> (module whose `command` it is, one line for the list in `--help`).
    """

    def __init__(self, *arguments: Any, table: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return super().get_command(ctx, cmd_name)
        command: click.Command = importlib.import_module(self.table[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self.table[name][1]) for name in self.table]
        for name in super().list_commands(ctx):
            added = super().get_command(ctx, name)
            rows += [] if added is None else [(name, added.get_short_help_str())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading `group`."""

    def __init__(self, *arguments: Any, group: str = "Options", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` shows its options by group, in the order they were declared. What can't fit in memory is
    said in a line, with exit code 1.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MemoryError as error:
            raise click.ClickException(str(error) or "out of memory") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Passthrough(click.Command):
    """A command that hands every argument, `--help` and `--` too, to its callback as `arguments`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = tuple(args)
        return []


def option_group(title: str) -> Callable[..., Callable[[Any], Any]]:
    """`click.option` for one group."""

    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=GroupedOption, group=title, **settings)

    return option


def output_path(*suffixes: str) -> click.Path:
    """A file to write, in a folder that exists, with one of `suffixes` where there are any."""

    class OutputPath(click.Path):
        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            path = Path(str(super().convert(value, param, ctx)))
            if not path.parent.is_dir():
                self.fail(f"{path}: the folder {path.parent} does not exist.", param, ctx)
            if suffixes and path.suffix not in suffixes:
                self.fail(f"{path}: must end in {' or '.join(suffixes)}.", param, ctx)
            return path

    return OutputPath(dir_okay=False, writable=True)


def require_plots() -> None:
    """Refuse `--plot` where matplotlib isn't there, before anything is measured."""
    from lingbot_kernels.benchmarks import plots

    try:
        plots.require()
    except ImportError as error:
        raise click.UsageError(f"--plot: {error}") from error


@contextlib.contextmanager
def blame(option: str, *also: type[Exception]) -> Iterator[None]:
    """Report ValueError, TypeError, OSError (and `also`) as a bad value of `option`: one line, exit code 2."""
    expected: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, *also)
    try:
        yield
    except expected as error:
        # A configuration's error names the field; the option has the field's name.
        message = re.sub(r"LingBotConfig\.(\w+)", lambda field: "--" + field[1].replace("_", "-"), str(error))
        raise click.BadParameter(message, param_hint=option) from error
