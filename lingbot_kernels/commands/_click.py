"""What click lacks: subcommands imported on demand, options in named groups, arguments handed on untouched.
Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import click

from lingbot_kernels.commands._outputs import check_distinct


class UsageLine(click.UsageError):
    """A usage error in one line, which ends with where to look."""

    def __init__(self, error: click.UsageError, command: str) -> None:
        super().__init__(error.format_message(), error.ctx)
        self.command = command

    def show(self, file: IO[Any] | None = None) -> None:
        text = f"Error: {' '.join(self.message.split())} See {self.command} --help."
        click.echo(text, file=file or sys.stderr, err=True)


@contextlib.contextmanager
def _in_one_line(command: str) -> Iterator[None]:
    """Turn usage errors into a `UsageLine`; `command` is the one at fault where the error doesn't say."""
    try:
        yield
    except (UsageLine, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        raise UsageLine(error, command if error.ctx is None else error.ctx.command_path) from error


class OneLine(click.Command):
    """A command whose usage errors, those of its subcommands too, are one line."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _in_one_line(" ".join(word for word in (parent and parent.command_path, info_name) if word)):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line(ctx.command_path):
            return super().invoke(ctx)


class LazyGroup(OneLine, click.Group):
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


class ListOption(GroupedOption):
    """An option whose values come separated by commas, by giving it again, or both: `--x a,b --x c`.

    Args:
        item: type of a value.
        most: values, at most.
        default: as a user would write it.
    """

    def __init__(self, *arguments: Any, item: click.ParamType, most: int = 1000, default: str = "", **settings: Any):
        self.item, self.most = item, most
        settings["default"] = [default] if default else []
        super().__init__(*arguments, multiple=True, type=click.STRING, **settings)

    def type_cast_value(self, ctx: click.Context, value: Any) -> tuple[Any, ...]:
        texts = [part.strip() for text in super().type_cast_value(ctx, value) for part in text.split(",")]
        if len(texts) > self.most:
            raise click.BadParameter(f"has {len(texts)} values, must have at most {self.most}.", ctx, self)
        if not all(texts):
            raise click.BadParameter("must be values separated by commas, none of them empty.", ctx, self)
        try:
            return tuple(self.item.convert(text, self, ctx) for text in texts)
        except click.BadParameter as error:
            raise click.BadParameter(f"{','.join(texts)}: {error.message}", ctx, self) from error


class GroupedCommand(OneLine):
    """A command whose `--help` shows its options by group, in the order they were declared. Two options that
    name one file are refused where either is an output, and so is `--plot` where nothing can be drawn. What can't fit
    in memory is said in a line, with exit code 1.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            check_distinct(ctx)
            if ctx.params.get("plot_path") is not None:
                _require_plots()
        return rest

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
    """`click.option` for one group; a `ListOption` where it is given the `item` of a list."""

    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        kind = ListOption if "item" in settings else GroupedOption
        return click.option(*names, cls=kind, group=title, **settings)

    return option


def _require_plots() -> None:
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
