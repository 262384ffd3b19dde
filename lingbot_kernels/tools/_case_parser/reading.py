"""Runs a config once, in a process of its own that may do nothing but compute, and reads its lists."""

from __future__ import annotations

import builtins
import contextlib
import gc
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

from . import modules
from .unknown import MARKED, SOMEWHERE, ParameterSet, Run, StuckError, Unknown, is_case, plain, render

MEMORY_BYTES = 2 << 30
_REFUSED = (
    *("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "tempfile.", "fcntl.", "mmap.", "sqlite3.", "winreg."),
    *("msvcrt.", "syslog.", "pty.", "signal.", "ftplib.", "http.", "imaplib.", "poplib.", "smtplib.", "telnetlib."),
    *("nntplib.", "urllib.", "webbrowser.", "resource.", "_thread.start"),
)
_HARMLESS = {"os.putenv", "os.unsetenv", "os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_POSIX = "mkfifo mknod _exit abort setuid setgid setsid setpgid nice setpriority unshare write writev"
_UNAUDITED = {  # what Python's audit events leave out
    "_thread": "start_new_thread start_joinable_thread",
    "threading": "_start_new_thread _start_joinable_thread",
    "posix": _POSIX,
    "os": _POSIX,
}
_exit, _write = os._exit, os.write
ENDED: dict[str, Any] = {  # the answer of a process that gave none
    **{"status": "limit", "lists": {}, "other": {}, "made": {}, "located": {}, "flipped": "", "prefix": 0},
    **{name: [] for name in ("trace", "notes", "lost", "assumed", "files", "modules")},
}


class RefusedError(BaseException):
    """The config wanted something that a list of cases needs no right to."""


class _Guard:
    """The audit hook: refuses what writes, reaches out or starts something."""

    def __init__(self, run: Run, scope: list[str]) -> None:
        self.run, self.off = run, False
        library = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), os.path.dirname(__file__))
        self.readable = (*map(os.path.realpath, library), *scope)
        for module, names in ((sys.modules[m], names) for m, names in _UNAUDITED.items() if m in sys.modules):
            for name in filter(lambda n: hasattr(module, n), names.split()):
                setattr(module, name, lambda *a, _n=f"{module.__name__}.{name}", **k: self.refuse(_n))

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.off:
            return
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & _WRITES
            if args[0] != os.devnull and (writes or not self.may_read(args[0])):
                self.refuse(f"{'writes' if writes else 'reads outside the scope'} {args[0]!r}")
        elif event in ("os.listdir", "os.scandir") and not self.may_read(args[0]):
            self.refuse(f"{event} {args[0]!r}")
        elif event.startswith(_REFUSED) and event not in _HARMLESS:
            self.refuse(event)

    def may_read(self, path: Any) -> bool:
        return isinstance(path, int) or modules.within(os.fsdecode(path), self.readable)

    def refuse(self, what: str) -> None:
        self.run.refused.append((self.run.site(), f"refused: {what}"))
        raise RefusedError(what)

    def branch(self, seconds: float) -> bool:
        """Fork; True in the new process. The other one waits until that ends, then goes on."""
        self.off = True  # not the config's own doing
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
            self.off = False


