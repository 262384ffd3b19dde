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
    KNOWN_CALLS,
    Run,
    Unknown,
    case_class,
    contains,
    current,
    escape,
    negate,
    recorded_class,
    render,
    same,
)

_STRUCTURE = (
    "dataclasses", "functools", "itertools", "copy", "enum", "typing", "contextlib", "operator", "collections",
    "types", "abc", "weakref", "warnings", "importlib", "_functools", "_operator", "_collections", "_weakref",
    "_abc", "_typing",
)  # fmt: skip
_REAL = (
    "all", "any", "bytearray", "classmethod", "delattr", "dict", "enumerate", "filter", "frozenset", "getattr",
    "iter", "list", "map", "max", "min", "object", "print", "property", "reversed", "set", "setattr", "slice",
    "sorted", "staticmethod", "sum", "super", "tuple", "zip", "id", "vars", "globals", "next",
)  # fmt: skip
_MACHINE = "depends on the machine"
# Names of standard modules whose values depend on the machine; "*": the whole module.
_MACHINE_NAMES = {
    "os": "environ environb getenv getenvb listdir scandir walk fwalk cpu_count process_cpu_count uname getcwd getpid"
    " getppid getuid getgid getlogin getloadavg sched_getaffinity urandom times stat lstat access sysconf name",
    "os.path": "exists isfile isdir islink lexists getsize getmtime getctime getatime expanduser expandvars",
    "sys": "argv platform version version_info hexversion implementation executable prefix base_prefix exec_prefix"
    " flags byteorder getsizeof getrefcount stdin orig_argv api_version",
    "time": "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time localtime gmtime ctime"
    " strftime timezone tzname altzone sleep thread_time",
    "uuid": "uuid1 uuid4 getnode",
    "shutil": "which disk_usage get_terminal_size",
    "multiprocessing": "cpu_count",
    "getpass": "getuser",
    "importlib": "",
    "importlib.util": "",
    "pkgutil": "iter_modules walk_packages find_loader get_loader",
    "datetime": "",
    "atexit": "",
    "locale": "getlocale getpreferredencoding getdefaultlocale",
    **dict.fromkeys("platform random secrets glob sysconfig site pwd grp resource gc importlib.metadata".split(), "*"),  # noqa: SIM905
}  # fmt: skip


def _unknown(key: str, text: str | None = None) -> Unknown:
    return Unknown(key, text or key, _MACHINE)


# -- helpers -------------------------------------------------------------------------------------------------------


def _has_unknown(values: Iterable[Any]) -> bool:
    return any(type(v) is Unknown for v in values)


def _of_call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unknown:
    def form(key: bool) -> str:
        shown = [render(v, key) for v in args] + [f"{k}={render(v, key)}" for k, v in kwargs.items()]
        owner = getattr(f, "__self__", None)
        name = getattr(f, "__name__", render(f, key))
        if owner is not None and not isinstance(owner, types.ModuleType):
            name = f"{render(owner, key)}.{name}"
        return f"{name}({', '.join(shown)})"

    held = [v for v in (*args, *kwargs.values()) if type(v) is Unknown]
    return Unknown(form(True), form(False), held[0]._u.origin if held else _MACHINE)


