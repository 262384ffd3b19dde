"""What a config declares by both readers, and the child interpreter that runs it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SOURCE_BYTES = 4_000_000
PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Unresolved:
    """Something that could hide a case: where it is (line and column from 1), its source line, and why."""

    file: str
    line: int
    column: int
    source: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """An id declared more than once, in one suite (kept once) or in several."""

    id: str
    suites: list[str]
    lists: list[str]
    lines: list[int]


@dataclass(frozen=True)
class ParsedCase:
    """A case: `line` is of the config; `condition` is None where it always exists."""

    id: str
    list: str
    line: int
    condition: str | None


@dataclass
class ParsedConfig:
    """What a config declares. `tests`: tests met whose outcome isn't known; `stopped`: what ended early."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    suites: dict[str, list[ParsedCase]] = field(default_factory=dict)
    other_lists: dict[str, list[str]] = field(default_factory=dict)
    unresolved: list[Unresolved] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    stopped: list[Unresolved] = field(default_factory=list)
    readable: bool = True
    tests: int = 0
    worlds: int = 0
    assumed: list[str] = field(default_factory=list)


@dataclass
class StandaloneData:
    """Standalone test files of a run-suite file and their estimates, by suite."""

    files: dict[str, list[str]] = field(default_factory=dict)
    est_times: dict[str, dict[str, float]] = field(default_factory=dict)
    unresolved: list[Unresolved] = field(default_factory=list)
    stopped: list[Unresolved] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How a config is read. `scope`: folders that are executed; `root`: where absolute imports start."""

    case_class: str = "DiffusionTestCase"
    id_param: str = "id"
    root: Path | None = None
    scope: Sequence[Path] = ()
    assume: Mapping[str, bool] = field(default_factory=dict)
    timeout: float = 10.0
    static: bool = False


def read_tree(path: Path) -> tuple[ast.Module, str]:
    """Tree and text of a file. Raises `SyntaxError` for what isn't Python, `OSError` for a missing file."""
    data = path.read_bytes()
    reason, place = f"larger than {MAX_SOURCE_BYTES:,} bytes", (1, 1, "")
    try:
        if len(data) <= MAX_SOURCE_BYTES:
            return ast.parse(data, str(path)), data.decode("utf-8-sig", "replace")
    except SyntaxError as e:
        reason = f"syntax error: {e.msg} ({PYTHON})"
        place = (e.lineno or 1, max(1, e.offset or 1), (e.text or "").strip()[:200])
    except (ValueError, RecursionError, MemoryError) as e:
        reason = f"can't be read: {e or 'nested too deeply'} ({PYTHON})"
    raise SyntaxError(reason, (str(path), *place))


def located(path: Path, entries: Sequence[Sequence[Any]]) -> list[Unresolved]:
    """Reports with their source lines, those of the config under the name `path`."""
    known: dict[str, list[str]] = {}
    out: dict[Unresolved, None] = {}
    for file, line, column, reason in entries:
        if file not in known:
            known[file] = []
            with contextlib.suppress(OSError):
                known[file] = Path(file).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        source = known[file][line - 1] if 0 < line <= len(known[file]) else ""
        column = column or len(source) - len(source.lstrip()) + 1  # not known before Python 3.11: the statement's
        shown = str(path) if file == os.path.realpath(path) else file
        out[Unresolved(shown, line, column, source.strip()[:200], reason)] = None
    return sorted(out, key=lambda u: (u.file, u.line, u.column))


def request_for(path: Path, lists: Mapping[str, str], options: Options, *, standalone: bool = False) -> dict[str, Any]:
    """What `worlds.answer` is asked about `path`.

    Absolute imports start in the config's folder, in those above it up to `root` (else the repository's), and in the
    root's ``python`` and ``src``, from which the config's own name starts too.
    """
    path = Path(os.path.realpath(path))
    folders = [path.parent, *path.parent.parents]
    top = Path(os.path.realpath(options.root)) if options.root is not None else None
    top = top or next((p for p in folders if (p / ".git").exists()), Path(path.anchor))
    roots = [p for p in folders if p == top or top in p.parents] or folders[:1]
    sources = [p for p in (top / "src", top / "python") if p.is_dir()]
    start = next((i for i, p in enumerate(roots) if p in sources or not p.name.isidentifier()), len(roots) - 1)
    scope = [os.path.realpath(s) for s in options.scope] or [str(path.parent)]
    return {
        "config": str(path), "name": ".".join(path.relative_to(roots[start]).with_suffix("").parts),
        "case_class": options.case_class, "id_param": options.id_param, "lists": dict(lists),
        "scope": [*scope, str(path)],
        "roots": list(map(str, dict.fromkeys([*roots, *sources]))), "assume": dict(options.assume),
        "seconds": options.timeout, "standalone": standalone,
    }  # fmt: skip