def run_config(request: dict[str, Any]) -> dict[str, Any]:
    """Execute the config and read it; to be called in a process of its own."""
    run, config, name = Run(request), request["config"], request["name"]
    importer = modules.Importer(run, request["scope"], request["roots"])
    modules.patch_library()
    known, module = set(sys.modules), types.ModuleType(name)
    sys.modules[name], module.__package__ = module, name.rpartition(".")[0]
    hooks = _hooks(importer)
    sys.setrecursionlimit(2400)  # a rewritten call takes two frames
    guard = _Guard(run, request["scope"])
    run.branch = lambda: guard.branch(request["branch_seconds"])
    sys.addaudithook(guard)
    status, error = "ok", None
    try:
        importer.execute(config, module)
    except BaseException as e:
        limit = isinstance(e, (RecursionError, MemoryError))
        status = "stuck" if isinstance(e, StuckError) else "limit" if limit else "raise"
        error = (_where(run, e), _describe(e))
    guard.off = True
    changed = [what for what, held in _hooks(importer).items() if held != hooks[what]]
    run.refused += [((config, 1, 1), f"refused: {what}") for what in changed]
    out = _Reader(run, vars(module), request).read()
    if run.refused:
        status, error = "refused", run.refused[0]
    return out | {
        "status": status, "error": error, "trace": run.trace[run.prefix :], "prefix": run.prefix,
        "flipped": run.flipped, "made": run.made, "assumed": [k for k in map(plain, run.values) if k in run.assumed],
        "files": list(run.executed), "located": modules.located,
        "modules": [m for m in sys.modules if m not in known and m.partition(".")[0] in sys.stdlib_module_names],
    }  # fmt: skip


def _hooks(importer: modules.Importer) -> dict[str, Any]:
    """What a config must leave as it is, by identity."""
    names = [(k, id(v)) for held in (vars(builtins), importer.names) for k, v in held.items() if k != "_"]
    imports = [list(map(id, sys.meta_path)), list(map(id, sys.path_hooks))]
    return {"installs an import hook": imports, "changes built-in names": sorted(names)}


def _where(run: Run, error: BaseException) -> Any:
    if isinstance(error, SyntaxError) and error.filename in run.executed:
        return error.filename, error.lineno or 1, error.offset or 1
    place, tb = SOMEWHERE, error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename in run.executed:
            place = (tb.tb_frame.f_code, tb.tb_lasti, tb.tb_lineno)
        tb = tb.tb_next
    return run.site(place)


def _describe(error: BaseException) -> str:
    try:
        text = MARKED.sub(r"\1", plain(f"{error}"))[:200]
        text = text.partition(" while ")[0] if isinstance(error, RecursionError) else text
    except Exception:
        text = ""
    return f"{type(error).__name__}({text!r})" if text else f"{type(error).__name__}()"


