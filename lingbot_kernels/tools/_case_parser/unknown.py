"""Values that a config can't know here: each operation on one gives another, with its expression as text.

``bool`` of one is a decision of the current `Run`, keyed by its text and the same throughout the run.
"""

from __future__ import annotations

import dis
import enum
import hashlib
import itertools
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

MAX_REPEATS = 3000  # a decision asked for more often than that has a loop wait for its other outcome
_MAX_KEY = 400
_CONSTANTS = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
_IMPORT_ERRORS = (ImportError, ModuleNotFoundError)
MARKED = re.compile("\ue000([^\ue004]*)\ue004([^\ue001]*)\ue001")  # an unknown value and its origin within a text
Place = tuple["types.CodeType | None", int, int]  # code, instruction, line
Site = tuple[str, int, int]  # file, line, column
SOMEWHERE: Place = (None, 0, 1)


class StuckError(BaseException):
    """A loop asks for one decision again and again."""


class Run:
    """One execution of a config: its decisions, what stays unresolved, and what it was refused."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config, self.name, self.id_param = request["config"], request["name"], request["id_param"]
        self.case_class: str = request["case_class"]
        self.forced: dict[str, bool] = request["forced"]
        self.assumed: dict[str, bool] = request["assume"]
        self.places: dict[str, bool] = request["places"]  # outcomes of what is first met there
        self.sweep = set(request["sweep"])
        self.branch: Callable[[], bool] = lambda: False  # forks; True in the branch, which is waited for
        self.flipped, self.prefix = "", 0  # in a branch of a sweep: what goes the other way, decisions before it
        self.values: dict[str, bool] = {}
        self.repeats: Counter[str] = Counter()
        self.trace: list[list[Any]] = []  # [key, kind, value, default, place, site]
        self.notes: dict[tuple[Site, str], None] = {}
        self.refused: list[tuple[Site, str]] = []
        self.escapes: list[tuple[Place, str, list[Any]]] = []
        self.made: dict[str, int] = {}  # ids of the cases made, with their lines
        self.lines: dict[int, tuple[Any, int]] = {}
        self.executed: set[str] = set()  # files
        self.handlers: list[Callable[[], Any]] = []  # what each ``try`` catches that is under way
        self.recorded = case_class(type(self.case_class, (Record,), {}))
        _run[:] = [self]

    def place(self) -> Place:
        """Where the config is now, cheaply; `site` resolves it."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename not in self.executed:
            frame = frame.f_back
        return SOMEWHERE if frame is None else (frame.f_code, frame.f_lasti, frame.f_lineno)

    def site(self, place: Place | None = None) -> Site:
        code, last, line = place or self.place()
        if code is None:
            return self.config, 1, 1
        if hasattr(code, "co_positions"):  # from Python 3.11 on
            found = next(itertools.islice(code.co_positions(), last // 2, None), (None,) * 4)
            if found[0] is not None and found[2] is not None:
                return code.co_filename, found[0], found[2] + 1
        return code.co_filename, line, 0

    def module_line(self) -> int:
        """Line of the config's own module code that is being executed; 0 where none is."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != (self.config, "<module>"):
            frame = frame.f_back
        return 0 if frame is None else frame.f_lineno

    def note(self, reason: str, place: Place | None = None) -> None:
        """Report something that could hide a case."""
        self.notes[self.site(place), reason] = None

    def decide(self, key: str, *, kind: str = "", default: bool = False) -> bool:
        """The outcome of a test in this run: as assumed, as forced, else `default`."""
        self.repeats[key] += 1
        if self.repeats[key] > MAX_REPEATS:
            raise StuckError(f"`{plain(key)}` is asked for {self.repeats[key]} times")
        if key not in self.values and plain(key) in self.assumed:
            self.values[key] = self.assumed[plain(key)]
        elif key not in self.values:
            code, last, _ = self.place()
            where = "" if code is None else f"{code.co_filename}:{code.co_firstlineno}:{last}"
            default = self.places.get(where, default)
            value = self.forced.get(key, default)
            if key in self.sweep and not self.flipped and self.branch():
                self.flipped, value, self.prefix = key, not value, len(self.trace)
            self.values[key] = value
            self.trace.append([key, kind, value, default, where, self.site() if kind else None])
        return self.values[key]

    def may_raise(self, key: str, *kinds: type) -> None:
        """Raise, as one decision a handler, what a ``try`` around this would catch: `kinds`, else any error."""
        for handler in self.handlers[::-1]:
            try:
                caught = handler()
            except Exception:  # a name that isn't there yet
                continue
            for kind in _flat(caught):
                if not isinstance(kind, type) or not issubclass(kind, BaseException):
                    continue
                if kinds == _IMPORT_ERRORS:
                    if kind in (*kinds, Exception, BaseException) and not self.decide(
                        f"`{key}` succeeds", default=True
                    ):
                        raise ModuleNotFoundError(f"{plain(key)} is taken to fail")
                elif kind in kinds or not (kinds or issubclass(kind, _IMPORT_ERRORS)):
                    name = "an exception" if kind in (Exception, BaseException) else kind.__name__
                    if self.decide(f"`{key}` raises {name}"):
                        raise kind(f"{plain(key)} is taken to raise")

    def may_lack(self, name: str) -> None:
        """Raise where the ``try`` around an import takes it to fail."""
        self.may_raise(f"import {name}", *_IMPORT_ERRORS)


def _flat(kinds: Any) -> list[Any]:
    return [k for kind in kinds for k in _flat(kind)] if isinstance(kinds, tuple) else [kinds]


_run: list[Run] = []


def current() -> Run:
    return _run[0]


def plain(key: str, *, full: bool = False) -> str:
    """The text of a key, which marks the modules that its names come from; `full`: with them."""
    return re.sub("[\ue002\ue003]" if full else "\ue002[^\ue003]*\ue003", "", key)


def render(value: Any, depth: int = 0) -> str:
    """Text of an operand: source-like for constants, the expression for unknown values."""
    if type(value) is Unknown:
        return value._inner()
    if type(value) in _CONSTANTS:
        return repr(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)):
        return str(getattr(value, "__qualname__", getattr(value, "__name__", "?")))
    if depth > 3:
        return "..."
    if isinstance(value, list) and value and is_case(value[0]):
        named = vars(sys.modules[current().name]).items()
        return next((n for n, v in named if v is value), f"{len(value)} cases")
    if isinstance(value, (list, tuple, set, frozenset)):
        around = {list: "[]", tuple: "()"}.get(type(value), "{}")
        shown = [render(v, depth + 1) for v in itertools.islice(value, 40)]
        return around[0] + ", ".join(shown if isinstance(value, (list, tuple)) else sorted(shown)) + around[1]
    held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    name = "" if isinstance(value, dict) else type(value).__name__
    if is_case(value):
        return f"{name}({render(held.get(current().id_param), depth + 1)})"
    pairs = (f"{render(k, depth + 1)}: {render(v, depth + 1)}" for k, v in itertools.islice(list(held.items()), 20))
    return f"{name}{{{', '.join(pairs)}}}"


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([render(v) for v in args] + [f"{k}={render(v)}" for k, v in kwargs.items()])


class Unknown:
    """A value that isn't known; see the module. `_key`: its text, with marks; `_origin`: where it comes from."""

    __slots__ = ("_compound", "_held", "_key", "_origin", "_place")
    _key: str
    _origin: str
    _held: list[Any]  # lists and cases that it may have taken over

    def __init__(self, key: str, origin: str, *, compound: bool = False, place: Place | None = None) -> None:
        if len(key) > _MAX_KEY:
            key = f"{key[:_MAX_KEY]}...{hashlib.blake2b(key.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"
        fields: tuple[Any, ...] = (compound, [], key, origin, place or current().place())
        for name, value in zip(self.__slots__, fields, strict=True):
            object.__setattr__(self, name, value)

    def _inner(self) -> str:
        return f"({self._key})" if self._compound else self._key

    def _child(self, suffix: str, *raises: type) -> Unknown:
        key = self._inner() + suffix
        current().may_raise(key, *raises)
        return Unknown(key, self._origin)

    def __getattr__(self, name: str) -> Any:
        if name[:2] == name[-2:] == "__" and name not in ("__version__", "__file__", "__name__", "__doc__"):
            raise AttributeError(name)
        if name == current().case_class:
            return current().recorded
        return self._child(f".{name}", AttributeError)

    def __getitem__(self, index: Any) -> Any:
        return self._child(f"[{render(index)}]", KeyError, IndexError, LookupError)

    def __setitem__(self, index: Any, value: Any) -> None:
        escape(f"stored in `{plain(self._key)}`", [value])

    __setattr__ = __setitem__

    def __delitem__(self, index: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = [*args, *kwargs.values()]
        if not plain(self._key, full=True).startswith(("pytest.mark.", "pytest.fixture")):
            escape(f"passed to `{plain(self._key)}`", held)
        out = self._child(f"({arguments(args, kwargs)})")
        out._held.extend(v for v in held if isinstance(v, (list, tuple)) or is_case(v))
        return out

    def __bool__(self) -> bool:
        return current().decide(self._key)

    def __index__(self) -> int:
        current().note(f"which element or part `{plain(self._key)}` means isn't known")
        return 0

    def __iter__(self) -> Iterator[Any]:
        name, arg = opcode(sys._getframe(1))
        if name.startswith("UNPACK"):
            return iter([self[i] for i in range((arg & 0xFF) + (arg >> 8))])
        if not current().decide(f"`{self._key}` has elements", kind="iter", default=True):
            return iter(())
        out = Unknown(f"{self._inner()}[...]", self._origin, place=self._place)
        out._held.extend(self._held)
        return iter([out])

    __reversed__ = __iter__

    def keys(self) -> Any:
        """None for ``f(**unknown)``: what it lacks shows."""
        return [] if opcode(sys._getframe(1))[0] == "DICT_MERGE" else self._child(".keys")()

    def __eq__(self, other: Any) -> Any:
        return (type(other) is Unknown and other._key == self._key) or operation("{} == {}", self, other)

    def __ne__(self, other: Any) -> Any:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, (list, tuple)):
            return operation("{} + {}", other, self)
        if isinstance(other, list) and opcode(sys._getframe(1)) in (("INPLACE_ADD", 0), ("BINARY_OP", 13)):
            other.extend(self)  # keeps the list's identity, as ``+=`` of a list does
            return other
        return type(other)([*other, *self])

    def __enter__(self) -> Any:
        return self._child(".__enter__()")

    def __exit__(self, *_: Any) -> None:
        pass

    def __instancecheck__(self, value: Any) -> bool:
        return bool(operation("isinstance({}, {})", value, self))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (Record,) if next(b for b in bases if type(b) is Unknown) is self else ()

    def __deepcopy__(self, memo: Any = None) -> Unknown:
        return self

    __copy__ = __deepcopy__

    def __format__(self, spec: str = "") -> str:
        return f"\ue000{plain(self._key)}\ue004{self._origin}\ue001"

    __repr__ = __format__


def operation(form: str, *operands: Any) -> Unknown:
    """An operation on operands of which one at least isn't known."""
    origin = next(v._origin for v in operands if type(v) is Unknown)
    return Unknown(form.format(*map(render, operands)), origin, compound=True)


def _operator(form: str) -> Any:
    return lambda *operands: operation(form, *operands)


_BINARY = {
    **{"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@"},
    **{"and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>"},
}
_ORDERING = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
for _name, _symbol in {**_BINARY, **_ORDERING}.items():
    setattr(Unknown, f"__{_name}__", _operator(f"{{}} {_symbol} {{}}"))
    if _name != "add" and _name in _BINARY:
        setattr(Unknown, f"__r{_name}__", _operator(f"{{1}} {_symbol} {{0}}"))
for _name, _form in (("neg", "-{}"), ("pos", "+{}"), ("invert", "~{}"), ("abs", "abs({})")):
    setattr(Unknown, f"__{_name}__", _operator(_form))


class Record:
    """Stands in for a class that isn't known, also as a base: keeps what it is given, by name where that is known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [n for c in reversed(type(self).__mro__) for n in getattr(c, "__annotations__", {})]
        if is_case(self) and not names and current().id_param not in kwargs:
            names = [current().id_param]
        names += [f"argument {i}" for i in range(len(names), len(args))]
        vars(self).update(zip(names, args, strict=False))
        vars(self).update(kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__" or (is_case(self) and name == current().id_param):
            raise AttributeError(name)
        return Unknown(f"{render(self)}.{name}", "the class is outside the scope")

    def __eq__(self, other: Any) -> Any:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(vars(self).get(current().id_param))

    def __replace__(self, **changes: Any) -> Any:
        return type(self)(**{**vars(self), **changes})


def case_class(cls: Any) -> Any:
    """Decorates the case class so that its cases note their lines; of an unknown class, a record."""
    if not isinstance(cls, type):
        return current().recorded
    original = cls.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        run = current()
        line = run.module_line()
        original(self, *args, **kwargs)
        case_id = getattr(self, run.id_param, None)
        if isinstance(case_id, str):
            run.made.setdefault(str(case_id), line)
        run.lines[id(self)] = (self, line)

    init.__wrapped__ = original  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[misc]
    return cls


def is_case(value: Any) -> bool:
    return any(c.__name__ == current().case_class for c in type(value).__mro__)


class ParameterSet(tuple):  # type: ignore[type-arg]
    """What ``pytest.param`` gives: the values of one run of a test."""


def _outcome(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("pytest ends the import here: " + ", ".join(map(str, args)))


KNOWN_CALLS = {f"pytest.{n}": _outcome for n in ("skip", "fail", "exit", "xfail")}
KNOWN_CALLS["pytest.param"] = lambda *values, **_: ParameterSet(values)  # type: ignore[assignment]


def escape(how: str, values: list[Any]) -> None:
    """What the config doesn't control may change these from now on, or call them."""
    kept = [v for v in values if type(v) not in _CONSTANTS and not isinstance(v, (Unknown, type, types.ModuleType))]
    kept = [v for v in kept if not (isinstance(v, list) and v and all(type(x) in _CONSTANTS for x in v))]
    if kept:
        current().escapes.append((current().place(), how, kept))


def opcode(frame: types.FrameType) -> tuple[str, int]:
    """The instruction that a frame is at, with its argument."""
    code, at = frame.f_code.co_code, max(frame.f_lasti, 0)
    wide = code[at - 1] if at >= 2 and dis.opname[code[at - 2]] == "EXTENDED_ARG" else 0
    return dis.opname[code[at]], code[at + 1] + (wide << 8)
