"""The helpers that rewritten code calls, and the modules that it imports: executed, stubs, or the standard library."""

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .rewrite import Try, compile_file
from .unknown import (
    CALL,
    IMPORT,
    KNOWN_CALLS,
    Run,
    Unknown,
    arguments,
    case_class,
    contains,
    current,
    escape,
    negate,
    plain,
    render,
    same,
)

# Library modules and built-in names that handle an unknown value as any other; all others give an unknown result.
_STRUCTURE_NAMES = (
    "dataclasses functools itertools copy enum typing contextlib operator collections types abc weakref "
    "warnings importlib _functools _operator _collections _weakref _abc _typing"
)
_STRUCTURE = set(_STRUCTURE_NAMES.split())
_REAL_NAMES = (
    "all any classmethod delattr dict enumerate filter frozenset getattr iter list map max min object "
    "print property reversed set setattr slice sorted staticmethod sum super tuple zip id vars globals "
    "next"
)
_REAL = set(_REAL_NAMES.split())
_ORDERED = {list, tuple, enumerate, zip, map, filter}
_MACHINE = "depends on the machine"
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
    **dict.fromkeys(("importlib", "importlib.util", "datetime", "atexit"), ""),
    **dict.fromkeys(
        (
            "platform",
            "random",
            "secrets",
            "glob",
            "sysconfig",
            "site",
            "pwd",
            "grp",
            "gc",
            "getpass",
            "importlib.metadata",
        ),
        "*",
    ),
}


# -- helpers -------------------------------------------------------------------------------------------------------


def _any_unknown(values: Iterable[Any]) -> bool:
    return any(type(v) is Unknown for v in values)


def _of_call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unknown:
    owner, name = getattr(f, "__self__", None), getattr(f, "__name__", None) or render(f)
    if owner is not None and not isinstance(owner, types.ModuleType):
        name = f"{render(owner)}.{name}"
    held = [v for v in (*args, *kwargs.values()) if type(v) is Unknown]
    key = f"{name}({arguments(args, kwargs)})"
    current().may_raise(key, CALL)
    return Unknown(key, held[0]._origin if held else _MACHINE)


