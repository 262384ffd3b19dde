"""The modules that a config imports: executed in the scope, stubs outside, the standard library real.

What depends on the machine is unknown, in the standard library too.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .rewrite import HELPERS, MACHINE, compiled, suppress, unknown_call
from .unknown import KNOWN_CALLS, Run, Unknown, arguments, current, escape, render

_MACHINE_NAMES = {  # of standard modules, what depends on the machine; "*": everything
    "os": "environ environb getenv getenvb listdir scandir walk fwalk cpu_count process_cpu_count uname getcwd getpid"
    " getppid getuid getgid getlogin getloadavg sched_getaffinity urandom times stat lstat access sysconf name",
    "os.path": "islink lexists getsize getmtime getctime getatime expanduser expandvars",
    "sys": "argv platform version version_info hexversion implementation executable prefix base_prefix exec_prefix"
    " flags byteorder getsizeof getrefcount stdin orig_argv api_version",
    "time": "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time localtime gmtime ctime"
    " strftime timezone tzname altzone thread_time",
    "uuid": "uuid1 uuid4 getnode",
    "shutil": "which disk_usage get_terminal_size",
    "multiprocessing": "cpu_count",
    "pkgutil": "iter_modules walk_packages find_loader get_loader",
    "locale": "getlocale getpreferredencoding getdefaultlocale",
    **dict.fromkeys(("importlib", "importlib.util", "datetime", "atexit", "contextlib"), ""),
    **dict.fromkeys(("platform", "random", "secrets", "glob", "sysconfig", "site", "pwd", "grp", "gc", "getpass"), "*"),
    "importlib.metadata": "*",
}
Found = tuple[str, bool]  # file or folder of a module, and whether it is a package
located: dict[str, Found | None] = {}  # the same in every run


class StubModule(types.ModuleType):
    """A module outside the scope."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self)["__path__"] = []

    def __getattr__(self, name: str) -> Any:
        if name[:2] == name[-2:] == "__" and name not in ("__version__", "__file__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if name == current().case_class:
            return current().recorded
        if importer().locate(full) is not None:
            return importlib.import_module(full)
        origin = MACHINE if self.__name__ in _MACHINE_NAMES else f"`{self.__name__}` is outside the scope"
        return KNOWN_CALLS.get(full, Unknown(f"\ue002{self.__name__}.\ue003{name}", origin))

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value
        if name[:2] != "__":
            escape(f"stored in `{self.__name__}.{name}`", [value])


@functools.cache
def _machine_module(name: str) -> types.ModuleType:
    """A standard module of which some names, or all, depend on the machine."""
    if _MACHINE_NAMES[name] == "*":
        return StubModule(name)
    real = importlib.import_module(name)
    out = types.ModuleType(name)
    hidden = {n: Unknown(f"{name}.{n}", MACHINE) for n in _MACHINE_NAMES[name].split() if hasattr(real, n)}
    children = {n.rpartition(".")[2]: _machine_module(n) for n in _MACHINE_NAMES if n.rpartition(".")[0] == name}
    replaced = {n.rpartition(".")[2]: v for n, v in _REPLACED.items() if n.rpartition(".")[0] == name}
    vars(out).update({**vars(real), **hidden, **children, **replaced})
    return out


def _unknown_function(key: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: Unknown(f"{key}({arguments(args, kwargs)})", MACHINE)


def _clock(name: str) -> type:
    """``date`` or ``datetime`` of which the present isn't known."""
    real = getattr(importlib.import_module("datetime"), name)
    return type(name, (real,), {n: staticmethod(_unknown_function(f"{name}.{n}")) for n in ("now", "utcnow", "today")})


def _at_exit(f: Any, *args: Any, **kwargs: Any) -> Any:
    escape("run at the interpreter's exit", [f, *args])
    return f


def _find_spec(name: Any, package: Any = None) -> Any:
    full = importlib.util.resolve_name(name, package) if isinstance(name, str) else ""
    if full and (full.partition(".")[0] in sys.stdlib_module_names or importer().locate(full) is not None):
        return importlib.util.find_spec(full)
    return Unknown(f"find_spec({render(name)})", f"{render(name)} is outside the scope")


def _in_scope(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a path, for reading: the real one inside the scope, unknown outside."""

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
        mode = kwargs.get("mode", args[0] if args else "r")
        writes = name.endswith("open") and isinstance(mode, str) and set("wax+") & set(mode)
        if type(path) is Unknown or not (writes or importer().inside(path)):
            return Unknown(f"{name}({render(path if type(path) is Unknown else str(path))})", MACHINE)
        return real(path, *args, **kwargs)

    return wrapped


_REPLACED: dict[str, Any] = {
    **{f"os.path.{n}": _in_scope(getattr(os.path, n), f"os.path.{n}") for n in ("exists", "isfile", "isdir")},
    **{f"datetime.{n}": _clock(n) for n in ("date", "datetime")},
    "importlib.util.find_spec": _find_spec,
    "atexit.register": _at_exit,
    "time.sleep": lambda seconds: None,
    "contextlib.suppress": suppress,
}


def patch_library() -> None:
    """Make the library's classes know unknown values."""
    for name in ("exists", "is_file", "is_dir", "read_text", "read_bytes", "open", "stat", "lstat"):
        setattr(Path, name, _in_scope(getattr(Path, name), f"Path.{name}"))
    for name in ("iterdir", "glob", "rglob", "walk", "expanduser", "home", "cwd"):
        listed = _unknown_function(f"Path.{name}")
        setattr(
            Path, name, staticmethod(listed) if name in ("home", "cwd") else lambda self, *a, f=listed: f(str(self), *a)
        )
    real = dataclasses.replace

    def replace(obj: Any, /, **changes: Any) -> Any:
        if type(obj) is Unknown:
            return unknown_call(real, (obj,), changes)
        made = getattr(type(obj), "__replace__", None)
        return made(obj, **changes) if made is not None else real(obj, **changes)

    dataclasses.replace = replace  # type: ignore[assignment]


def _search(bases: list[str], parts: list[str], scope: tuple[str, ...]) -> Found | None:
    """A package goes before a module, a module before a folder."""
    folder = None
    for at in (os.path.join(base, *parts) for base in bases):
        for file, package in ((os.path.join(at, "__init__.py"), True), (f"{at}.py", False)):
            if os.path.isfile(file) and within(file, scope):
                return os.path.realpath(file), package
        if folder is None and os.path.isdir(at) and within(at, scope):
            folder = os.path.realpath(at)
    return None if folder is None else (folder, True)


def within(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a path is one of `folders` or in it."""
    found = os.path.realpath(path)
    return any(found == f or found.startswith(f + os.sep) for f in folders)


class Importer:
    """Finds modules: files in the scope are executed, the standard library is real, everything else is a stub."""

    def __init__(self, run: Run, scope: list[str], roots: list[str]) -> None:
        self.run, self.scope, self.roots = run, tuple(scope), roots
        self.library = set(sys.path)
        self.by_path: dict[str, types.ModuleType] = {}
        self.names = _Names({**vars(builtins), **HELPERS, "__import__": self.load, "open": _in_scope(open, "open")})
        self.names.update({"input": _unknown_function("input"), run.case_class: run.recorded})
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def inside(self, path: Any) -> bool:
        try:
            return within(os.fspath(path), self.scope)
        except (TypeError, ValueError, OSError):
            return isinstance(path, int)

    def locate(self, name: str) -> Found | None:
        above = sys.modules.get(name.rpartition(".")[0])
        if above is not None and not isinstance(above, StubModule):
            bases, parts = list(map(str, getattr(above, "__path__", []))), [name.rpartition(".")[2]]
        else:
            bases, parts = [*self.roots, *(p for p in sys.path if p not in self.library)], name.split(".")
        key = "\n".join([*parts, "", *bases])
        if key not in located:
            located[key] = _search(bases, parts, self.scope)
        return located[key]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in sys.stdlib_module_names:
            return None
        found = self.locate(name)
        if found is None:
            self.run.may_lack(name)
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        spec = importlib.machinery.ModuleSpec(name, self, origin=found[0], is_package=found[1])  # type: ignore[arg-type]
        if found[1]:
            spec.submodule_search_locations = [found[0] if os.path.isdir(found[0]) else os.path.dirname(found[0])]
        return spec

    def create_module(self, spec: Any) -> types.ModuleType | None:
        return StubModule(spec.name) if spec.origin is None else self.by_path.get(spec.origin)

    def exec_module(self, module: Any) -> None:
        origin = module.__spec__.origin
        if origin is not None and origin not in self.by_path and os.path.isfile(origin):
            self.execute(origin, module)

    def execute(self, path: str, module: types.ModuleType) -> None:
        self.by_path[path] = module
        self.run.executed.add(path)
        vars(module).update(__builtins__=self.names, __file__=path)
        exec(compiled(path, self.run.case_class), vars(module))

    def load(self, name: str, ns: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        """``import``, with the standard modules that depend on the machine as those that say so."""
        if level == 0 and name in _MACHINE_NAMES:
            return _machine_module(name if names else name.partition(".")[0])
        out = builtins.__import__(name, ns, local, names or (), level)
        if isinstance(out, StubModule) and names and "*" in names:
            self.names.star = True
            self.run.note(f"star import from `{name}`, which is outside the scope")
        return out


class _Names(dict):  # type: ignore[type-arg]
    """Built-in names of executed files; after a star import from outside the scope, any name may be one."""

    star = False

    def __missing__(self, name: str) -> Any:
        if not self.star:
            raise KeyError(name)
        return Unknown(name, "a star import brings it")


def importer() -> Importer:
    return next(i for i in sys.meta_path if isinstance(i, Importer))
