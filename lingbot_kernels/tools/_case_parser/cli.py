"""Command line of the case parser: list, plan, verify and diff.

Exit codes: 0 all was read; 1 a required suite is empty, a case didn't run, or there is no case at all; 2 unresolved
(`--strict`, or an unreadable config); 3 stopped early; 64 bad arguments; 66 a missing file.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from .planning import DEFAULT_EST_TIME_SECONDS, BaselineError, Item, load_baselines, plan
from .reports import STANDALONE_PREFIX, read_reports
from .results import Options, ParsedConfig, StandaloneData, parse_config, parse_standalone

EXIT_OK, EXIT_FAILED, EXIT_UNRESOLVED, EXIT_STOPPED, EXIT_USAGE, EXIT_NO_INPUT = 0, 1, 2, 3, 64, 66


_OUTPUTS = ("matrix", "partition_count", "plan")  # names in the file of --github-output


class UsageError(Exception):
    """Arguments that can't be used."""


class NoInputError(Exception):
    """A file or folder that isn't there."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _check(condition: bool, must: str, text: str) -> None:
    if not condition:
        raise argparse.ArgumentTypeError(f"must be {must}, got {text!r}")


def _positive(text: str) -> float:
    _check(0 < float(text) < math.inf, "a positive number of seconds", text)
    return float(text)


def _count(text: str) -> int:
    _check(int(text) >= 1, "a whole number >= 1", text)
    return int(text)


def _mapping(text: str) -> tuple[str, str]:
    name, _, suite = text.partition("=")
    _check(name.isidentifier() and bool(suite), "NAME=SUITE", text)
    return name, suite


def _identifier(text: str) -> str:
    _check(text.isidentifier(), "a Python name", text)
    return text


def _assumption(text: str) -> tuple[str, bool]:
    name, _, value = text.rpartition("=")
    _check(value in ("True", "False") and bool(name.strip()), "CONDITION=True or CONDITION=False", text)
    try:
        name = ast.unparse(ast.parse(name.strip(), mode="eval"))
    except SyntaxError:  # such as `import x` succeeds
        name = name.strip()
    return name.removeprefix("not "), (value == "True") != name.startswith("not ")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; usage errors raise `UsageError`."""
    common = _Parser(add_help=False)
    add = common.add_argument
    add("--run-suite", type=Path, metavar="FILE", help="run-suite file with STANDALONE_FILES and their estimates")
    add("--baselines", type=Path, metavar="PATH", help="performance baselines: a file, or a folder, one per platform")
    add("--json", action="store_true", help="print JSON")
    add("--strict", action="store_true", help="exit 2 when anything is unresolved")
    lists: Any = {"dest": "lists", "action": "append", "type": _mapping, "metavar": "NAME=SUITE"}
    add("--list", **lists, help="in place of the built-in map")
    add("--case-class", type=_identifier, default=Options.case_class, metavar="NAME")
    add("--id-param", type=_identifier, default=Options.id_param, metavar="NAME")
    add("--root", type=Path, metavar="DIR", help="folder in which absolute imports start")
    add("--scope", type=Path, action="append", default=[], metavar="DIR", help="execute it, in place of the config's")
    add("--assume", type=_assumption, action="append", default=[], metavar="TEST=BOOL", help="such as 'is_hip()=False'")
    add("--static", action="store_true", help="read the syntax tree only; run nothing")
    add("--timeout", type=_positive, default=Options.timeout, metavar="S")
    add("--allow-empty", action="store_true", help="no case at all is no failure")
    about = (
        "Which test cases a config declares. The config's own code is run, under stubs, without --static.\n\n"
        "Examples:\n"
        "  lingbot-kernels cases list testcase_configs.py\n"
        "  lingbot-kernels cases plan testcase_configs.py --suite 1-gpu --github-output $GITHUB_OUTPUT\n"
        "  lingbot-kernels cases verify testcase_configs.py --reports reports"
    )
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="diffusion_case_parser", description=about, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    p = commands.add_parser("list", parents=[common], help="cases by suite, and what is unresolved")
    p.add_argument("config", type=Path)
    p.add_argument("--require", action="append", default=[], metavar="SUITE", help="exit 1 when this suite has no case")
    p = commands.add_parser("plan", parents=[common], help="partitions of a suite for parallel jobs")
    p.add_argument("config", type=Path)
    p.add_argument("--suite", required=True)
    for name, seconds in (("min", 1200.0), ("target", 1800.0), ("max", 2400.0)):
        p.add_argument(f"--{name}-time", type=_positive, default=seconds, metavar="S")
    p.add_argument("--max-partitions", type=_count, default=10, metavar="N")
    p.add_argument("--github-output", type=Path, metavar="FILE", help="append matrix, partition_count and plan to FILE")
    p.add_argument("--github-prefix", default="", metavar="TEXT", help="put before the three names in FILE")
    p = commands.add_parser("verify", parents=[common], help="executed cases against expected ones")
    p.add_argument("config", type=Path)
    p.add_argument("--reports", type=Path, required=True, metavar="DIR")
    p.add_argument("--suite", action="append", metavar="SUITE", help="verify these suites only")
    p = commands.add_parser("diff", parents=[common], help="cases added and removed between two versions")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    return parser