def call(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``f(*args, **kwargs)``; an unknown value where a function of the library would need one that is known."""
    if type(f) is Unknown:
        return f(*args, **kwargs)
    owner, name = getattr(f, "__self__", None), getattr(f, "__name__", "")
    given = [*args, *kwargs.values()]
    if type(owner) is str and name in ("join", "format"):
        args = tuple(list(a) if isinstance(a, types.GeneratorType) else a for a in args)
        given = [*args, *kwargs.values(), *(args[0] if name == "join" and isinstance(args[0], (list, tuple)) else ())]
    if (isinstance(f, type) and f in _ORDERED) or (name == "extend" and type(owner) is list):
        args = tuple(map(each, args))
    if not _any_unknown(given):
        return f(*args, **kwargs)
    if f is bool:
        return negate(negate(args[0]))
    if isinstance(owner, dict) and name in ("get", "pop", "setdefault"):
        found = _pick(owner, args[0])
        return f(args[0] if found is None else found, *args[1:])
    if isinstance(owner, list) and name in ("pop", "insert"):
        return f(_pick(owner, args[0]) or 0, *args[1:])
    module = (getattr(f, "__module__", None) or type(owner).__module__ or "").partition(".")[0]
    if name in ("setattr", "delattr") and type(args[1]) is Unknown:
        return current().note(f"which attribute {name} changes isn't known: `{plain(render(args[1]))}`")
    if name == "getattr" and type(args[1]) is Unknown:
        return _of_call(f, args, kwargs)
    if module == "builtins":
        container = owner is not None and not isinstance(owner, (str, bytes, int, float, types.ModuleType, type))
        return f(*args, **kwargs) if name in _REAL or container or len(args) == 3 else _of_call(f, args, kwargs)
    if module in _STRUCTURE or module not in sys.stdlib_module_names or isinstance(f, functools.partial):
        return f(*args, **kwargs)
    return _of_call(f, args, kwargs)


def _pick(container: Any, index: Any) -> Any:
    """The key or position that an unknown one turns out to be in this world; None where it is none of them."""
    if type(index) is not Unknown:
        return index
    return next(
        (k for k in list(container if isinstance(container, dict) else range(min(len(container), 64))) if index == k),
        None,
    )


def _part(container: Any, index: Any) -> bool:
    """Whether `index` is a slice that isn't known, which is reported."""
    if not isinstance(index, slice) or not _any_unknown((index.start, index.stop, index.step)):
        return False
    current().note(f"which part of `{plain(render(container))}` is meant isn't known")
    return True


def get(container: Any, index: Any) -> Any:
    if type(index) is Unknown and isinstance(container, (str, bytes)):
        return Unknown(f"{render(container)}[{render(index)}]", index._origin)
    if type(container) is Unknown or not _part(container, index):
        if type(index) is Unknown and isinstance(container, (list, tuple, dict)):
            index = _pick(container, index)
            if index is None:
                raise LookupError("an unknown index is taken to be none of its own")
        return container[index]
    return container[:]


def store(container: Any, index: Any, *value: Any) -> None:
    """``container[index] = value``, or ``del container[index]`` without a value."""
    if type(container) is not Unknown and _part(container, index):
        return
    if isinstance(container, list) or (isinstance(container, dict) and not value):
        index = _pick(container, index)
    if value:
        container[index] = value[0]
    else:
        del container[index]


_CONVERSIONS: dict[int, Callable[[Any], Any]] = {115: str, 114: repr, 97: ascii}


def text(*parts: Any) -> Any:
    """An f-string: texts, and (value, conversion, format)."""
    values = [v for p in parts if type(p) is tuple for v in p]
    if _any_unknown(values):
        shown = "".join(p if type(p) is str else "{" + render(p[0]) + "}" for p in parts)
        return Unknown(f'f"{shown}"', next(v._origin for v in values if type(v) is Unknown))
    made = (p if type(p) is str else format(_CONVERSIONS.get(p[1], lambda v: v)(p[0]), p[2]) for p in parts)
    return "".join(made)


def mod(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        inner = right if isinstance(right, tuple) else right.values() if isinstance(right, dict) else (right,)
        if _any_unknown(inner):
            key = f"{render(left)} % {render(right)}"
            return Unknown(key, next(v._origin for v in inner if type(v) is Unknown), compound=True)
    return left % right


def each(values: Any) -> Any:
    """What a loop goes over; the order of a set is a decision, so that a list that takes it over is reported."""
    if type(values) not in (set, frozenset) or len(values) < 2 or all(isinstance(v, int) for v in values):
        return values
    file, line, column = current().site()
    where = f"order of the set at {Path(file).name}:{line}:{column}"
    return sorted(values, key=render, reverse=current().decide(where, kind="order"))


def mapping(values: Any) -> Any:
    return {} if type(values) is Unknown else values


def catch(kinds: Any) -> Any:
    """What an ``except`` catches; whether an unknown class catches the error is a decision."""
    if isinstance(kinds, tuple):
        return tuple(k for kind in kinds for k in (catch(kind) if type(kind) is Unknown else (kind,)))
    if type(kinds) is not Unknown:
        return kinds
    return (Exception,) if current().decide(f"`{render(kinds)}` catches {type(sys.exc_info()[1]).__name__}") else ()


def throw(error: Any) -> Any:
    return RuntimeError(plain(render(error))) if type(error) is Unknown else error


def subject(value: Any) -> Any:
    if type(value) is Unknown:
        current().note(f"whether `{plain(render(value))}` has the form of a `case` isn't known")
    return value


HELPERS = {
    "call": call, "not": negate, "is": same, "in": contains, "text": text, "mod": mod, "get": get, "store": store,
    "each": each, "mapping": mapping, "catch": catch, "raise": throw, "subject": subject, "case": case_class,
    "slice": slice,
}  # fmt: skip


# -- modules -------------------------------------------------------------------------------------------------------


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
        machine = self.__name__ in _MACHINE_NAMES
        value = Unknown(
            f"\ue002{self.__name__}.\ue003{name}", _MACHINE if machine else f"`{self.__name__}` is outside the scope"
        )
        return KNOWN_CALLS.get(full, value)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value
        if name[:2] != "__":
            escape(f"stored in `{self.__name__}.{name}`", [value])


def machine_module(name: str) -> types.ModuleType:
    """A standard module of which some names, or all, depend on the machine."""
    if _MACHINE_NAMES[name] == "*":
        return StubModule(name)
    real = importlib.import_module(name)
    out = types.ModuleType(name)
    hidden = {n: Unknown(f"{name}.{n}", _MACHINE) for n in _MACHINE_NAMES[name].split() if hasattr(real, n)}
    children = {n.rpartition(".")[2]: machine_module(n) for n in _MACHINE_NAMES if n.rpartition(".")[0] == name}
    vars(out).update({**vars(real), **hidden, **children, **_replaced(name, real)})
    return out


def _replaced(name: str, real: Any) -> dict[str, Any]:
    if name == "os.path":
        return {n: in_scope(getattr(real, n), f"os.path.{n}") for n in ("exists", "isfile", "isdir")}
    if name == "datetime":
        return {n: type(n, (getattr(real, n),), {m: classmethod(_now(f"{n}.{m}")) for m in ("now", "utcnow", "today")})
                for n in ("date", "datetime")}  # fmt: skip
    known: dict[str, dict[str, Any]] = {"importlib.util": {"find_spec": _find}, "atexit": {"register": _at_exit}}
    return known.get(name, {"sleep": lambda seconds: None} if name == "time" else {})


def _now(key: str) -> Callable[..., Any]:
    return lambda *args: Unknown(f"{key}({arguments(args[1:], {})})", _MACHINE)


def _at_exit(f: Any, *args: Any, **kwargs: Any) -> Any:
    escape("run at the interpreter's exit", [f, *args])
    return f


def _find(name: Any, package: Any = None) -> Any:
    full = importlib.util.resolve_name(name, package) if isinstance(name, str) else ""
    if full and (full.partition(".")[0] in sys.stdlib_module_names or importer().locate(full) is not None):
        return importlib.util.find_spec(full)
    return Unknown(f"find_spec({render(name)})", f"{render(name)} is outside the scope")


def in_scope(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a path, for reading: the real one inside the scope, unknown outside."""

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
        mode = kwargs.get("mode", args[0] if args else "r")
        writes = name.endswith("open") and isinstance(mode, str) and set("wax+") & set(mode)
        if type(path) is Unknown or not (writes or importer().inside(path)):
            return Unknown(f"{name}({render(path if type(path) is Unknown else str(path))})", _MACHINE)
        return real(path, *args, **kwargs)

    return wrapped


def patch_paths() -> None:
    for name in ("exists", "is_file", "is_dir", "read_text", "read_bytes", "open", "stat", "lstat"):
        setattr(Path, name, in_scope(getattr(Path, name), f"Path.{name}"))
    for name in ("iterdir", "glob", "rglob", "walk", "expanduser"):
        setattr(
            Path, name, lambda self, *a, _n=name: Unknown(f"Path({str(self)!r}).{_n}({arguments(a, {})})", _MACHINE)
        )
    for name in ("home", "cwd"):
        setattr(Path, name, classmethod(_now(f"Path.{name}")))


@dataclasses.dataclass
class Cache:
    """What stays the same from run to run: the code of files, and where modules are."""

    files: dict[str, tuple[types.CodeType, list[Try]]] = dataclasses.field(default_factory=dict)
    located: dict[str, Any] = dataclasses.field(default_factory=dict)

    def compiled(self, path: str, case_class: str) -> tuple[types.CodeType, list[Try]]:
        if path not in self.files:
            with open(path, "rb") as f:
                self.files[path] = compile_file(f.read(), path, case_class)
        return self.files[path]


class Importer:
    """Finds modules: files in the scope are executed, the standard library is real, everything else is a stub."""

    def __init__(self, run: Run, scope: list[str], roots: list[str], cache: Cache) -> None:
        self.run, self.scope, self.roots, self.cache = run, scope, roots, cache
        self.library = set(sys.path)
        self.by_path: dict[str, types.ModuleType] = {}
        self.machine: dict[str, types.ModuleType] = {}
        self.names = _Names(vars(builtins))
        self.names.update({f"__lk_{name}__": helper for name, helper in HELPERS.items()})
        self.names.update({"__import__": self.load, "open": in_scope(open, "open"), run.case_class: run.recorded})
        self.names["input"] = _now("input")
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def inside(self, path: Any) -> bool:
        try:
            found = os.path.realpath(os.fspath(path))
        except (TypeError, ValueError, OSError):
            return isinstance(path, int)
        return any(found == s or found.startswith(s + os.sep) for s in self.scope)

    def locate(self, name: str) -> tuple[str, bool] | None:
        """File or folder of a module in the scope, and whether it is a package; a package goes before a module."""
        parent, _, last = name.rpartition(".")
        above = sys.modules.get(parent)
        if above is not None and not isinstance(above, StubModule):
            bases, parts = list(getattr(above, "__path__", [])), [last]
        else:
            bases, parts = [*self.roots, *(p for p in sys.path if p not in self.library)], name.split(".")
        key = "\n".join([name, *map(str, bases)])
        if key not in self.cache.located:
            self.cache.located[key] = self._locate(bases, parts)
        found = self.cache.located[key]
        return None if found is None else (found[0], found[1])

    def _locate(self, bases: list[str], parts: list[str]) -> tuple[str, bool] | None:
        folder = None
        for at in (os.path.join(base, *parts) for base in bases):
            for file, package in ((os.path.join(at, "__init__.py"), True), (f"{at}.py", False)):
                if os.path.isfile(file) and self.inside(file):
                    return os.path.realpath(file), package
            if folder is None and os.path.isdir(at) and self.inside(at):
                folder = os.path.realpath(at)
        return None if folder is None else (folder, True)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in sys.stdlib_module_names:
            return None
        found = self.locate(name)
        if found is None:
            self.run.may_raise(f"import {name}", IMPORT)
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
        code, self.run.tries[path] = self.cache.compiled(path, self.run.case_class)
        vars(module).update(__builtins__=self.names, __file__=path)
        exec(code, vars(module))

    def load(self, name: str, ns: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        """``import``, with the standard modules that depend on the machine as those that say so."""
        if level == 0 and name in _MACHINE_NAMES:
            if not names and "." in name:
                return self.load(name.partition(".")[0])
            if name not in self.machine:
                self.machine[name] = machine_module(name)
            return self.machine[name]
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


def patch_library() -> None:
    """Make the library's helpers know unknown values."""
    real = dataclasses.replace

    def replace(obj: Any, /, **changes: Any) -> Any:
        if type(obj) is Unknown:
            return _of_call(real, (obj,), changes)
        made = getattr(type(obj), "__replace__", None)
        return made(obj, **changes) if made is not None else real(obj, **changes)

    dataclasses.replace = replace  # type: ignore[assignment]
    patch_paths()
