"""Runs a config once, in a process of its own that may do nothing but compute, and reads its lists."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from .support import Cache, Importer, patch_library
from .unknown import ParameterSet, Place, Run, StuckError, Unknown, is_case, plain, render

MEMORY_BYTES = 2 << 30
_REFUSED_EVENTS = (
    "os. subprocess. socket. ctypes. shutil. tempfile. fcntl. mmap. sqlite3. winreg. msvcrt. syslog. pty. "
    "signal. ftplib. http. imaplib. poplib. smtplib. telnetlib. nntplib. urllib. webbrowser. resource. "
    "_thread.start"
)
_REFUSED = tuple(_REFUSED_EVENTS.split())
_HARMLESS = {"os.putenv", "os.unsetenv", "os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_UNAUDITED = {  # what Python's audit events leave out
    "_thread": "start_new_thread start_joinable_thread",
    "threading": "_start_new_thread _start_joinable_thread",
    "posix": "mkfifo mknod _exit abort setuid setgid setsid setpgid nice setpriority unshare write writev",
}
_UNAUDITED["os"] = _UNAUDITED["posix"]
_exit, _write = os._exit, os.write


class RefusedError(BaseException):
    """The config wanted something that a list of cases needs no right to."""


class _Guard:
    """The audit hook: refuses what writes, reaches out or starts something."""

    def __init__(self, run: Run, scope: list[str]) -> None:
        self.run, self.off = run, False
        library = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), os.path.dirname(__file__))
        self.readable = [*map(os.path.realpath, library), *scope]
        for module, names in ((sys.modules[m], names) for m, names in _UNAUDITED.items() if m in sys.modules):
            for name in filter(lambda n: hasattr(module, n), names.split()):
                setattr(module, name, lambda *a, _n=f"{module.__name__}.{name}", **k: self.refuse(_n))

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.off:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if path != os.devnull and (writes or not self.may_read(path)):
                self.refuse(f"{'writes' if writes else 'reads outside the scope'} {path!r}")
        elif event in ("os.listdir", "os.scandir") and not self.may_read(args[0]):
            self.refuse(f"{event} {args[0]!r}")
        elif event.startswith(_REFUSED) and event not in _HARMLESS:
            self.refuse(event)

    def may_read(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        found = os.path.realpath(os.fsdecode(path))
        return any(found == r or found.startswith(r + os.sep) for r in self.readable)

    def refuse(self, what: str) -> None:
        self.run.refused.append((self.run.site(), f"refused: {what}"))
        raise RefusedError(what)


def run_config(request: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """Execute the config and read it; to be called in a process of its own."""
    run = Run(request)
    importer = Importer(run, request["scope"], request["roots"], cache)
    patch_library()
    known, config = set(sys.modules), request["config"]
    module = sys.modules[request["name"]] = types.ModuleType(request["name"])
    module.__package__ = request["name"].rpartition(".")[0]
    hooks = _hooks(importer)
    sys.setrecursionlimit(2400)  # a rewritten call takes two frames
    guard = _Guard(run, request["scope"])
    run.branch = lambda: _branch(guard, request["branch_seconds"])  # type: ignore[method-assign]
    sys.addaudithook(guard)
    status, error = "ok", None
    try:
        importer.execute(config, module)
    except BaseException as e:
        limit = isinstance(e, (RecursionError, MemoryError))
        status = "stuck" if isinstance(e, StuckError) else "limit" if limit else "raise"
        error = (_where(run, e), _describe(e))
    guard.off = True
    for what, before, now in zip(
        ("installs an import hook", "changes built-in names"), hooks, _hooks(importer), strict=True
    ):
        if before != now:
            run.refused.append(((config, 1, 1), f"refused: {what}"))
    out = _Reader(run, vars(module), request).read()
    if run.refused:
        status, error = "refused", run.refused[0]
    library = [m for m in sys.modules if m not in known and m.partition(".")[0] in sys.stdlib_module_names]
    return out | {
        "status": status, "error": error, "trace": run.trace[run.prefix :], "prefix": run.prefix,
        "flipped": run.flipped, "made": run.made, "assumed": sorted(run.assumed_met), "files": list(run.tries),
        "modules": library, "located": cache.located,
    }  # fmt: skip


def _hooks(importer: Importer) -> tuple[list[Any], list[Any]]:
    """What a config must leave as it is, by identity."""
    names = [(k, id(v)) for held in (vars(builtins), importer.names) for k, v in held.items() if k != "_"]
    return [list(map(id, sys.meta_path)), list(map(id, sys.path_hooks))], sorted(names)


def _where(run: Run, error: BaseException) -> Any:
    if isinstance(error, SyntaxError) and error.filename in run.tries:
        return error.filename, error.lineno or 1, error.offset or 1
    place: Place = (None, 0, 1)
    tb = error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename in run.tries:
            place = (tb.tb_frame.f_code, tb.tb_lasti, tb.tb_lineno)
        tb = tb.tb_next
    return run.site(place)


def _describe(error: BaseException) -> str:
    try:
        text = plain(f"{error}")[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}({text!r})" if text else f"{type(error).__name__}()"


class _Reader:
    """Reads the lists of the module that was run; `names`: the module's."""

    def __init__(self, run: Run, names: dict[str, Any], request: dict[str, Any]) -> None:
        self.run, self.names, self.wanted, self.standalone = run, names, request["lists"], request["standalone"]
        self.targets: dict[int, tuple[str, str]] = {}  # lists and cases of interest, and what could happen to them
        self.lost: list[tuple[str, str]] = []

    def read(self) -> dict[str, Any]:
        lists, other = {}, {}
        read = self.files if self.standalone else self.entries
        for name in filter(self.names.__contains__, self.wanted):
            lists[name] = list(read(name, self.names[name]))
        notes = dict(self.run.notes)
        for name, value in [] if self.standalone else list(self.names.items()):
            pairs = value.items() if isinstance(value, dict) else ()
            for shown, held in [(name, value), *((f"{name}[{render(k)}]", v) for k, v in pairs)]:
                if name not in self.wanted and isinstance(held, (list, tuple)) and any(map(is_case, held)):
                    other[shown] = [e[0] for e in self.entries(shown, held)]
        self.run.notes = notes
        self.escapes()
        unresolved = [[*site, reason] for site, reason in self.run.notes]
        return {"lists": lists, "other": other, "notes": unresolved, "lost": self.lost}

    def entries(self, name: str, value: Any) -> Iterator[list[Any]]:
        """Id, line and number of the cases of a list."""
        note, held = self.run.note, value
        if type(value) is Unknown:
            note(f"{name} isn't resolved: {_why(value)}", value._place)
            self.lost.append((name, f"unresolved `{plain(value._text())}` keeps it"))
            held = [c for h in value._held for c in (h if isinstance(h, (list, tuple)) else [h]) if is_case(c)]
        elif not isinstance(value, (list, tuple)):
            note(f"{name} is a {type(value).__name__}, not a list of cases", (None, 0, 0))
            held = filter(is_case, value) if isinstance(value, (dict, set, frozenset)) else ()
        if name in self.wanted:
            self.targets[id(value)] = (name, f"{name} may hold other cases")
        for item in held:
            if type(item) is Unknown:
                what = f"{name} may hold other cases" if item._element else f"an element of {name} isn't resolved"
                note(f"{what}: {_why(item)}", item._place)
                inner = [c for h in item._held for c in (h if isinstance(h, (list, tuple)) else [h])]
            elif isinstance(item, ParameterSet):
                inner = list(item)
                if item.renamed is not None:
                    note(f"pytest.param gives a case of {name} the name {render(item.renamed)}", (None, 0, 0))
            elif is_case(item):
                inner = [item]
            else:
                inner = (
                    note(f"an element of {name} is a {type(item).__name__}, not a {self.run.case_class}", (None, 0, 0))
                    or []
                )
            for case in filter(is_case, inner):
                yield from self.case(name, case)

    def case(self, name: str, case: Any) -> Iterator[list[Any]]:
        run, case_id = self.run, getattr(case, self.run.id_param, None)
        known = run.lines.get(id(case), (None, run.made.get(case_id, 1) if isinstance(case_id, str) else 1))
        line = known[1] or 1
        if not getattr(getattr(case, "__dataclass_params__", None), "frozen", False) and name in self.wanted:
            self.targets.setdefault(id(case), (name, f"a case of {name} may have another id"))
        if type(case_id) is Unknown:
            run.note(f"the id of a case of {name} isn't resolved: {_why(case_id)}", case_id._place)
        elif isinstance(case_id, str) and "\ue000" in case_id:
            run.notes[(run.config, line, 0), f"the id of a case of {name} isn't resolved: {_why(case_id)}"] = None
        else:
            if not isinstance(case_id, str):
                what = f"is a {type(case_id).__name__}, not a string"
                run.notes[(run.config, line, 0), f"the id ({run.id_param}) of a case of {name} {what}"] = None
            if isinstance(case_id, (str, int, float)):
                shown = str.__str__(case_id) if isinstance(case_id, str) else str(case_id)
                yield [shown, line, id(case)]

    def files(self, name: str, value: Any) -> Iterator[list[Any]]:
        """Suites, files and estimates of a run-suite file, each as JSON in the place of an id."""
        pairs = value.items() if isinstance(value, dict) else [(name, value)]
        for suite, held in pairs:
            inner = (
                held.items()
                if isinstance(held, dict)
                else [(f, None) for f in held]
                if isinstance(held, (list, tuple))
                else None
            )
            bad = [f for f, s in inner or () if type(f) is not str or not isinstance(s, (int, float, type(None)))]
            if inner is None or bad or not isinstance(value, dict):
                self.run.note(f"{name} isn't resolved: {plain(render(bad or held))}", (None, 0, 0))
            else:
                yield from ([json.dumps(e), 0, 0] for e in ([suite], *([suite, f, s] for f, s in inner)))

    def escapes(self) -> None:
        """Report the lists and cases that unknown code was given, directly or by a function that reaches them."""
        for place, how, values in self.run.escapes:
            hit = self.touches(values, set(), 0)
            site = hit and self.run.site(place)
            if hit and not any(n[0] == site for n in self.run.notes):
                self.run.note(f"{hit}: {how}, which isn't known", place)

    def touches(self, value: Any, seen: set[int], depth: int) -> str:
        if id(value) in self.targets:
            return self.targets[id(value)][1]
        if id(value) in seen or depth > 6 or isinstance(value, (Unknown, type, types.ModuleType)):
            return ""
        seen.add(id(value))
        inner = list(getattr(value, "__dict__", {}).values())
        if isinstance(value, (list, tuple, set, frozenset)):
            inner = list(value)
        elif isinstance(value, dict):
            inner = [*value, *value.values()]
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            inner = [value.__self__, getattr(value, "__func__", None)]
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):
                    inner.append(cell.cell_contents)
            codes = [value.__code__]
            for code in codes:
                codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
                named = [n for n in code.co_names if n in self.wanted and value.__globals__ is self.names]
                if named:
                    return f"{named[0]} may hold other cases"
                inner += [
                    v for v in map(value.__globals__.get, code.co_names) if isinstance(v, (list, types.FunctionType))
                ]
        return next(filter(None, (self.touches(v, seen, depth + 1) for v in inner)), "")