def call(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``f(*args, **kwargs)``; an unknown value where a function of the library would need one that is known."""
    if type(f) is Unknown:
        return f(*args, **kwargs)
    owner = getattr(f, "__self__", None)
    if type(owner) is str and f.__name__ in ("join", "format"):
        args = tuple(list(a) if isinstance(a, types.GeneratorType) else a for a in args)
        inner = args[0] if f.__name__ == "join" and args and isinstance(args[0], (list, tuple)) else ()
        return _of_call(f, args, kwargs) if _has_unknown([*inner, *args, *kwargs.values()]) else f(*args, **kwargs)
    if (isinstance(f, type) and f in _ORDERED) or (type(owner) is list and f.__name__ == "extend"):
        args = tuple(each(a) if type(a) in (set, frozenset) else a for a in args)
    if not (_has_unknown(args) or _has_unknown(kwargs.values())):
        return f(*args, **kwargs)
    if f is bool:
        return negate(negate(args[0]))
    if type(owner) in (list, dict) or isinstance(owner, (list, dict)):
        name = f.__name__
        if isinstance(owner, dict) and name in ("get", "pop", "setdefault") and type(args[0]) is Unknown:
            found = _pick(owner, args[0])
            return f(args[0] if found is None else found, *args[1:])
        if isinstance(owner, list) and name == "pop":
            return f(_pick(owner, args[0]))
        if isinstance(owner, list) and name == "insert":
            return f(0, *args[1:])
        return f(*args, **kwargs)
    module = (getattr(f, "__module__", None) or type(owner).__module__ or "").partition(".")[0]
    name = getattr(f, "__name__", "")
    if name in ("getattr", "setattr", "delattr") and type(args[1]) is Unknown:
        if name != "getattr":
            current().note(f"which attribute {name} changes isn't known: `{render(args[1], False)}`")
            return None
        return _of_call(f, args, kwargs)
    if module == "builtins" and (name in _REAL or (f is type and len(args) == 3) or _is_structure(owner)):
        return f(*args, **kwargs)
    if module in _STRUCTURE or module not in sys.stdlib_module_names or isinstance(f, functools.partial):
        return f(*args, **kwargs)
    return _of_call(f, args, kwargs)


_ORDERED = {list, tuple, enumerate, zip, map, filter}


def _is_structure(owner: Any) -> bool:
    return (
        owner is not None
        and type(owner).__module__ in ("builtins", "collections")
        and not isinstance(owner, (str, bytes, int, float, types.ModuleType, type))
    )


def _pick(container: Any, index: Unknown) -> Any:
    """The key or position that an unknown one turns out to be in this world; None where it is none of them."""
    for key in list(container) if isinstance(container, dict) else range(min(len(container), 64)):
        if index == key:
            return key
    return None


def get(container: Any, index: Any) -> Any:
    if type(index) is Unknown and isinstance(container, (list, tuple, dict)):
        found = _pick(container, index)
        if found is None:
            raise (KeyError if isinstance(container, dict) else IndexError)(f"{index} is taken to be none of its own")
        return container[found]
    if isinstance(index, slice) and _has_unknown((index.start, index.stop, index.step)):
        if isinstance(container, (list, tuple)):
            current().note("which part of a list is taken isn't known")
            return container[:]
        return Unknown(f"{render(container, True)}[{index!r}]", f"{render(container, False)}[...]", _MACHINE)
    if type(index) is Unknown and isinstance(container, (str, bytes)):
        return Unknown(f"{container!r}[{index._u.key}]", f"{container!r}[{index._u.shown()}]", index._u.origin)
    return container[index]


def set_item(value: Any, container: Any, index: Any) -> None:
    if isinstance(index, slice) and _has_unknown((index.start, index.stop, index.step)):
        current().note("which part of a list is replaced isn't known")
        return
    if type(index) is Unknown and isinstance(container, list):
        index = _pick(container, index)
    container[index] = value


def del_item(container: Any, index: Any) -> None:
    if isinstance(index, slice) and _has_unknown((index.start, index.stop, index.step)):
        current().note("which part of a list is removed isn't known")
        return
    if type(index) is Unknown and isinstance(container, (list, dict)):
        index = _pick(container, index)
    del container[index]


_CONVERSIONS: dict[int, Callable[[Any], Any]] = {-1: lambda v: v, 115: str, 114: repr, 97: ascii}


def text(*parts: Any) -> Any:
    """An f-string: texts, and (value, conversion, format)."""
    values = [p if isinstance(p, str) else p[0] for p in parts]
    if _has_unknown(values) or _has_unknown(p[2] for p in parts if not isinstance(p, str)):

        def form(key: bool) -> str:
            shown = (p if isinstance(p, str) else "{" + render(p[0], key) + "}" for p in parts)
            return "f" + repr("".join(shown))

        origin = next((v._u.origin for v in values if type(v) is Unknown), _MACHINE)
        return Unknown(form(True), form(False), origin)
    out = []
    for p in parts:
        if not isinstance(p, str):
            value, conversion, spec = p
            value = _CONVERSIONS[conversion](value)
            p = format(value, spec)
        out.append(p)
    return "".join(out)


def mod(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        inner = right if isinstance(right, tuple) else right.values() if isinstance(right, dict) else (right,)
        if _has_unknown(inner):
            key, shown = (f"{render(left, k)} % {render(right, k)}" for k in (True, False))
            return Unknown(key, shown, next(v._u.origin for v in inner if type(v) is Unknown), compound=True)
    return left % right


def each(values: Any) -> Any:
    """What a loop goes over; the order of a set is a decision, so that a list that takes it over is reported."""
    if type(values) not in (set, frozenset) or len(values) < 2 or all(isinstance(v, int) for v in values):
        return values
    run = current()
    items = sorted(values, key=lambda v: render(v, True))
    site = run.site()
    where = f"order of the set at {Path(site[0]).name}:{site[1]}:{site[2]}"
    return items[::-1] if run.decide(where, where, kind="order") else items


def mapping(values: Any) -> Any:
    return {} if type(values) is Unknown else values


def catch(kinds: Any) -> Any:
    """What an ``except`` catches; whether an unknown class catches the error is a decision."""
    if isinstance(kinds, tuple):
        return tuple(k for kind in kinds for k in (catch(kind) if type(kind) is Unknown else (kind,)))
    if type(kinds) is not Unknown:
        return kinds
    error = type(sys.exc_info()[1]).__name__
    caught = current().decide(f"{kinds._u.key} catches {error}", f"`{kinds._u.shown()}` catches {error}")
    return (Exception,) if caught else ()


def throw(error: Any) -> Any:
    return RuntimeError(f"{error._u.shown()}") if type(error) is Unknown else error


def subject(value: Any) -> Any:
    if type(value) is Unknown:
        current().note(f"whether `{value._u.shown()}` has the form of a `case` isn't known")
    return value


# -- modules -------------------------------------------------------------------------------------------------------


class StubModule(types.ModuleType):
    """A module outside the scope."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self)["__path__"] = []

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value
        if not isinstance(value, types.ModuleType) and name[:2] != "__":
            escape(f"stored in `{self.__name__}.{name}`", [value])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__version__", "__file__"):
            raise AttributeError(name)
        loader: Importer = sys.meta_path[0]  # type: ignore[assignment]
        full = f"{self.__name__}.{name}"
        if name == current().case_class:
            return recorded_class()
        if loader.locate(full) is not None:
            return importlib.import_module(full)
        value = Unknown(full, name, f"`{self.__name__}` is outside the scope")
        return KNOWN_CALLS.get(full, value)


class MachineModule(types.ModuleType):
    """A standard module of which some names depend on the machine."""

    def __init__(self, real: types.ModuleType, name: str) -> None:
        super().__init__(name)
        known = vars(real)
        hidden = _MACHINE_NAMES.get(name, "").split()
        values = {n: v for n, v in known.items() if n not in hidden and n != "__dict__"}
        values |= {n: _unknown(f"{name}.{n}") for n in hidden if n in known or hidden == ["*"]}
        vars(self).update(values)
        for child in _MACHINE_NAMES:
            if child.rpartition(".")[0] == name:
                vars(self)[child.rpartition(".")[2]] = machine_module(child)
        if name == "os.path":
            for n in ("exists", "isfile", "isdir"):
                vars(self)[n] = _in_scope(known[n], f"os.path.{n}")
        elif name == "time":
            vars(self)["sleep"] = lambda seconds: None
        elif name == "importlib.util":
            vars(self)["find_spec"] = find_module
        elif name == "atexit":
            vars(self)["register"] = at_exit
        elif name == "datetime":
            for n in ("date", "datetime"):
                now = {
                    m: classmethod(lambda cls, *a, _t=f"{n}.{m}()": _unknown(_t)) for m in ("now", "utcnow", "today")
                }
                vars(self)[n] = type(n, (known[n],), now)


def at_exit(f: Any, *args: Any, **kwargs: Any) -> Any:
    escape("run at the interpreter's exit", [f, *args])
    return f


def machine_module(name: str) -> types.ModuleType:
    return StubModule(name) if _MACHINE_NAMES[name] == "*" else MachineModule(importlib.import_module(name), name)


def find_module(name: Any, package: Any = None) -> Any:
    """``importlib.util.find_spec``: not known for what is outside the scope."""
    loader: Importer = sys.meta_path[0]  # type: ignore[assignment]
    full = importlib.util.resolve_name(name, package) if isinstance(name, str) else ""
    if full and (full.partition(".")[0] in sys.stdlib_module_names or loader.locate(full) is not None):
        return importlib.util.find_spec(full)
    return _unknown(f"find_spec({render(name, True)})")


def _in_scope(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a path: the real one inside the scope, unknown outside."""

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
        loader: Importer = sys.meta_path[0]  # type: ignore[assignment]
        if type(path) is Unknown or not (isinstance(path, int) or loader.inside(path)):
            return (
                _of_call(real, (path, *args), kwargs) if type(path) is Unknown else _unknown(f"{name}({str(path)!r})")
            )
        return real(path, *args, **kwargs)

    return wrapped


def opened(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
    """``open``: real inside the scope; what is read elsewhere isn't known. The audit hook refuses to write."""
    loader: Importer = sys.meta_path[0]  # type: ignore[assignment]
    if type(path) is Unknown or (isinstance(mode, str) and not set("wax+") & set(mode) and not loader.inside(path)):
        return _unknown(f"open({render(path, True)})")
    return open(path, mode, *args, **kwargs)


def _patch_paths() -> None:
    for name in ("exists", "is_file", "is_dir", "read_text", "read_bytes", "open"):
        setattr(Path, name, _in_scope(getattr(Path, name), f"Path.{name}"))
    for name in ("iterdir", "glob", "rglob", "walk", "stat", "lstat", "expanduser"):
        if hasattr(Path, name):
            setattr(
                Path,
                name,
                lambda self, *a, _n=name: _unknown(f"Path({str(self)!r}).{_n}({render(list(a), True)[1:-1]})"),
            )
    for name in ("home", "cwd"):
        setattr(Path, name, classmethod(lambda cls, _n=name: _unknown(f"Path.{_n}()")))


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
        self.located = cache.located
        self.library = set(sys.path)
        self.by_path: dict[str, types.ModuleType] = {}
        self.machine: dict[str, types.ModuleType] = {}
        self.star = False
        self.names = self._builtins()
        self.initial = dict(self.names)

    # -- files -----------------------------------------------------------------------------------------------------

    def inside(self, path: Any) -> bool:
        try:
            found = os.path.realpath(os.fspath(path))
        except (TypeError, ValueError, OSError):
            return False
        return any(found == s or found.startswith(s + os.sep) for s in self.scope)

    def locate(self, name: str) -> tuple[str, bool] | None:
        """File or folder of a module in the scope, and whether it is a package; a package goes before a module."""
        parent = sys.modules.get(name.rpartition(".")[0])
        if parent is not None and not isinstance(parent, StubModule) and "." in name:
            bases, parts = list(getattr(parent, "__path__", [])), name.split(".")[-1:]
        else:
            bases, parts = [*self.roots, *(p for p in sys.path if p not in self.library)], name.split(".")
        key = "\n".join([name, *map(str, bases)])
        if key not in self.located:
            self.located[key] = self._locate(bases, parts)
        found = self.located[key]
        return None if found is None else (found[0], found[1])

    def _locate(self, bases: list[str], parts: list[str]) -> tuple[str, bool] | None:
        folder = None
        for base in bases:
            at = os.path.join(base, *parts)
            for file, package in ((os.path.join(at, "__init__.py"), True), (f"{at}.py", False)):
                if os.path.isfile(file) and self.inside(file):
                    return os.path.realpath(file), package
            if folder is None and os.path.isdir(at) and self.inside(at):
                folder = os.path.realpath(at)
        return None if folder is None else (folder, True)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names:
            return None
        found = self.locate(name)
        loader: Any = self
        if found is None:
            self.run.may_raise(f"import {name}", f"import {name}", (ImportError, ModuleNotFoundError))
            return importlib.machinery.ModuleSpec(name, loader, is_package=True)
        spec = importlib.machinery.ModuleSpec(name, loader, origin=found[0], is_package=found[1])
        if found[1]:
            spec.submodule_search_locations = [found[0] if os.path.isdir(found[0]) else os.path.dirname(found[0])]
        spec.has_location = os.path.isfile(found[0])
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        if spec.origin is None:
            return StubModule(spec.name)
        return self.by_path.get(spec.origin)

    def exec_module(self, module: types.ModuleType) -> None:
        origin = module.__spec__.origin if module.__spec__ is not None else None
        if origin is None or origin in self.by_path or os.path.isdir(origin):
            return
        self.by_path[origin] = module
        self.execute(origin, module)

    def execute(self, path: str, module: types.ModuleType) -> None:
        code, found = self.cache.compiled(path, self.run.case_class)
        self.run.tries[path] = found
        vars(module)["__builtins__"] = self.names
        vars(module)["__file__"] = path
        exec(code, vars(module))

    # -- names -----------------------------------------------------------------------------------------------------

    def _builtins(self) -> dict[str, Any]:
        names: dict[str, Any] = dict(vars(builtins))
        helpers = {
            "call": call, "not": negate, "is": same, "in": contains, "text": text, "mod": mod, "get": get,
            "set": set_item, "del": del_item, "each": each, "mapping": mapping, "catch": catch, "raise": throw,
            "subject": subject, "case": case_class, "slice": slice,
        }  # fmt: skip
        names |= {f"__lk_{name}__": helper for name, helper in helpers.items()}
        names |= {"__import__": self.load, "open": opened, "input": lambda *a: _unknown("input()")}
        names[self.run.case_class] = recorded_class()
        return _Names(names, self)

    def load(self, name: str, ns: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        """``import``, with the standard modules that depend on the machine as those that say so."""
        if level == 0 and name in _MACHINE_NAMES:
            if name not in self.machine:
                self.machine[name] = machine_module(name)
            return self.machine[name] if names or "." not in name else self.load(name.partition(".")[0])
        out = builtins.__import__(name, ns, local, names or (), level)
        if isinstance(out, StubModule) and names and "*" in names:
            self.star = True
            self.run.note(f"star import from `{name}`, which is outside the scope")
        return out


class _Names(dict):  # type: ignore[type-arg]
    """Built-in names of executed files; after a star import from outside the scope, any name may be one."""

    def __init__(self, names: dict[str, Any], importer: Importer) -> None:
        super().__init__(names)
        self.importer = importer

    def __missing__(self, name: str) -> Any:
        if not self.importer.star:
            raise KeyError(name)
        return Unknown(f"*.{name}", name, "a star import brings it")


def prepare(importer: Importer) -> None:
    """Make `importer` the first to be asked, and the library's helpers know unknown values."""
    sys.meta_path.insert(0, importer)  # type: ignore[arg-type]
    real_replace = dataclasses.replace

    def replace(obj: Any, /, **changes: Any) -> Any:
        if type(obj) is Unknown:
            return _of_call(real_replace, (obj,), changes)
        made = getattr(type(obj), "__replace__", None)
        return made(obj, **changes) if made is not None else real_replace(obj, **changes)

    dataclasses.replace = replace  # type: ignore[assignment]
    _patch_paths()
