"""What a config declares, and the command that has it run in a child interpreter."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT_SECONDS = 10.0
MAX_SOURCE_BYTES = 4_000_000
PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}"


class SourceError(Exception):
    """A file that can't be read as Python: `line` and `column` (1-based) are where known, else 1."""

    def __init__(self, reason: str, line: int = 1, column: int = 1, source: str = "") -> None:
        super().__init__(reason)
        self.reason, self.line, self.column, self.source = reason, line, column, source


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

    case_class: str
    id_param: str
    root: Path | None = None
    scope: Sequence[Path] = ()
    assume: Mapping[str, bool] = field(default_factory=dict)
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    static: bool = False


def as_json(items: list[Any]) -> list[dict[str, Any]]:
    return [asdict(i) for i in items]


def read_tree(path: Path) -> tuple[ast.Module, str]:
    """Tree and text of a file. Raises `SourceError` for what isn't Python, `OSError` for a missing file."""
    data = path.read_bytes()
    if len(data) > MAX_SOURCE_BYTES:
        raise SourceError(f"larger than {MAX_SOURCE_BYTES:,} bytes")
    try:
        tree = ast.parse(data, str(path))
    except SyntaxError as e:
        source = (e.text or "").strip()[:200]
        raise SourceError(f"syntax error: {e.msg} ({PYTHON})", e.lineno or 1, max(1, e.offset or 1), source) from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise SourceError(f"can't be read: {e or 'nested too deeply'} ({PYTHON})") from None
    return tree, data.decode("utf-8-sig", "replace")


class Lines:
    """Source lines of files, for reports."""

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}

    def at(self, file: str, line: int, column: int, reason: str) -> Unresolved:
        if file not in self.known:
            try:
                self.known[file] = Path(file).read_text(encoding="utf-8-sig", errors="replace").splitlines()
            except OSError:
                self.known[file] = []
        lines = self.known[file]
        source = lines[line - 1] if 0 < line <= len(lines) else ""
        if column < 1:  # not known before Python 3.11: the statement's
            column = len(source) - len(source.lstrip()) + 1
        return Unresolved(file, line, column, source.strip()[:200], reason)


def roots_of(path: Path, root: Path | None) -> list[Path]:
    """Folders in which absolute imports start: the config's, those above it up to the root, the root's sources."""
    folder = path.parent
    top = root.resolve() if root is not None else None
    if top is None:
        top = next((p for p in (folder, *folder.parents) if (p / ".git").exists()), Path(path.anchor))
    above = [p for p in (folder, *folder.parents) if p == top or top in p.parents]
    return [*(above or [folder]), *(p for p in (top, top / "src", top / "python") if p.is_dir() and p not in above)]


def module_name(path: Path, roots: Sequence[Path]) -> str:
    """The dotted name by which a config is imported: from the first folder above it that can't be a package."""
    base = path.parent
    named = {r for r in roots if r.name in ("python", "src") and not (r / "__init__.py").exists()}
    source = next((r for r in roots if r in named and r in path.parents), None)
    while base in roots and base.parent in roots and base != source and base.name.isidentifier():
        base = base.parent
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts)


def request_for(path: Path, lists: Mapping[str, str], options: Options, *, standalone: bool = False) -> dict[str, Any]:
    """What `worlds.answer` is asked about `path`."""
    path = Path(os.path.realpath(path))
    roots = roots_of(path, options.root)
    scope = [Path(os.path.realpath(s)) for s in options.scope] or [path.parent]
    return {
        "config": str(path),
        "name": module_name(path, roots),
        "case_class": options.case_class,
        "id_param": options.id_param,
        "lists": dict(lists),
        "scope": [str(s) for s in [*scope, *([] if path.parent in scope else [path])]],
        "roots": [str(r) for r in roots],
        "assume": dict(options.assume),
        "seconds": options.timeout,
        "standalone": standalone,
    }


