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
from collections.abc import Mapping, Sequence
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

CASE_CLASS = results.Options.case_class
ID_PARAM = results.Options.id_param
BASELINE_REL_PATH = "python/sglang/multimodal_gen/test/server/perf_baselines.json"
RUN_SUITE_REL_PATH = "python/sglang/multimodal_gen/test/run_suite.py"


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
    run_suite_path = Path(run_suite_path)
    repo_root = Path(repo_root)
    tree, _ = results.read_tree(run_suite_path)
    found: dict[str, tuple[int, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in ("ONE_GPU_CASES", "TWO_GPU_CASES"):
                    found[alias.name] = (node.level, node.module or "")
    names = ", ".join(f"{name} from {'.' * level}{module}" for name, (level, module) in sorted(found.items()))
    if len(found) < 2:
        raise RuntimeError(
            f"{run_suite_path} must import both ONE_GPU_CASES and TWO_GPU_CASES, imports {names or None}"
        )
    if len(set(found.values())) > 1:
        raise RuntimeError(f"{run_suite_path} must import both lists from one module, imports {names}")
    level, module = found["ONE_GPU_CASES"]
    relative = Path(*module.split(".")) if module else Path("__init__")
    if level:
        bases = [run_suite_path.resolve().parents[level - 1]]
    else:
        bases = [repo_root, repo_root / "python", repo_root / "src", run_suite_path.parent]
    tried = [
        p for base in bases for p in (base / relative.parent / f"{relative.name}.py", base / relative / "__init__.py")
    ]
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


def get_case_est_time(case_id: str, baselines: Mapping[str, float]) -> float:
    """Estimated seconds of a case: its baseline, else the default."""
    return baselines.get(case_id, DEFAULT_EST_TIME_SECONDS)


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
            cases=[DiffusionCaseInfo(c.id, suite, get_case_est_time(c.id, baselines)) for c in cases],
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