class _Run:
    """One command: its arguments, parsed config and estimates."""

    def __init__(self, args: argparse.Namespace, list_to_suite: Mapping[str, str]) -> None:
        self.args = args
        self.list_to_suite = dict(args.lists) if args.lists else dict(list_to_suite)
        for name, folder in [("--root", args.root), *(("--scope", f) for f in args.scope)]:
            if folder is not None and not folder.is_dir():
                raise NoInputError(f"{name} {folder}: no such folder")
        given = {n: getattr(args, n) for n in ("case_class", "id_param", "root", "scope", "timeout", "static")}
        self.options = Options(assume=dict(args.assume), **given)
        self.baselines: dict[str, float] = {}
        if args.baselines is not None:
            self.baselines = load_baselines(args.baselines if args.baselines.is_dir() else self.file(args.baselines))
        self.standalone = StandaloneData()
        if args.run_suite is not None:
            try:
                self.standalone = parse_standalone(self.file(args.run_suite), self.options)
            except SyntaxError as e:
                raise UsageError(f"--run-suite {args.run_suite}:{e.lineno}:{e.offset}: {e.msg}") from None

    @staticmethod
    def file(path: Path) -> Path:
        try:
            found = path.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise NoInputError(f"{path}: no such file")
        return path

    def parse(self, path: Path, suites: Sequence[str] = (), option: str = "") -> ParsedConfig:
        """The config at `path`; `suites` are those that `option` names."""
        parsed = parse_config(self.file(path), self.list_to_suite, self.options)
        for suite in suites:
            if suite not in parsed.suites:
                known = ", ".join(parsed.suites)
                raise UsageError(f"{option} {suite}: no list belongs to this suite; suites: {known}")
        parsed.unresolved += self.standalone.unresolved
        parsed.stopped += self.standalone.stopped
        for name in self.options.assume:
            if parsed.readable and not self.options.static and name not in parsed.assumed:
                print(f"note: --assume {name}: {path} never asks for it", file=sys.stderr)
        for u in parsed.stopped:
            print(f"error: stopped early: {u.file}:{u.line}:{u.column}: {u.reason}", file=sys.stderr)
        return parsed

    def estimate(self, case_id: str) -> float:
        return self.baselines.get(case_id, DEFAULT_EST_TIME_SECONDS)

    def finish(self, parsed: Sequence[ParsedConfig], data: Any, lines: Any, *, failed: bool = False) -> int:
        """Print `data` (JSON) or `lines`; the exit code. `failed`: what is checked doesn't hold."""
        for u in () if self.args.json else (u for p in parsed for u in p.unresolved):
            lines.append(f"unresolved: {u.file}:{u.line}:{u.column}: {u.reason}" + f"\n    {u.source}" * bool(u.source))
        print(json.dumps(data, indent=2) if self.args.json else "\n".join(lines))
        return self.code(parsed, failed)

    def code(self, parsed: Sequence[ParsedConfig], failed: bool = False) -> int:
        if any(not p.readable for p in parsed):
            return EXIT_UNRESOLVED
        if any(p.stopped for p in parsed):
            return EXIT_STOPPED
        if not self.args.allow_empty and not any(parsed[-1].suites.values()):
            print("error: no case at all was found (--allow-empty takes that)", file=sys.stderr)
            failed = True
        if failed:
            return EXIT_FAILED
        return EXIT_UNRESOLVED if self.args.strict and any(p.unresolved for p in parsed) else EXIT_OK

    def list(self) -> int:
        parsed = self.parse(self.args.config, self.args.require, "--require")
        data: dict[str, Any] = {
            "suites": {
                s: [asdict(c) | {"est_time": self.estimate(c.id)} for c in cases] for s, cases in parsed.suites.items()
            },
            "unresolved": [asdict(u) for u in parsed.unresolved],
            "duplicates": [asdict(d) for d in parsed.duplicates],
        }
        data |= {"stopped": [asdict(u) for u in parsed.stopped]} if parsed.stopped else {}
        data |= {"other_lists": parsed.other_lists} if parsed.other_lists else {}
        data |= {"standalone": self.standalone.files} if self.args.run_suite is not None else {}
        lines = []
        for suite, cases in parsed.suites.items():
            lines.append(f"{suite}: {len(cases)} cases, {sum(self.estimate(c.id) for c in cases):.0f} s")
            for c in cases:
                condition = "" if c.condition is None else f"  if {c.condition}"
                lines.append(f"  {c.id}  [{c.list}, line {c.line}, {self.estimate(c.id):.0f} s]{condition}")
            for f in self.standalone.files.get(suite, []):
                seconds = self.standalone.est_times.get(suite, {}).get(f)
                lines.append(f"  {STANDALONE_PREFIX}{f}  [{'no estimate' if seconds is None else f'{seconds:.0f} s'}]")
        lines += [f"note: no suite takes list {name} ({len(ids)} cases)" for name, ids in parsed.other_lists.items()]
        for d in parsed.duplicates:
            where = f"in suite{'s' * (len(d.suites) > 1)} {', '.join(d.suites)}"
            lines.append(f"duplicate: {d.id} {where}, lines {', '.join(map(str, d.lines))}")
        empty = [s for s in self.args.require if not parsed.suites[s]]
        for suite in empty:
            print(f"error: required suite {suite} has no cases", file=sys.stderr)
        return self.finish([parsed], data, lines, failed=bool(empty))

    def plan(self) -> int:
        args, suite = self.args, self.args.suite
        if not args.min_time <= args.target_time <= args.max_time:
            given = f"{args.min_time}, {args.target_time}, {args.max_time}"
            raise UsageError(f"--min-time <= --target-time <= --max-time must hold, got {given}")
        if args.github_output is not None:
            self.check_outputs(args.github_output)
        parsed = self.parse(args.config, [suite], "--suite")
        times = self.standalone.est_times.get(suite, {})
        items = [Item("case", c.id, self.estimate(c.id)) for c in parsed.suites[suite]]
        files = self.standalone.files.get(suite, [])
        items += [Item("standalone", f, times.get(f, DEFAULT_EST_TIME_SECONDS)) for f in files]
        bounds = {n: getattr(args, n) for n in ("min_time", "target_time", "max_time")}
        made = plan(suite, items, limit=args.max_partitions, **bounds)
        for u in parsed.unresolved:
            print(f"unresolved: {u.file}:{u.line}:{u.column}: {u.reason}", file=sys.stderr)
        code = self.code([parsed])
        print(json.dumps(made, indent=2))
        if args.github_output is not None and code == EXIT_OK:
            self.write_outputs(args.github_output, made)
        return code

    def check_outputs(self, path: Path) -> None:
        """Refuse a file that can't grow, or has the names already, before the config is run."""
        try:
            is_new = not path.exists()
            known = path.read_text(encoding="utf-8") if path.is_file() else ""
            with path.open("ab", buffering=0) as f:
                f.write(b"")  # which a full device refuses as well
            if is_new:
                path.unlink()
        except (OSError, ValueError) as e:
            raise NoInputError(f"--github-output {path}: {getattr(e, 'strerror', None) or e}") from None
        for name in (f"{self.args.github_prefix}{name}" for name in _OUTPUTS):
            if any(line.startswith(f"{name}=") for line in known.splitlines()):
                more = "give --github-prefix to plan several suites in one step"
                raise UsageError(f"{path} already has {name!r}; {more}")

    def write_outputs(self, path: Path, made: dict[str, Any]) -> None:
        compact = {k: v for k, v in made.items() if k != "matrix"}
        values = (made["matrix"], made["partition_count"], compact)
        prefix = self.args.github_prefix
        lines = [f"{prefix}{n}={json.dumps(v, separators=(',', ':'))}\n" for n, v in zip(_OUTPUTS, values, strict=True)]
        try:
            with path.open("a", encoding="utf-8") as f:
                f.write("".join(lines))
        except OSError as e:
            raise NoInputError(f"--github-output {path}: {e.strerror}") from None

    def verify(self) -> int:
        args, files = self.args, self.standalone.files
        if not args.reports.is_dir():
            raise NoInputError(f"--reports {args.reports}: no such folder")
        parsed = self.parse(args.config, args.suite or (), "--suite")
        suites = args.suite or [s for s, cases in parsed.suites.items() if cases or files.get(s)]
        alone = {s: [STANDALONE_PREFIX + f for f in files.get(s, [])] for s in parsed.suites}
        expected = {s: [c.id for c in parsed.suites[s] if c.condition is None] + alone[s] for s in suites}
        conditional = {s: [c.id for c in parsed.suites[s] if c.condition is not None] for s in suites}
        executed = read_reports(args.reports)
        missing, skipped, broken = executed.missing(expected), executed.missing(conditional), executed.broken()
        unexpected = executed.unexpected({s: {c.id for c in cases} | {*alone[s]} for s, cases in parsed.suites.items()})
        if args.run_suite is None:  # which standalone files there are isn't known then
            unexpected = [i for i in unexpected if not i.startswith(STANDALONE_PREFIX)]
        data = {
            "expected": expected, "missing": missing, "conditional_not_executed": skipped, "errors": broken,
            "unexpected": unexpected, "reports": executed.files, "problems": executed.problems,
            "unresolved": [asdict(u) for u in parsed.unresolved],
        }  # fmt: skip
        lines = []
        for s in suites:
            lines.append(f"{s}: {len(expected[s]) - len(missing.get(s, []))} of {len(expected[s])} expected ran")
            lines += [f"  missing: {i}" for i in missing.get(s, [])]
            lines += [f"  not run, conditional: {i}" for i in skipped.get(s, [])]
        lines += [*(f"unexpected, not in the config: {i}" for i in unexpected), f"{executed.files} reports read"]
        errors = [f"unreadable report {problem}" for problem in executed.problems]
        errors += [f"{i} ended in an error before or after its run" for i in broken]
        if missing:
            errors.append("not executed: " + ", ".join(f"{s}: {' '.join(ids)}" for s, ids in missing.items()))
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        return self.finish([parsed], data, lines, failed=bool(missing or broken))

    def diff(self) -> int:
        both = [self.parse(self.args.old), self.parse(self.args.new)]
        data: dict[str, Any] = {}
        lines = []
        for suite in self.list_to_suite.values():
            before, after = ({c.id: c.condition for c in p.suites[suite]} for p in both)
            added, removed = [i for i in after if i not in before], [i for i in before if i not in after]
            changed = [i for i in after if i in before and before[i] != after[i]]
            changes = [{"id": i, "old": before[i], "new": after[i]} for i in changed]
            if suite not in data:
                lines.append(f"{suite}: {len(added)} added, {len(removed)} removed")
                lines += [*(f"  + {i}" for i in added), *(f"  - {i}" for i in removed)]
                lines += [f"  ~ {i}: {before[i] or 'always'} -> {after[i] or 'always'}" for i in changed]
            data[suite] = {"added": added, "removed": removed, "changed": changes}
        unresolved = {name: [asdict(u) for u in p.unresolved] for name, p in zip(("old", "new"), both, strict=True)}
        return self.finish(both, {"suites": data, "unresolved": unresolved}, lines)


def main(argv: Sequence[str] | None, list_to_suite: Mapping[str, str]) -> int:
    """Run a command; returns its exit code and prints errors, never a traceback, for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        return int(getattr(_Run(args, list_to_suite), args.command)())
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_OK
    except (UsageError, BaselineError, NoInputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USAGE if isinstance(e, (UsageError, BaselineError)) else EXIT_NO_INPUT
