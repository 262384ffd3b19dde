"""Runs a config once, in a process of its own that may do nothing but compute, and reads its lists."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import posix
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from .support import Cache, Importer, prepare
from .unknown import ParameterSet, Run, Site, StuckError, Unknown, is_case, line_of, render, start

MEMORY_BYTES = 2 << 30
_RECURSION = 2400  # a rewritten call takes two frames
_REFUSED = (
    "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "tempfile.", "fcntl.", "mmap.", "sqlite3.", "winreg.",
    "msvcrt.", "syslog.", "pty.", "signal.", "ftplib.", "http.", "imaplib.", "poplib.", "smtplib.", "telnetlib.",
    "nntplib.", "urllib.", "webbrowser.", "resource.", "_thread.start_new_thread", "_thread.start_joinable_thread",
)  # fmt: skip
_HARMLESS = {"os.putenv", "os.unsetenv", "os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_UNAUDITED = (
    "mkfifo",
    "mknod",
    "_exit",
    "abort",
    "setuid",
    "setgid",
    "nice",
    "setpriority",
    "unshare",
    "write",
    "writev",
)


class RefusedError(BaseException):
    """The config wanted something that a list of cases needs no right to."""


# -- one run -------------------------------------------------------------------------------------------------------


def run_config(request: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """Execute the config and read it; to be called in a process of its own."""
    run = Run(request)
    start(run)
    importer = Importer(run, request["scope"], request["roots"], cache)
    prepare(importer)
    known = set(sys.modules)
    config = request["config"]
    module = types.ModuleType(request["name"])
    parts = request["name"].rpartition(".")
    module.__package__ = parts[0]
    module.__file__ = config
    sys.modules[module.__name__] = module
    importer.by_path[config] = module
    hooks = _hooks(importer)
    sys.setrecursionlimit(_RECURSION)
    status, error = "ok", None
    guard = _Guard(run, request["scope"])
    run.branch = lambda: _branch(guard, request["branch_seconds"])  # type: ignore[method-assign]
    sys.addaudithook(guard)
    try:
        importer.execute(config, module)
    except StuckError as e:
        status = "stuck"
        error = (_place(run, e), str(e))
    except BaseException as e:
        status = "limit" if isinstance(e, (RecursionError, MemoryError)) else "raise"
        error = (_place(run, e), _describe(e))
    guard.reading = True
    whats = ("installs an import hook", "changes built-in names")
    for what, before, now in zip(whats, hooks, _hooks(importer), strict=True):
        if before != now:
            run.refused.append(((config, 1, 1), what))
    out = _Reader(run, module, request).read()
    if run.refused:
        status, error = "refused", (run.refused[0][0], run.refused[0][1])
    out |= {
        "status": status,
        "error": error,
        "trace": run.trace[run.prefix :],
        "prefix": run.prefix,
        "flipped": run.flipped,
        "made": run.made,
        "assumed": sorted(run.assumed_met),
        "files": list(run.tries),
        "located": importer.located,
        "modules": [m for m in sys.modules if m not in known and m.partition(".")[0] in sys.stdlib_module_names],
    }
    return out


def _hooks(importer: Importer) -> tuple[list[Any], list[Any]]:
    """What a config must leave as it is, by identity."""
    names = [(k, id(v)) for held in (vars(builtins), importer.names) for k, v in held.items() if k != "_"]
    return [list(map(id, sys.meta_path)), list(map(id, sys.path_hooks))], sorted(names)


def _place(run: Run, error: BaseException) -> Site:
    if isinstance(error, SyntaxError) and error.filename in run.tries:
        return error.filename, error.lineno or 1, error.offset or 1
    found = None
    tb = error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename in run.tries:
            found = (tb.tb_frame.f_code, tb.tb_lasti, tb.tb_lineno)
        tb = tb.tb_next
    return run.site(found) if found else (run.config, 1, 1)


def _describe(error: BaseException) -> str:
    try:
        text = f"{error}"
    except Exception:
        text = ""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg}"
    return f"{kind}({text[:200]!r})" if text else f"{kind}()"


class _Guard:
    """The audit hook: refuses what writes, reaches out or starts something."""

    def __init__(self, run: Run, scope: list[str]) -> None:
        self.run = run
        self.reading = False
        here = os.path.dirname(os.path.realpath(__file__))
        self.readable = [
            *map(os.path.realpath, (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), here)),
            *scope,
        ]
        for module in filter(None, map(sys.modules.get, ("_thread", "threading"))):  # audited from Python 3.12 on
            for name in ("start_new_thread", "_start_new_thread", "start_joinable_thread", "_start_joinable_thread"):
                if hasattr(module, name):
                    setattr(module, name, lambda *a, **k: self.refuse("starts a thread"))
        for name in _UNAUDITED:
            for module in (os, posix):
                if hasattr(module, name):
                    setattr(module, name, lambda *a, _n=name, **k: self.refuse(f"os.{_n}"))

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.reading:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if path == os.devnull or (isinstance(path, int) and not writes):
                return
            if writes:
                self.refuse(f"writes {path!r}")
            if not self.may_read(path):
                self.refuse(f"reads {path!r}, which is outside the scope")
        elif event in _HARMLESS:
            if event in ("os.listdir", "os.scandir") and not self.may_read(args[0]):
                self.refuse(f"{event} {args[0]!r}")
        elif event.startswith(_REFUSED):
            self.refuse(event)

    def may_read(self, path: Any) -> bool:
        try:
            found = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return any(found == r or found.startswith(r + os.sep) for r in self.readable)

    def refuse(self, what: str) -> None:
        self.run.refused.append((self.run.site(), f"refused: {what}"))
        raise RefusedError(what)


# -- its lists -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the lists of the module that was run."""

    def __init__(self, run: Run, module: types.ModuleType, request: dict[str, Any]) -> None:
        self.run, self.names, self.request = run, vars(module), request
        self.lists: dict[str, list[list[Any]]] = {}
        self.targets: dict[int, tuple[str, bool]] = {}  # objects of interest: list name, is a list
        self.refs: dict[int, int] = {}
        self.lost: list[tuple[str, Any]] = []

    def read(self) -> dict[str, Any]:
        wanted = self.request["lists"]
        other: dict[str, list[str]] = {}
        if self.request.get("standalone"):
            for name in wanted:
                self.lists[name] = [[json.dumps(i), 0, 0] for i in self._standalone(name, self.names.get(name, {}))]
        else:
            for name in wanted:
                if name in self.names:
                    self.lists[name] = self.entries(name, self.names[name])
            notes = dict(self.run.notes)
            for name, value in list(self.names.items()):
                pairs = [(name, value)]
                if isinstance(value, dict):
                    pairs = [(f"{name}[{render(k, False)}]", v) for k, v in value.items()]
                for shown, held in pairs:
                    if name not in wanted and isinstance(held, (list, tuple)) and any(map(is_case, held)):
                        other[shown] = [e[0] for e in self.entries(shown, held)]
            self.run.notes = notes
            self._escapes()
        return {"lists": self.lists, "other": other, "notes": [[*site, reason] for site, reason in self.run.notes],
                "lost": self.lost}  # fmt: skip

    def entries(self, name: str, value: Any) -> list[list[Any]]:
        run, out = self.run, []  # type: tuple[Run, list[list[Any]]]
        if type(value) is Unknown:
            run.note(f"{name} isn't resolved: {self.why(value)}", run.site(value._u.place))
            for held in value._u.held:
                for c in held if isinstance(held, (list, tuple)) else [held]:
                    if is_case(c):
                        self.lost.append((name, f"unresolved `{value._u.shown()}` keeps it"))
                        out += self.case(name, c)
            return out
        if isinstance(value, (dict, set, frozenset)):
            run.note(f"{name} is a {type(value).__name__}, not a list of cases", (run.config, 1, 1))
        elif not isinstance(value, (list, tuple)):
            run.note(f"{name} isn't a list of cases", (run.config, 1, 1))
            return []
        if name in self.request["lists"]:
            self.targets[id(value)] = (name, True)
        for item in value:
            if isinstance(item, ParameterSet):
                if item.renamed is not None and not any(
                    is_case(v) and v.__dict__.get(run.id_param) == item.renamed for v in item
                ):
                    run.note(f"pytest.param calls a case of {name} {render(item.renamed, False)}", (run.config, 1, 1))
                for inner in filter(is_case, item):
                    out += self.case(name, inner)
                continue
            if type(item) is Unknown:
                what = f"{name} may hold other cases" if item._u.element else f"an element of {name} isn't resolved"
                run.note(f"{what}: {self.why(item)}", run.site(item._u.place))
                for held in item._u.held:
                    for c in held if isinstance(held, (list, tuple)) else [held]:
                        out += self.case(name, c) if is_case(c) else []
            elif is_case(item):
                out += self.case(name, item)
            else:
                run.note(f"an element of {name} is a {type(item).__name__}, not a {run.case_class}", (run.config, 1, 1))
        return out

    def why(self, value: Unknown) -> str:
        return f"`{value._u.shown()}` isn't known ({value._u.origin})"

    def case(self, name: str, case: Any) -> list[list[Any]]:
        run = self.run
        try:
            case_id = getattr(case, run.id_param)
        except Exception:
            run.note(f"a case of {name} has no {run.id_param!r}", (run.config, max(1, line_of(case, "")), 1))
            return []
        line = line_of(case, str(case_id)) or 1
        frozen = getattr(getattr(type(case), "__dataclass_params__", None), "frozen", False)
        if not frozen and name in self.request["lists"]:
            self.targets.setdefault(id(case), (name, False))
        if type(case_id) is Unknown:
            run.note(f"the id of a case of {name} isn't resolved: {self.why(case_id)}", run.site(case_id._u.place))
            return []
        if not isinstance(case_id, str):
            run.note(f"the id of a case of {name} is a {type(case_id).__name__}, not a string", (run.config, line, 1))
            if not isinstance(case_id, (int, float)):
                return []
        case_id = str.__str__(case_id) if isinstance(case_id, str) else str(case_id)
        if "\ue000" in case_id:
            shown = case_id.replace("\ue000", "{").replace("\ue001", "}")
            run.note(f"the id of a case of {name} isn't resolved: {shown}", (run.config, line, 1))
            return []
        ref = self.refs.setdefault(id(case), len(self.refs))
        return [[case_id, line, ref]]

    def _standalone(self, name: str, value: Any) -> list[Any]:
        run, out = self.run, []  # type: tuple[Run, list[Any]]
        if not isinstance(value, dict):
            run.note(f"{name} isn't resolved", run.site(value._u.place) if type(value) is Unknown else None)
            return out
        for suite, held in value.items():
            pairs = (
                held.items()
                if isinstance(held, dict)
                else ((f, None) for f in held)
                if isinstance(held, (list, tuple))
                else None
            )
            if pairs is None or not isinstance(suite, str):
                run.note(f"suite {render(suite, False)} of {name} isn't resolved")
                continue
            out.append([suite])
            for file, seconds in pairs:
                if isinstance(file, str) and (isinstance(held, (list, tuple)) or isinstance(seconds, (int, float))):
                    out.append([suite, file] if seconds is None else [suite, file, float(seconds)])
                else:
                    run.note(f"an entry of suite {suite} of {name} isn't resolved: {render(file, False)}")
        return out

    # -- what others may have changed ------------------------------------------------------------------------------

    def _escapes(self) -> None:
        for place, how, values in self.run.escapes:
            hit = self._touches(values, set(), 0)
            if hit is None:
                continue
            site = self.run.site(place)
            if not any(n[0] == site for n in self.run.notes):
                what = f"{hit[0]} may hold other cases" if hit[1] else f"a case of {hit[0]} may have another id"
                self.run.note(f"{what}: {how}, which isn't known", site)

    def _touches(self, value: Any, seen: set[int], depth: int) -> tuple[str, bool] | None:
        if id(value) in seen or depth > 6 or type(value) is Unknown:
            return None
        if id(value) in self.targets:
            return self.targets[id(value)]
        seen.add(id(value))
        inner: list[Any] = []
        if isinstance(value, (list, tuple, set, frozenset)):
            inner = list(value)
        elif isinstance(value, dict):
            inner = [*value, *value.values()]
        elif isinstance(value, types.MethodType):
            inner = [value.__self__, value.__func__]
        elif isinstance(value, types.BuiltinMethodType):
            inner = [value.__self__]
        elif isinstance(value, types.FunctionType):
            inner = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
            codes = [value.__code__]
            while codes:
                code = codes.pop()
                codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
                for n in code.co_names:
                    if n in self.request["lists"] and value.__globals__ is self.names:
                        return n, True
                    held = value.__globals__.get(n)
                    if isinstance(held, (list, types.FunctionType)):
                        inner.append(held)
        elif not isinstance(value, (type, types.ModuleType)):
            inner = list(getattr(value, "__dict__", {}).values())
        for v in inner:
            hit = self._touches(v, seen, depth + 1)
            if hit is not None:
                return hit
        return None


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