def _why(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\ue000", "{").replace("\ue001", "}")
    return f"`{plain(value._text())}` isn't known ({value._origin})"


def forked(work: Callable[[], dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """The answers of `work`, done in a forked process without output and with limits on time and memory.

    The last answer is that of the process itself, the others are those of the branches of a sweep.
    """
    read, write = os.pipe()
    end_at = time.monotonic() + seconds
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
    out, chunk = b"", b"-"
    while chunk and (left := end_at - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        chunk = os.read(read, 1 << 20)
        out += chunk
    os.close(read)
    if chunk:
        os.kill(pid, signal.SIGKILL)
    _, end = os.waitpid(pid, 0)
    answers: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        answers += map(json.loads, out.splitlines())
    if not answers or answers[-1]["flipped"]:
        late = chunk or (os.WIFSIGNALED(end) and os.WTERMSIG(end) == signal.SIGXCPU)
        ended = f"ends by signal {os.WTERMSIG(end)}" if os.WIFSIGNALED(end) else "ends the interpreter"
        failed: dict[str, Any] = {
            "status": "limit",
            "error": (None, f"doesn't end within {seconds:.1f} s" if late else ended),
        }
        failed |= {name: [] for name in ("trace", "notes", "lost", "assumed", "files", "modules")}
        answers.append(failed | {"lists": {}, "other": {}, "made": {}, "located": {}, "flipped": "", "prefix": 0})
    return answers


def _branch(guard: _Guard, seconds: float) -> bool:
    """Fork; True in the new process. The other one waits until that ends, then goes on."""
    guard.off = True  # not the config's own doing
    try:
        read, write = os.pipe()
        pid = os.fork()
        os.close(write if pid else read)
        if pid == 0:
            return True
        if not select.select([read], [], [], seconds)[0]:  # readable at the branch's end
            os.kill(pid, signal.SIGKILL)
        os.close(read)
        os.waitpid(pid, 0)
        return False
    finally:
        guard.off = False


def _limit(seconds: float) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(null, fd)
        setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
    limits = {"CORE": 0, "FSIZE": 0, "CPU": int(seconds) + 2, "AS": MEMORY_BYTES}
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))
