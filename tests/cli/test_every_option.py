"""Every option of every command, from click's own registry, with values that it can't have: exit code 2, one line that
names the option and says where to look, nothing begun. A new option is in the walk as soon as it is declared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_kernels.cli import BENCHES, COMMANDS, bench, main
from lingbot_kernels.commands import _types
from lingbot_kernels.commands._click import ListOption
from lingbot_kernels.commands._outputs import OutputPath

CONTEXT = click.Context(main)


def commands() -> dict[tuple[str, ...], click.Command]:
    """Words of the command line -> the command; `cases` has its own parser."""
    found: dict[tuple[str, ...], click.Command] = {}
    for prefix, group, table in (((), main, COMMANDS), (("bench",), bench, BENCHES)):
        for name in table:
            command = group.get_command(CONTEXT, name)
            assert command is not None
            found[(*prefix, name)] = command
    return {words: command for words, command in found.items() if words != ("cases",)}


def wrong(kind: click.ParamType) -> list[str]:
    """Values that no option of the type can have."""
    if isinstance(kind, click.IntRange):
        assert kind.min is not None and kind.max is not None, "every count has both bounds"
        return ["x", "", "1.5", "nan", str(kind.min - 1), str(kind.max + 1), "9" * 5000]
    if isinstance(kind, _types.Number):
        low = kind.least if kind.least is not None else kind.above
        beyond = [] if low is None else [str(low - 1)]
        return ["x", "", "nan", "inf", "-inf", *beyond, *([str(kind.most + 1)] if kind.most is not None else [])]
    if isinstance(kind, click.Choice):
        return ["nothing", ""]
    if isinstance(kind, OutputPath):
        suffix = kind.suffixes[0] if kind.suffixes else ".x"
        places = [f"/proc/a{suffix}", f"folder{suffix}", f"full{suffix}", f"file/b{suffix}", "a\0" + suffix, "-", ""]
        return [*places, *([] if kind.append else [f"none/a{suffix}"]), *(["a.other"] if kind.suffixes else [])]
    if isinstance(kind, click.Path):
        return ["none", "" if kind.dir_okay else "."]
    return {
        _types.Device: ["tpu", "", "cuda:x", "cuda:", "meta", "cuda:1:2"],
        _types.Keys: ["q", "", "w*0", "w*-1", "w*x", "w+", "w*" + "9" * 40][:5],
        _types.CameraScale: ["far", "", "0", "-1", "nan", "inf"],
        _types.Text: ["", "  "],
        _types.Host: ["", "a b", "http://here/", "é", "a" * 254],
        _types.Name: ["nothing"],
    }[type(kind)]


def walk() -> Iterator[tuple[tuple[str, ...], str, str]]:
    for words, command in commands().items():
        for option in command.params:
            if not isinstance(option, click.Option) or option.hidden:
                continue
            name = option.opts[0]
            if option.is_flag:
                yield words, name, f"{name}=3"
            elif isinstance(option, ListOption):
                for value in [*wrong(option.item), "", ",", "a,,b"]:
                    yield words, name, f"{name}={value}"
            else:
                for value in wrong(option.type):
                    yield words, name, f"{name}={value}"


# What a command needs besides, so that a name which only the command knows is what it stumbles over.
NEEDED = {("profile",): ("rollout",)}
# Names that the command checks itself, where the whole rest must be right.
CHECKED_LATE = {("quality", "--leave-out"): ("--preset", "tiny", "--height", "32", "--width", "32", "--quiet")}
# A text that is looked up only together with another.
TOGETHER = {("profile", "--case"): ("op", "rms_norm", "--device", "cpu")}


@pytest.fixture
def odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LINGBOT_KERNELS_BACKEND", raising=False)
    suffixes = {
        suffix
        for command in commands().values()
        for option in command.params
        if isinstance(option.type, OutputPath)
        for suffix in option.type.suffixes or (".x",)
    }
    for suffix in suffixes:
        (tmp_path / f"folder{suffix}").mkdir()
        (tmp_path / f"full{suffix}").symlink_to("/dev/full")
    (tmp_path / "file").write_text("")
    return tmp_path


def refused(words: tuple[str, ...], name: str, *arguments: str) -> str:
    result = CliRunner().invoke(main, [*words, *arguments], prog_name="lingbot-kernels")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, (arguments, result.output)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and not result.stdout, (arguments, result.output)
    assert lines[0].startswith("Error: ") and name in lines[0], (arguments, lines)
    assert lines[0].endswith(f"See lingbot-kernels {' '.join(words)} --help."), lines
    assert len(lines[0]) < 6000
    return lines[0]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_wrong_value_of_any_option_is_refused_in_one_line(words, odd_files):
    before = sorted(odd_files.rglob("*"))
    for where, name, argument in walk():
        if where == words:
            key = (words[-1], name)
            more = CHECKED_LATE.get(key) or TOGETHER.get(key) or NEEDED.get(words, ())
            refused(words, name, *more, argument)
    refused(words, "--no-such-option", "--no-such-option")
    assert sorted(odd_files.rglob("*")) == before


def test_the_walk_knows_every_type_and_meets_every_option():
    options = {
        (words, option.opts[0])
        for words, command in commands().items()
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
    }
    assert {(words, name) for words, name, _ in walk()} == options
    assert len(options) > 100


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_begins_with_what_a_newcomer_types(words):
    text = CliRunner().invoke(main, [*words, "--help"], prog_name="lingbot-kernels").stdout
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert "Examples:" in lines[:6], text
    first = lines[lines.index("Examples:") + 1]
    assert first.startswith(f"lingbot-kernels {' '.join(words)}")
    known = {name for option in commands()[words].params for name in (*option.opts, *option.secondary_opts)}
    assert {word.partition("=")[0] for word in first.split() if word.startswith("--")} <= known


LISTS = [
    (words, option)
    for words, command in commands().items()
    for option in command.params
    if isinstance(option, ListOption)
]


@pytest.mark.parametrize(("words", "option"), LISTS, ids=[" ".join((*words, o.opts[0])) for words, o in LISTS])
def test_a_list_option_takes_commas_and_repeats_alike(words, option):
    values = option.item.choices[:2] if isinstance(option.item, click.Choice) else ["500", "250"]
    name = option.opts[0]
    command = commands()[words]
    first = ["rollout"] if words == ("profile",) else []

    def read(*arguments: str) -> object:
        context = command.make_context(words[-1], [*first, *arguments])
        return context.params[option.name]

    joined = read(name, ",".join(values))
    assert joined == read(name, values[0], name, values[1]) == read(f"{name}={values[0]} , {values[1]}")
    assert len(joined) == 2
    many = ",".join(values * 501)
    refused(words, name, *first, f"{name}={many}")


def test_no_option_takes_a_list_in_a_way_of_its_own():
    for words, command in commands().items():
        for option in command.params:
            assert not option.multiple or isinstance(option, ListOption), (words, option.opts)


@given(st.text(max_size=30))
@settings(max_examples=200)
def test_any_text_is_a_number_or_refused(text):
    kind = _types.Number(above=0, most=1000)
    try:
        number = kind.convert(text, None, None)
    except click.BadParameter as error:
        assert "must be a number above 0 to 1000" in error.message
    else:
        assert math.isfinite(number) and 0 < number <= 1000


@given(st.one_of(st.text(max_size=12), st.from_regex(r"cuda:[0-9]{0,4}", fullmatch=True)))
@settings(max_examples=200)
def test_any_text_is_a_device_or_refused(text):
    try:
        device = _types.Device().convert(text, None, None)
    except click.BadParameter:
        return
    import torch

    assert device == "auto" or torch.device(device).type in ("cpu", "cuda")