def run_child(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `worlds.answer`, in a child interpreter."""
    here = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {here!r}); from _case_parser.worlds import main; sys.path.pop(0); main()"
    command = [sys.executable, "-I", "-S", "-B", "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, cwd="/") as child:
        try:
            out, err = child.communicate(json.dumps(request).encode(), timeout=request["seconds"] + 5)
            if child.returncode == 0:
                return dict(json.loads(out))
            failed = f"the child interpreter failed: {err.decode(errors='replace').strip()[-400:]}"
        except subprocess.TimeoutExpired:
            failed = f"doesn't end within {request['seconds']:g} s"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
    empty: dict[str, Any] = {name: [] for name in ("duplicates", "unresolved", "made", "assumed")}
    empty |= {"suites": {s: [] for s in request["lists"].values()}, "lists": {}, "other": {}, "tests": 0, "worlds": 0}
    return {**empty, "stopped": [[request["config"], 1, 1, failed]]}


def parse_config(
    path: Path,
    list_to_suite: Mapping[str, str],
    options: Options,
    run: Callable[[dict[str, Any]], dict[str, Any]] = run_child,
) -> ParsedConfig:
    """Read a config by both readers. An unreadable one gives no cases and says why; a missing one raises `OSError`."""
    from .visitor import DiffusionTestCaseVisitor

    try:
        tree, text = read_tree(path)
    except SyntaxError as e:
        reason = Unresolved(str(path), e.lineno or 1, e.offset or 1, e.text or "", e.msg)
        return ParsedConfig(suites={s: [] for s in list_to_suite.values()}, unresolved=[reason], readable=False)
    names: Any = {"case_class": options.case_class, "id_param": options.id_param}
    visitor = DiffusionTestCaseVisitor(path, list_to_suite=list_to_suite, source=text, **names)
    visitor.visit(tree)
    if options.static:
        return visitor.config()
    data = run(request_for(path, list_to_suite, options))
    known = {c[0] for cases in data["suites"].values() for c in cases}
    listed = {n: ids for n, ids in data["other"].items() if not known.issuperset(ids)}
    if not data["stopped"]:  # what it made and dropped again it dropped by its own code
        known |= set(data["made"])
    unseen = [
        [os.path.realpath(path), f.line, f.column, f"the second reader sees {f.id!r} in {f.list}, which no world has"]
        for f in visitor.found
        if f.id not in known and not (options.assume and f.condition)
    ]
    return ParsedConfig(
        lists=data["lists"] | data["other"],
        suites={s: [ParsedCase(*c) for c in cases] for s, cases in data["suites"].items()},
        other_lists=listed,
        unresolved=located(path, [*data["unresolved"], *data["stopped"], *unseen]),
        duplicates=[Duplicate(*d) for d in data["duplicates"]],
        stopped=located(path, data["stopped"]),
        tests=data["tests"],
        worlds=data["worlds"],
        assumed=data["assumed"],
    )


def parse_standalone(path: Path, options: Options) -> StandaloneData:
    """``STANDALONE_FILES`` and ``STANDALONE_FILE_EST_TIMES`` of a run-suite file; only literals where `options.static`.

    Raises `OSError` for a missing file, `SyntaxError` for one that isn't Python.
    """
    tree, _ = read_tree(path)
    names = ("STANDALONE_FILES", "STANDALONE_FILE_EST_TIMES")
    out, entries = StandaloneData(), list[list[Any]]()
    if options.static:
        for name, value in (
            (t.id, n.value)
            for n in tree.body
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name) and t.id in names
        ):
            try:
                for suite, held in ast.literal_eval(value).items():
                    pairs = held.items() if isinstance(held, dict) else ((f, None) for f in held)
                    entries += [[suite], *([suite, f, s] for f, s in pairs)]
            except (ValueError, TypeError, AttributeError):
                out.unresolved += located(path, [[os.path.realpath(path), value.lineno, 0, f"{name} isn't a literal"]])
    else:
        data = run_child(request_for(path, {n: n for n in names}, options, standalone=True))
        entries = [json.loads(c[0]) for cases in data["suites"].values() for c in cases]
        relevant = [
            e for e in data["unresolved"] if any(w in e[3] for w in ("STANDALONE", "star import", "needs a value"))
        ]
        out.stopped = located(path, data["stopped"])
        out.unresolved = located(path, [*relevant, *data["stopped"]])
    for suite, *rest in entries:
        if rest and rest[1] is not None:
            out.est_times.setdefault(suite, {})[rest[0]] = float(rest[1])
        elif rest[:1] and rest[0] not in out.files.setdefault(suite, []):
            out.files[suite].append(rest[0])
        elif not rest:
            out.files.setdefault(suite, [])
    return out
