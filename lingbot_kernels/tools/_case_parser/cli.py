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
from .results import (
    Options,
    ParsedCase,
    ParsedConfig,
    SourceError,
    StandaloneData,
    parse_config,
    parse_standalone,
)

EXIT_OK, EXIT_FAILED, EXIT_UNRESOLVED, EXIT_STOPPED, EXIT_USAGE, EXIT_NO_INPUT = 0, 1, 2, 3, 64, 66


class UsageError(Exception):
    """Arguments that can't be used."""


class NoInputError(Exception):
    """A file or folder that isn't there."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return value


def _mapping(text: str) -> tuple[str, str]:
    name, sep, suite = text.partition("=")
    if not (sep and name.isidentifier() and suite):
        raise argparse.ArgumentTypeError(f"must be NAME=SUITE, got {text!r}")
    return name, suite


def _identifier(text: str) -> str:
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"must be a Python name, got {text!r}")
    return text


def _assumption(text: str) -> tuple[str, bool]:
    name, _, value = text.rpartition("=")
    if value not in ("True", "False") or not name.strip():
        raise argparse.ArgumentTypeError(f"must be CONDITION=True or CONDITION=False, got {text!r}")
    try:
        name = ast.unparse(ast.parse(name.strip(), mode="eval"))
    except SyntaxError:  # such as `import x`
        name = name.strip()
    negated = name.startswith("not ")
    return name.removeprefix("not "), (value == "True") != negated


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; usage errors raise `UsageError`."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--run-suite", type=Path, metavar="FILE", help="run-suite file with STANDALONE_FILES and their estimates"
    )
    common.add_argument("--baselines", type=Path, metavar="FILE", help="performance baselines, for the estimates")
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--strict", action="store_true", help="exit 2 when anything is unresolved")
    common.add_argument(
        "--list",
        dest="lists",
        action="append",
        type=_mapping,
        metavar="NAME=SUITE",
        help="a list and its suite, in place of the built-in map",
    )
    common.add_argument("--case-class", type=_identifier, default="DiffusionTestCase", metavar="NAME")
    common.add_argument("--id-param", type=_identifier, default="id", metavar="NAME")
    common.add_argument("--root", type=Path, metavar="DIR", help="folder in which absolute imports start")
    common.add_argument(
        "--scope",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder whose modules are executed (default: the config's); everything else is a stub",
    )
    common.add_argument(
        "--assume",
        type=_assumption,
        action="append",
        default=[],
        metavar="CONDITION=BOOL",
        help="fix an unknown test, such as 'is_hip()=False'",
    )
    common.add_argument("--static", action="store_true", help="read the syntax tree only; run nothing")
    common.add_argument("--timeout", type=_positive, default=Options.timeout, metavar="S")
    common.add_argument("--allow-empty", action="store_true", help="no case at all is no failure")
    parser = _Parser(
        prog="diffusion_case_parser",
        description="Which test cases a config declares. The config's own code is run, under stubs, without --static.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    p = commands.add_parser("list", parents=[common], help="cases by suite, and what is unresolved")
    p.add_argument("config", type=Path)
    p.add_argument("--require", action="append", default=[], metavar="SUITE", help="exit 1 when this suite has no case")
    p = commands.add_parser("plan", parents=[common], help="partitions of a suite for parallel jobs")
    p.add_argument("config", type=Path)
    p.add_argument("--suite", required=True)
    p.add_argument("--min-time", type=_positive, default=1200.0, metavar="S")
    p.add_argument("--target-time", type=_positive, default=1800.0, metavar="S")
    p.add_argument("--max-time", type=_positive, default=2400.0, metavar="S")
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
        self.options = Options(
            case_class=args.case_class,
            id_param=args.id_param,
            root=args.root,
            scope=args.scope,
            assume=dict(args.assume),
            timeout=args.timeout,
            static=args.static,
        )
        self.baselines: dict[str, float] = {}
        if args.baselines is not None:
            self.baselines = load_baselines(args.baselines if args.baselines.is_dir() else self.file(args.baselines))
        self.standalone = StandaloneData()
        if args.run_suite is not None:
            try:
                self.standalone = parse_standalone(self.file(args.run_suite), self.options)
            except SourceError as e:
                raise UsageError(f"--run-suite {args.run_suite}:{e.line}:{e.column}: {e.reason}") from None

    @staticmethod
    def file(path: Path) -> Path:
        try:
            found = path.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise NoInputError(f"{path}: no such file")
        return path

    def parse(self, path: Path) -> ParsedConfig:
        parsed = parse_config(self.file(path), self.list_to_suite, self.options)
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

    def case_json(self, case: ParsedCase) -> dict[str, Any]:
        return {
            "id": case.id,
            "list": case.list,
            "line": case.line,
            "condition": case.condition,
            "est_time": self.estimate(case.id),
        }

    def exit_code(self, *configs: ParsedConfig, failed: bool = False) -> int:
        """The code of a command that read `configs`; `failed`: what it checks doesn't hold."""
        if any(not c.readable for c in configs):
            return EXIT_UNRESOLVED
        if any(c.stopped for c in configs):
            return EXIT_STOPPED
        if not self.args.allow_empty and not any(configs[-1].suites.values()):
            print("error: no case at all was found (--allow-empty takes that)", file=sys.stderr)
            failed = True
        if failed:
            return EXIT_FAILED
        return EXIT_UNRESOLVED if self.args.strict and any(c.unresolved for c in configs) else EXIT_OK

    # -- commands --------------------------------------------------------------------------------------------------

    def list(self) -> int:
        parsed = self.parse(self.args.config)
        unknown = [s for s in self.args.require if s not in parsed.suites]
        if unknown:
            raise UsageError(
                f"--require {unknown[0]}: no list belongs to this suite; suites: {', '.join(parsed.suites)}"
            )
        empty = [s for s in self.args.require if not parsed.suites[s]]
        if self.args.json:
            data: dict[str, Any] = {
                "suites": {s: [self.case_json(c) for c in cases] for s, cases in parsed.suites.items()},
                "unresolved": [asdict(u) for u in parsed.unresolved],
                "duplicates": [asdict(u) for u in parsed.duplicates],
            }
            if parsed.stopped:
                data["stopped"] = [asdict(u) for u in parsed.stopped]
            if parsed.other_lists:
                data["other_lists"] = parsed.other_lists
            if self.args.run_suite is not None:
                data["standalone"] = self.standalone.files
            print(json.dumps(data, indent=2))
        else:
            self.print_list(parsed)
        for suite in empty:
            print(f"error: required suite {suite} has no cases", file=sys.stderr)
        return self.exit_code(parsed, failed=bool(empty))

    def print_list(self, parsed: ParsedConfig) -> None:
        for suite, cases in parsed.suites.items():
            total = sum(self.estimate(c.id) for c in cases)
            print(f"{suite}: {len(cases)} cases, {total:.0f} s")
            for c in cases:
                condition = "" if c.condition is None else f"  if {c.condition}"
                print(f"  {c.id}  [{c.list}, line {c.line}, {self.estimate(c.id):.0f} s]{condition}")
            for f in self.standalone.files.get(suite, []):
                seconds = self.standalone.est_times.get(suite, {}).get(f)
                print(f"  {STANDALONE_PREFIX}{f}  [{'no estimate' if seconds is None else f'{seconds:.0f} s'}]")
        for name, ids in parsed.other_lists.items():
            print(f"note: no suite takes list {name} ({len(ids)} cases)")
        for d in parsed.duplicates:
            where = f"in suite {d.suites[0]}" if len(d.suites) == 1 else f"in suites {', '.join(d.suites)}"
            print(f"duplicate: {d.id} {where}, lines {', '.join(map(str, d.lines))}")
        self.print_unresolved(parsed, sys.stdout)

    @staticmethod
    def print_unresolved(parsed: ParsedConfig, to: Any) -> None:
        for u in parsed.unresolved:
            print(f"unresolved: {u.file}:{u.line}:{u.column}: {u.reason}", file=to)
            if u.source:
                print(f"    {u.source}", file=to)

    def plan(self) -> int:
        args = self.args
        if not args.min_time <= args.target_time <= args.max_time:
            given = f"{args.min_time}, {args.target_time}, {args.max_time}"
            raise UsageError(f"--min-time <= --target-time <= --max-time must hold, got {given}")
        parsed = self.parse(args.config)
        suite = args.suite
        if suite not in parsed.suites:
            raise UsageError(f"--suite {suite}: no list belongs to this suite; suites: {', '.join(parsed.suites)}")
        times = self.standalone.est_times.get(suite, {})
        items = [Item("case", c.id, self.estimate(c.id)) for c in parsed.suites[suite]]
        items += [
            Item("standalone", f, times.get(f, DEFAULT_EST_TIME_SECONDS)) for f in self.standalone.files.get(suite, [])
        ]
        made = plan(
            suite,
            items,
            min_time=args.min_time,
            target_time=args.target_time,
            max_time=args.max_time,
            limit=args.max_partitions,
        )
        self.print_unresolved(parsed, sys.stderr)
        code = self.exit_code(parsed)
        if args.github_output is not None and code == EXIT_OK:
            self.write_outputs(args.github_output, made)
        print(json.dumps(made, indent=2))
        return code

    def write_outputs(self, path: Path, made: dict[str, Any]) -> None:
        prefix = self.args.github_prefix
        compact = {k: v for k, v in made.items() if k != "matrix"}
        values = {
            f"{prefix}matrix": json.dumps(made["matrix"], separators=(",", ":")),
            f"{prefix}partition_count": str(made["partition_count"]),
            f"{prefix}plan": json.dumps(compact, separators=(",", ":")),
        }
        try:
            known = path.read_text(encoding="utf-8") if path.exists() else ""
            taken = [n for n in values if any(line.startswith(f"{n}=") for line in known.splitlines())]
            if taken:
                raise UsageError(
                    f"{path} already has {taken[0]!r}; give --github-prefix to plan several suites in one step"
                )
            with path.open("a", encoding="utf-8") as f:
                f.writelines(f"{name}={value}\n" for name, value in values.items())
        except OSError as e:
            raise NoInputError(f"--github-output {path}: {e.strerror}") from None

    def verify(self) -> int:
        args = self.args
        if not args.reports.is_dir():
            raise NoInputError(f"--reports {args.reports}: no such folder")
        parsed = self.parse(args.config)
        suites = args.suite or [s for s, cases in parsed.suites.items() if cases or self.standalone.files.get(s)]
        unknown = [s for s in suites if s not in parsed.suites]
        if unknown:
            raise UsageError(f"--suite {unknown[0]}: no list belongs to this suite; suites: {', '.join(parsed.suites)}")
        expected = {
            s: [c.id for c in parsed.suites[s] if c.condition is None]
            + [STANDALONE_PREFIX + f for f in self.standalone.files.get(s, [])]
            for s in suites
        }
        conditional = {s: [c.id for c in parsed.suites[s] if c.condition is not None] for s in suites}
        executed = read_reports(args.reports)
        missing = executed.missing(expected)
        skipped = executed.missing(conditional)
        broken = executed.broken()
        files = self.standalone.files
        known = {
            s: {c.id for c in cases} | {STANDALONE_PREFIX + f for f in files.get(s, [])}
            for s, cases in parsed.suites.items()
        }
        unexpected = executed.unexpected(known)
        if args.run_suite is None:  # which standalone files there are isn't known then
            unexpected = [i for i in unexpected if not i.startswith(STANDALONE_PREFIX)]
        if args.json:
            data = {
                "expected": expected,
                "missing": missing,
                "conditional_not_executed": skipped,
                "errors": broken,
                "unexpected": unexpected,
                "reports": executed.files,
                "problems": executed.problems,
                "unresolved": [asdict(u) for u in parsed.unresolved],
            }
            print(json.dumps(data, indent=2))
        else:
            for s in suites:
                ran = len(expected[s]) - len(missing.get(s, []))
                print(f"{s}: {ran} of {len(expected[s])} expected ran")
                for i in missing.get(s, []):
                    print(f"  missing: {i}")
                for i in skipped.get(s, []):
                    print(f"  not run, conditional: {i}")
            for i in unexpected:
                print(f"unexpected, not in the config: {i}")
            print(f"{executed.files} reports read")
            self.print_unresolved(parsed, sys.stdout)
        for problem in executed.problems:
            print(f"error: unreadable report {problem}", file=sys.stderr)
        for i in broken:
            print(f"error: {i} ended in an error before or after its run", file=sys.stderr)
        if missing:
            names = ", ".join(f"{s}: {' '.join(ids)}" for s, ids in missing.items())
            print(f"error: not executed: {names}", file=sys.stderr)
        return self.exit_code(parsed, failed=bool(missing or broken))

    def diff(self) -> int:
        old, new = self.parse(self.args.old), self.parse(self.args.new)
        data: dict[str, Any] = {}
        for suite in new.suites:
            before = {c.id: c.condition for c in old.suites[suite]}
            after = {c.id: c.condition for c in new.suites[suite]}
            data[suite] = {
                "added": [i for i in after if i not in before],
                "removed": [i for i in before if i not in after],
                "changed": [
                    {"id": i, "old": before[i], "new": after[i]} for i in after if i in before and before[i] != after[i]
                ],
            }
        if self.args.json:
            unresolved = {"old": [asdict(u) for u in old.unresolved], "new": [asdict(u) for u in new.unresolved]}
            print(json.dumps({"suites": data, "unresolved": unresolved}, indent=2))
        else:
            for suite, d in data.items():
                print(f"{suite}: {len(d['added'])} added, {len(d['removed'])} removed")
                for i in d["added"]:
                    print(f"  + {i}")
                for i in d["removed"]:
                    print(f"  - {i}")
                for c in d["changed"]:
                    print(f"  ~ {c['id']}: {c['old'] or 'always'} -> {c['new'] or 'always'}")
            for parsed in (old, new):
                self.print_unresolved(parsed, sys.stdout)
        return self.exit_code(old, new)


def main(argv: Sequence[str] | None, list_to_suite: Mapping[str, str]) -> int:
    """Run a command; returns its exit code and prints errors, never a traceback, for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        run = _Run(args, list_to_suite)
        command: Any = {"list": run.list, "plan": run.plan, "verify": run.verify, "diff": run.diff}[args.command]
        return int(command())
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except (UsageError, BaselineError) as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USAGE
    except NoInputError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_NO_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_OK
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_NO_INPUT