def run_child(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `worlds.answer`, in a child interpreter."""
    seconds = request["seconds"]
    here = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {here!r}); from _case_parser.worlds import main; sys.path.pop(0); main()"
    command = [sys.executable, "-I", "-S", "-B", "-c", code]
    failed = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    ) as child:
        try:
            out, err = child.communicate(json.dumps(request).encode(), timeout=seconds + 5)
            if child.returncode == 0:
                return dict(json.loads(out))
            failed = f"the child interpreter failed: {err.decode(errors='replace').strip()[-400:]}"
        except subprocess.TimeoutExpired:
            failed = f"doesn't end within {seconds:g} s"
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except OSError:
                child.kill()
    return {
        "suites": {s: [] for s in request["lists"].values()},
        "lists": {}, "other": {}, "duplicates": [], "unresolved": [],
        "stopped": [[request["config"], 1, 1, failed]], "made": [], "assumed": [], "tests": 0, "runs": 0,
    }  # fmt: skip


def parse_config(
    path: Path,
    list_to_suite: Mapping[str, str],
    options: Options,
    run: Callable[[dict[str, Any]], dict[str, Any]] = run_child,
) -> ParsedConfig:
    """Read a config by both readers. An unreadable one gives no cases and says why; a missing one raises `OSError`."""
    from .visitor import CaseVisitor

    try:
        tree, text = read_tree(path)
    except SourceError as e:
        empty: dict[str, list[ParsedCase]] = {s: [] for s in list_to_suite.values()}
        reason = Unresolved(str(path), e.line, e.column, e.source, e.reason)
        return ParsedConfig(suites=empty, unresolved=[reason], readable=False)
    visitor = CaseVisitor(
        path, list_to_suite=list_to_suite, case_class=options.case_class, id_param=options.id_param, source=text
    )
    visitor.visit(tree)
    if options.static:
        return visitor.config()
    shown, real = str(path), os.path.realpath(path)
    data = run(request_for(path, list_to_suite, options))
    lines = Lines()

    def at(entry: list[Any]) -> Unresolved:
        found = lines.at(*entry)
        return found if found.file != real else Unresolved(shown, found.line, found.column, found.source, found.reason)

    known = {c[0] for cases in data["suites"].values() for c in cases}
    if not data["stopped"]:  # what it made and dropped again it dropped by its own code
        known |= set(data["made"])
    unseen = [
        at([real, f.line, f.column, f"the second reader sees {f.id!r} in {f.list}, which no world has"])
        for f in visitor.found
        if f.id not in known
    ]
    stopped = [at(e) for e in data["stopped"]]
    unresolved = dict.fromkeys([*map(at, data["unresolved"]), *stopped, *unseen])
    return ParsedConfig(
        lists=data["lists"],
        suites={s: [ParsedCase(*c) for c in cases] for s, cases in data["suites"].items()},
        other_lists=_unlisted(data),
        unresolved=sorted(unresolved, key=lambda u: (u.file, u.line, u.column, u.reason)),
        duplicates=[Duplicate(*d) for d in data["duplicates"]],
        stopped=stopped,
        tests=data["tests"],
        worlds=data["runs"],
        assumed=data["assumed"],
    )


def _unlisted(data: dict[str, Any]) -> dict[str, list[str]]:
    taken = {c[0] for cases in data["suites"].values() for c in cases}
    return {n: ids for n, ids in data["other"].items() if any(i not in taken for i in ids)}


def parse_standalone(path: Path, options: Options) -> StandaloneData:
    """``STANDALONE_FILES`` and ``STANDALONE_FILE_EST_TIMES`` of a run-suite file.

    Raises `OSError` for a missing file, `SourceError` for one that isn't Python.
    """
    tree, _ = read_tree(path)
    lines = Lines()
    out = StandaloneData()
    if options.static:
        entries, unresolved = _static_standalone(tree, path)
        out.unresolved = [lines.at(str(path), *u) for u in unresolved]
    else:
        names = {"STANDALONE_FILES": "files", "STANDALONE_FILE_EST_TIMES": "times"}
        data = run_child(request_for(path, names, options, standalone=True))
        entries = [(kind, json.loads(c[0])) for kind, cases in data["suites"].items() for c in cases]
        out.stopped = [lines.at(*e) for e in data["stopped"]]
        relevant = [e for e in data["unresolved"] if "STANDALONE" in e[3] or "star import" in e[3] or "needs a" in e[3]]
        out.unresolved = [*(lines.at(*e) for e in relevant), *out.stopped]
    for kind, (suite, *rest) in entries:
        if kind == "files":
            known = out.files.setdefault(suite, [])
            known += [f for f in rest if f not in known]
        else:
            times = out.est_times.setdefault(suite, {})
            if rest:
                times[rest[0]] = rest[1]
    return out


def _static_standalone(tree: ast.Module, path: Path) -> tuple[list[tuple[str, list[Any]]], list[tuple[int, int, str]]]:
    """The two dicts where they are literals."""
    entries: list[tuple[str, list[Any]]] = []
    unresolved: list[tuple[int, int, str]] = []
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        for name, kind in (("STANDALONE_FILES", "files"), ("STANDALONE_FILE_EST_TIMES", "times")):
            if name not in names or node.value is None:  # type: ignore[attr-defined]
                continue
            try:
                value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
                for suite, held in value.items():
                    entries.append((kind, [suite]))
                    pairs = [[f] for f in held] if kind == "files" else [[f, float(s)] for f, s in held.items()]
                    entries += [(kind, [suite, *p]) for p in pairs]
            except (ValueError, TypeError, AttributeError):
                unresolved.append((node.lineno, 1, f"{name} isn't a literal"))  # type: ignore[attr-defined]
    return entries, unresolved