class _Reader:
    """Reads the lists of the module that was run; `names`: the module's."""

    def __init__(self, run: Run, names: dict[str, Any], request: dict[str, Any]) -> None:
        self.run, self.names, self.wanted, self.standalone = run, names, request["lists"], request["standalone"]
        self.targets: dict[int, str] = {}  # lists and cases of interest, and what could happen to them
        self.lost: list[tuple[str, str]] = []

    def read(self) -> dict[str, Any]:
        read = self.files if self.standalone else self.entries
        lists = {name: list(read(name, self.names[name])) for name in self.wanted if name in self.names}
        notes, other = dict(self.run.notes), {}
        for name, value in () if self.standalone else list(self.names.items()):
            pairs = value.items() if isinstance(value, dict) else ()
            for shown, held in [(name, value), *((f"{name}[{render(k)}]", v) for k, v in pairs)]:
                if name not in self.wanted and isinstance(held, (list, tuple)) and any(map(is_case, held)):
                    other[shown] = [e[0] for e in self.entries(shown, held)]
        self.run.notes = notes  # those of the other lists hide no case
        for place, how, values in self.run.escapes:
            hit = self.touched(values, set(), 0)
            if hit and not any(site == self.run.site(place) for site, _ in notes):
                self.run.note(f"{hit}: {how}, which isn't known", place)
        unresolved = [[*site, reason] for site, reason in self.run.notes]
        return {"lists": lists, "other": other, "notes": unresolved, "lost": self.lost}

    def entries(self, name: str, value: Any) -> Iterator[list[Any]]:
        """Id, line and number of the cases of a list."""
        run, held = self.run, value
        if type(value) is Unknown:
            run.note(f"{name} isn't resolved: {_why(value)}", value._place)
            self.lost.append((name, f"unresolved `{plain(value._key)}` keeps it"))
            held = _kept(value)
        elif not isinstance(value, (list, tuple)):
            run.note(f"{name} is a {type(value).__name__}, not a list of cases", SOMEWHERE)
            held = value if isinstance(value, (dict, set, frozenset)) else ()
        if name in self.wanted:
            self.targets[id(value)] = f"{name} may hold other cases"
        for item in held:
            inner = list(item) if isinstance(item, ParameterSet) else [item]
            if type(item) is Unknown:
                element = item._key.endswith("[...]")
                what = f"{name} may hold other cases" if element else f"an element of {name} isn't resolved"
                run.note(f"{what}: {_why(item)}", item._place)
                inner = _kept(item)
            elif not any(map(is_case, inner)):
                run.note(f"an element of {name} is a {type(item).__name__}, not a {run.case_class}", SOMEWHERE)
            for case in filter(is_case, inner):
                yield from self.case(name, case)

    def case(self, name: str, case: Any) -> Iterator[list[Any]]:
        run, case_id = self.run, getattr(case, self.run.id_param, None)
        known = run.lines.get(id(case), (None, run.made.get(case_id, 1) if isinstance(case_id, str) else 1))
        line = known[1] or 1
        if not getattr(getattr(case, "__dataclass_params__", None), "frozen", False) and name in self.wanted:
            self.targets.setdefault(id(case), f"a case of {name} may have another id")
        if type(case_id) is Unknown:
            run.note(f"the id of a case of {name} isn't resolved: {_why(case_id)}", case_id._place)
            return
        if not isinstance(case_id, str):
            what = f"is a {type(case_id).__name__}, not a string"
            run.notes[(run.config, line, 0), f"the id ({run.id_param}) of a case of {name} {what}"] = None
        if isinstance(case_id, (str, int, float)):
            yield [str.__str__(case_id) if isinstance(case_id, str) else str(case_id), line, id(case)]

    def files(self, name: str, value: Any) -> Iterator[list[Any]]:
        """Suites, files and estimates of a run-suite file, each as JSON in the place of an id."""
        for suite, held in value.items() if isinstance(value, dict) else [(name, None)]:
            inner = held if isinstance(held, dict) else dict.fromkeys(held) if isinstance(held, (list, tuple)) else None
            bad = [
                f for f, s in (inner or {}).items() if type(f) is not str or not isinstance(s, (int, float, type(None)))
            ]
            if inner is None or bad:
                self.run.note(f"{name} isn't resolved: {plain(render(bad or held))}", SOMEWHERE)
            else:
                yield from ([json.dumps(e), 0, 0] for e in ([suite], *([suite, f, s] for f, s in inner.items())))

    def touched(self, value: Any, seen: set[int], depth: int) -> str:
        """What could happen to a list or case that `value` reaches."""
        if id(value) in self.targets:
            return self.targets[id(value)]
        if id(value) in seen or depth > 6 or isinstance(value, (Unknown, type, types.ModuleType, str)):
            return ""
        seen.add(id(value))
        inner = gc.get_referents(value)
        if isinstance(value, types.FunctionType):
            codes = [value.__code__]
            for code in codes:
                codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            used = [value.__globals__.get(n) for code in codes for n in code.co_names]
            inner = [*(value.__closure__ or ()), *(v for v in used if isinstance(v, (list, types.FunctionType)))]
        return next(filter(None, (self.touched(v, seen, depth + 1) for v in inner)), "")


def _kept(value: Unknown) -> list[Any]:
    """The cases that an unknown value may have taken over."""
    return [c for h in value._held for c in (h if isinstance(h, (list, tuple)) else [h])]


def _why(value: Unknown) -> str:
    return f"`{plain(value._key)}` isn't known ({value._origin})"


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
        answers.append({**ENDED, "error": (None, f"doesn't end within {seconds:.1f} s" if late else ended)})
    return answers


def _limit(seconds: float) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(null, fd)
        setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
    for kind, value in {"CORE": 0, "FSIZE": 0, "CPU": int(seconds) + 2, "AS": MEMORY_BYTES}.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))
