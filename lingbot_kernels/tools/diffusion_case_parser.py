#!/usr/bin/env python3
"""Which cases a diffusion test config declares: no GPU, no torch, no package installed.

Runs by path: ``python lingbot_kernels/tools/diffusion_case_parser.py list CONFIG``. The config's own code is run, under
stubs, in a child interpreter; a second reader reads its syntax tree (alone with ``--static``). What can't be resolved
is reported with its place and reason, so that no case is lost in silence.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from ._case_parser import cli, planning, results
    from ._case_parser.planning import DEFAULT_EST_TIME_SECONDS, STARTUP_OVERHEAD_SECONDS, load_baselines
    from ._case_parser.visitor import CASE_LIST_TO_SUITE, DiffusionTestCaseVisitor
else:  # run or loaded by path: the package of its parts lies beside this file
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from _case_parser import cli, planning, results
        from _case_parser.planning import DEFAULT_EST_TIME_SECONDS, STARTUP_OVERHEAD_SECONDS, load_baselines
        from _case_parser.visitor import CASE_LIST_TO_SUITE, DiffusionTestCaseVisitor
    finally:
        sys.path.pop(0)
    sys.modules.setdefault(__name__, sys.modules["_case_parser"])  # dataclasses look their module up by name


class UnresolvedCaseWarning(UserWarning):
    """Something in a config could hide a case."""


@dataclass
class DiffusionCaseInfo:
    """A case with its suite and estimated seconds."""

    case_id: str
    suite: str
    est_time: float


@dataclass
class DiffusionSuiteInfo:
    """A suite: its cases, its standalone files, their estimated seconds, and those without an estimate."""

    suite: str
    cases: list[DiffusionCaseInfo]
    standalone_files: list[str]
    standalone_est_times: dict[str, float]
    missing_standalone_estimates: list[str]


def resolve_case_config_path(repo_root: Path, run_suite_path: Path) -> Path:
    """The file from which the run-suite file imports ``ONE_GPU_CASES`` and ``TWO_GPU_CASES``, below `repo_root`.

    Raises `RuntimeError` when both aren't imported or come from two modules; `FileNotFoundError` when the module isn't
    there.
    """
    repo_root, run_suite_path = Path(repo_root), Path(run_suite_path)
    imports = [n for n in ast.walk(results.read_tree(run_suite_path)[0]) if isinstance(n, ast.ImportFrom)]
    wanted = ("ONE_GPU_CASES", "TWO_GPU_CASES")
    found = {a.name: (n.level, n.module or "") for n in imports for a in n.names if a.name in wanted}
    names = ", ".join(f"{name} from {'.' * level}{module}" for name, (level, module) in sorted(found.items()))
    if len(found) < 2:
        raise RuntimeError(f"{run_suite_path} must import both {' and '.join(wanted)}, imports {names or None}")
    if len(set(found.values())) > 1:
        raise RuntimeError(f"{run_suite_path} must import both lists from one module, imports {names}")
    level, module = found["ONE_GPU_CASES"]
    relative = Path(*module.split(".")) if module else Path("__init__")
    bases = [repo_root, repo_root / "python", repo_root / "src", run_suite_path.parent]
    if level:
        bases = [run_suite_path.resolve().parents[level - 1]]
    tried = [b / p for b in bases for p in (relative.with_suffix(".py"), relative / "__init__.py")]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{'.' * level}{module} isn't there; looked for {', '.join(map(str, tried))}")


def parse_testcase_configs(config_path: Path) -> dict[str, list[str]]:
    """Ids by list name, for the lists of `CASE_LIST_TO_SUITE`. Each unresolved place is warned of.

    The config's own code is run. Raises `OSError` for a missing file and `SyntaxError` for an unreadable one.
    """
    parsed = _parse(Path(config_path))
    return {name: ids for name, ids in parsed.lists.items() if name in CASE_LIST_TO_SUITE}


def parse_run_suite_standalone_data(run_suite_path: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """Standalone files of a run-suite file, suite -> files, and their estimates, suite -> file -> seconds."""
    data = results.parse_standalone(Path(run_suite_path), results.Options())
    _warn(data.unresolved)
    return data.files, data.est_times


def collect_diffusion_suites(
    case_config_path: Path, run_suite_path: Path, baseline_path: Path
) -> dict[str, DiffusionSuiteInfo]:
    """Every suite of `CASE_LIST_TO_SUITE` with cases, standalone files and estimates; warns of unresolved places."""
    parsed = _parse(Path(case_config_path))
    files, est_times = parse_run_suite_standalone_data(run_suite_path)
    baselines = load_baselines(Path(baseline_path))
    suites = {}
    for suite, cases in parsed.suites.items():
        times = est_times.get(suite, {})
        suites[suite] = DiffusionSuiteInfo(
            suite=suite,
            cases=[DiffusionCaseInfo(c.id, suite, baselines.get(c.id, DEFAULT_EST_TIME_SECONDS)) for c in cases],
            standalone_files=list(files.get(suite, [])),
            standalone_est_times=dict(times),
            missing_standalone_estimates=[f for f in files.get(suite, []) if f not in times],
        )
    return suites


def _parse(path: Path) -> results.ParsedConfig:
    parsed = results.parse_config(path, CASE_LIST_TO_SUITE, results.Options())
    if not parsed.readable:
        u = parsed.unresolved[0]
        raise SyntaxError(u.reason, (u.file, u.line, u.column, u.source))
    _warn(parsed.unresolved)
    return parsed


def _warn(unresolved: Sequence[results.Unresolved]) -> None:
    for u in unresolved:
        message = f"{u.file}:{u.line}:{u.column}: {u.reason}: {u.source}"
        warnings.warn(message, UnresolvedCaseWarning, stacklevel=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return cli.main(argv, CASE_LIST_TO_SUITE)


__all__ = [
    "DEFAULT_EST_TIME_SECONDS",
    "STARTUP_OVERHEAD_SECONDS",
    "DiffusionTestCaseVisitor",
    "load_baselines",
    "planning",
]

if __name__ == "__main__":
    sys.exit(main())