# -- a process of its own ------------------------------------------------------------------------------------------


def forked(work: Callable[[], dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """The answers of `work`, done in a forked process without output and with limits on time and memory.

    The last answer is that of the process itself, the others are those of the branches of a sweep.
    """
    read, write = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            _limit(seconds)
            data = json.dumps(work()).encode() + b"\n"
            while data:
                data = data[_write(write, data) :]
        finally:
            _exit(0)
    os.close(write)
    chunks, timed_out = [], False
    while True:
        left = seconds - (time.monotonic() - began)
        if left <= 0 or not select.select([read], [], [], left)[0]:
            timed_out = True
            break
        chunk = os.read(read, 1 << 20)
        if not chunk:
            break
        chunks.append(chunk)
    os.close(read)
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    _, end = os.waitpid(pid, 0)
    answers: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        answers += [dict(json.loads(line)) for line in b"".join(chunks).splitlines()]
    if not answers or answers[-1]["flipped"]:
        if timed_out or (os.WIFSIGNALED(end) and os.WTERMSIG(end) in (signal.SIGXCPU, signal.SIGKILL)):
            reason = f"doesn't end within {seconds:.1f} s"
        else:
            reason = f"ends by signal {os.WTERMSIG(end)}" if os.WIFSIGNALED(end) else "ends the interpreter"
        empty: dict[str, Any] = {key: [] for key in ("trace", "notes", "lost", "assumed", "files", "modules")}
        answers.append(empty | {key: {} for key in ("lists", "other", "made", "located")})
        answers[-1] |= {"status": "limit", "error": (None, reason), "flipped": ""}
    return answers


def _branch(guard: _Guard, seconds: float) -> bool:
    guard.reading = True  # not the config's own doing
    try:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            return True
        os.close(write)
        if not select.select([read], [], [], seconds)[0]:  # at the branch's end it is readable: nothing to read
            os.kill(pid, signal.SIGKILL)
        os.close(read)
        os.waitpid(pid, 0)
        return False
    finally:
        guard.reading = False


_exit, _write = os._exit, os.write


def _limit(seconds: float) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    for kind, value in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_AS, MEMORY_BYTES),
    ):  # fmt: skip
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))
