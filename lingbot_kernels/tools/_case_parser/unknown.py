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
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_REPEATS = 3000  # a decision asked for more often than that has a loop wait for its other outcome
_MAX_KEY = 400
_CONSTANTS = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
Place = tuple["types.CodeType | None", int, int]  # code, instruction, line
Site = tuple[str, int, int]  # file, line, column


class StuckError(BaseException):
    """A loop asks for one decision again and again."""


class Run:
    """One execution of a config: its decisions, what stays unresolved, and what it was refused."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config, self.name = request["config"], request["name"]
        self.case_class, self.id_param = request["case_class"], request["id_param"]
        self.forced: dict[str, bool] = request["forced"]
        self.assumed: dict[str, bool] = request["assume"]
        self.places: dict[str, bool] = request["places"]  # outcomes of what is first met there
        self.sweep = set(request["sweep"])
        self.flipped, self.prefix = "", 0  # in a branch of a sweep: what goes the other way, decisions before it
        self.values: dict[str, bool] = {}
        self.repeats: dict[str, int] = {}
        self.trace: list[list[Any]] = []  # [key, kind, value, default, place, site]
        self.notes: dict[tuple[Site, str], None] = {}
        self.refused: list[tuple[Site, str]] = []
        self.escapes: list[tuple[Place, str, list[Any]]] = []
        self.made: dict[str, int] = {}  # ids of the cases made, with their lines
        self.lines: dict[int, tuple[Any, int]] = {}
        self.assumed_met: set[str] = set()
        self.tries: dict[str, list[tuple[int, int, list[types.CodeType | None]]]] = {}  # by executed file
        self.recorded = type(self.case_class, (RecordedCase,), {})
        _run[:] = [self]

    def frames(self) -> Iterator[types.FrameType]:
        """Frames of the executed files, innermost first."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename in self.tries:
                yield frame
            frame = frame.f_back

    def place(self) -> Place:
        """Where the config is now, cheaply; `site` resolves it."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename not in self.tries:
            frame = frame.f_back
        return (None, 0, 1) if frame is None else (frame.f_code, frame.f_lasti, frame.f_lineno)

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
        lines = (
            f.f_lineno for f in self.frames() if f.f_code.co_name == "<module>" and f.f_code.co_filename == self.config
        )
        return next(lines, 0)

    def note(self, reason: str, place: Place | None = None) -> None:
        """Report something that could hide a case."""
        self.notes[self.site(place), reason] = None

    def decide(self, key: str, *, kind: str = "", default: bool = False) -> bool:
        """The outcome of a test in this run: as assumed, as forced, else `default`."""
        self.repeats[key] = n = self.repeats.get(key, 0) + 1
        if n > MAX_REPEATS:
            raise StuckError(f"`{plain(key)}` is asked for {n} times")
        if key in self.values:
            return self.values[key]
        name = plain(key)
        if name in self.assumed:
            self.assumed_met.add(name)
            self.values[key] = self.assumed[name]
            return self.values[key]
        code, last, _ = self.place()
        where = "" if code is None else f"{code.co_filename}:{code.co_firstlineno}:{last}"
        default = self.places.get(where, default)
        value = self.forced.get(key, default)
        if key in self.sweep and not self.flipped and self.branch():
            self.flipped, value, self.prefix = key, not value, len(self.trace)
        self.values[key] = value
        self.trace.append([key, kind, value, default, where, self.site() if kind else None])
        return value

    def branch(self) -> bool:
        """Fork: True in the branch, which is waited for; set by `reading`."""
        return False

    def may_raise(self, key: str, kinds: tuple[type, ...]) -> None:
        """Raise, as one decision a handler, what a ``try`` around this would catch; `kinds`: of which handlers."""
        for frame in self.frames() if any(self.tries.values()) else ():
            for first, last, handlers in self.tries[frame.f_code.co_filename]:
                for handler in handlers if first <= frame.f_lineno <= last else ():
                    try:
                        caught = Exception if handler is None else eval(handler, frame.f_globals, frame.f_locals)
                    except Exception:
                        continue
                    for kind in caught if isinstance(caught, tuple) else (caught,):
                        if isinstance(kind, type) and (
                            kind in kinds or (kinds == CALL and issubclass(kind, Exception))
                        ):
                            self._fail(key, kind, kinds)

    def _fail(self, key: str, kind: Any, kinds: tuple[type, ...]) -> None:
        if kinds == IMPORT:
            if not self.decide(f"`{key}` succeeds", default=True):
                raise ModuleNotFoundError(f"{plain(key)} is taken to fail")
        elif not issubclass(kind, ImportError):
            name = "an exception" if kind in (Exception, BaseException) else kind.__name__
            if self.decide(f"`{key}` raises {name}"):
                raise kind(f"{plain(key)} is taken to raise")


CALL, IMPORT = (Exception, BaseException), (ImportError, ModuleNotFoundError, Exception, BaseException)
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
        left, right = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        shown = [render(v, depth + 1) for v in itertools.islice(value, 40)]
        return left + ", ".join(shown if isinstance(value, (list, tuple)) else sorted(shown)) + right
    held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    pairs = [f"{render(k, depth + 1)}: {render(v, depth + 1)}" for k, v in itertools.islice(list(held.items()), 20)]
    name = type(value).__name__
    if is_case(value):
        return f"{name}({render(held.get(current().id_param), depth + 1)})"
    return ("" if isinstance(value, dict) else name) + "{" + ", ".join(pairs) + "}"


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([render(v) for v in args] + [f"{k}={render(v)}" for k, v in kwargs.items()])


class Unknown:
    """A value that isn't known; see the module. `_key`: its text, with marks; `_origin`: where it comes from."""

    __slots__ = ("_compound", "_element", "_held", "_items", "_key", "_negated", "_origin", "_place")
    _key: str
    _origin: str
    _items: dict[str, Any]
    _held: list[Any]

    def __init__(
        self, key: str, origin: str, *, compound: bool = False, negated: bool = False, place: Any = None
    ) -> None:
        if len(key) > _MAX_KEY:
            key = f"{key[:_MAX_KEY]}...{hashlib.blake2b(key.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"
        held: list[Any] = []
        fields = (compound, False, held, dict[str, Any](), key, negated, origin, place or current().place())
        for name, value in zip(self.__slots__, fields, strict=True):
            object.__setattr__(self, name, value)

    def _child(self, key: str, *, compound: bool = False) -> Unknown:
        return Unknown(key, self._origin, compound=compound)

    def _text(self) -> str:
        return f"not {self._key}" if self._negated else self._key

    def _inner(self) -> str:
        return f"({self._text()})" if self._compound or self._negated else self._key

    def __getattr__(self, name: str) -> Any:
        if name[:2] == name[-2:] == "__" and name not in ("__version__", "__file__", "__name__", "__doc__"):
            raise AttributeError(name)
        if name == current().case_class:
            return current().recorded
        if name in self._items:
            return self._items[name]
        key = f"{self._inner()}.{name}"
        current().may_raise(key, (AttributeError,))
        return self._child(key)

    def __setattr__(self, name: str, value: Any) -> None:
        self._items[name] = value
        escape(f"stored in `{plain(self._text())}`", [value])

    def __getitem__(self, index: Any) -> Any:
        key = f"{self._inner()}[{render(index)}]"
        if key in self._items:
            return self._items[key]
        current().may_raise(key, (KeyError, IndexError, LookupError))
        return self._child(key)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.__setattr__(f"{self._inner()}[{render(index)}]", value)

    def __delitem__(self, index: Any) -> None:
        self._items.pop(f"{self._inner()}[{render(index)}]", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = f"{self._inner()}({arguments(args, kwargs)})"
        held = [*args, *kwargs.values()]
        if not plain(self._key, full=True).startswith(("pytest.mark.", "pytest.fixture")):
            escape(f"passed to `{plain(self._text())}`", held)
        current().may_raise(key, CALL)
        out = self._child(key)
        out._held.extend(v for v in held if isinstance(v, (list, tuple)) or is_case(v))
        return out

    def __bool__(self) -> bool:
        return current().decide(self._key, default=self._negated) != self._negated

    def __iter__(self) -> Iterator[Any]:
        name, arg = opcode(sys._getframe(1))
        if name.startswith("UNPACK"):
            return iter([self[i] for i in range((arg & 0xFF) + (arg >> 8))])
        if not current().decide(f"`{self._text()}` has elements", kind="iter", default=True):
            return iter(())
        out = Unknown(f"{self._inner()}[...]", self._origin, place=self._place)
        object.__setattr__(out, "_element", True)
        out._held.extend(self._held)
        return iter([out])

    __reversed__ = __iter__

    def __eq__(self, other: Any) -> Any:
        if type(other) is Unknown and other._text() == self._text():
            return True
        return operation("{} == {}", self, other)

    def __ne__(self, other: Any) -> Any:
        return negate(self == other)

    def __hash__(self) -> int:
        return hash(self._key)

    def __contains__(self, item: Any) -> bool:
        return bool(contains(item, self))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, (list, tuple)):
            return operation("{} + {}", other, self)
        if isinstance(other, list) and opcode(sys._getframe(1)) in (("INPLACE_ADD", 0), ("BINARY_OP", 13)):
            other.extend(list(self))  # keeps the list's identity, as ``+=`` of a list does
            return other
        return [*other, *self] if isinstance(other, list) else (*other, *self)

    def __enter__(self) -> Any:
        return self._child(f"{self._inner()}.__enter__()")

    def __exit__(self, *_: Any) -> None:
        pass

    def __instancecheck__(self, value: Any) -> bool:
        return bool(operation("isinstance({}, {})", value, self))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (StubBase,) if next(b for b in bases if type(b) is Unknown) is self else ()

    def __copy__(self) -> Unknown:
        return self

    def __deepcopy__(self, memo: Any) -> Unknown:
        return self

    def __repr__(self) -> str:
        return f"\ue000{plain(self._text())}\ue001"  # marks a text that holds it

    def __format__(self, spec: str) -> str:
        return repr(self)


def operation(form: str, *operands: Any) -> Unknown:
    """An operation on operands of which one at least isn't known."""
    origin = next(v._origin for v in operands if type(v) is Unknown)
    return Unknown(form.format(*map(render, operands)), origin, compound=True)


def _operator(form: str) -> Any:
    return lambda *operands: operation(form, *operands)


_BINARY = "add + sub - mul * truediv / floordiv // mod % pow ** matmul @ and & or | xor ^ lshift << rshift >>"
_ORDERING = "lt < le <= gt > ge >="
for _name, _symbol in zip(*(f"{_BINARY} {_ORDERING}".split()[i::2] for i in (0, 1)), strict=True):
    setattr(Unknown, f"__{_name}__", _operator(f"{{}} {_symbol} {{}}"))
    if _name != "add" and _name not in _ORDERING:
        setattr(Unknown, f"__r{_name}__", _operator(f"{{1}} {_symbol} {{0}}"))
for _name, _symbol in (("neg", "-{}"), ("pos", "+{}"), ("invert", "~{}"), ("abs", "abs({})")):
    setattr(Unknown, f"__{_name}__", _operator(_symbol))


class StubBase:
    """Stands in for a base class that isn't known: keeps what it is given, by the names of its annotations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [n for c in reversed(type(self).__mro__) for n in getattr(c, "__annotations__", {})]
        vars(self).update(zip(names, args, strict=False))
        vars(self).update(kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        return Unknown(f"{render(self)}.{name}", "a base class is outside the scope")


class RecordedCase:
    """Stands in for a case class that isn't in the scope: a record of what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        run, held = current(), vars(self)
        if args and run.id_param not in kwargs:
            held[run.id_param], args = args[0], args[1:]
        held.update(kwargs, _lk_args=args)
        remember(self, run.module_line())

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__" or name == current().id_param:
            raise AttributeError(name)
        return Unknown(f"{render(self)}.{name}", "the case class is outside the scope")

    def __eq__(self, other: Any) -> Any:
        if type(other) is not type(self):
            return NotImplemented
        name, mine, its = current().id_param, vars(self), vars(other)
        return bool(mine.get(name) == its.get(name)) and mine == its

    def __hash__(self) -> int:
        return hash(vars(self).get(current().id_param))

    def __replace__(self, **changes: Any) -> Any:
        return type(self)(*self._lk_args, **{k: v for k, v in vars(self).items() if k != "_lk_args"} | changes)


def remember(case: Any, line: int) -> None:
    """Note the line that made a case, and its id."""
    run = current()
    case_id = getattr(case, run.id_param, None)
    if isinstance(case_id, str):
        run.made.setdefault(str(case_id), line)
    run.lines[id(case)] = (case, line)


def case_class(cls: Any) -> Any:
    """Decorates the case class of the scope so that its cases note their lines."""
    if not isinstance(cls, type):
        return current().recorded
    original = cls.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        line = current().module_line()
        original(self, *args, **kwargs)
        remember(self, line)

    init.__wrapped__ = original  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[misc]
    return cls


def is_case(value: Any) -> bool:
    return any(c.__name__ == current().case_class for c in type(value).__mro__)


class ParameterSet(tuple):  # type: ignore[type-arg]
    """What ``pytest.param`` gives: the values of one run of a test."""

    renamed: Any = None


def _param(*values: Any, id: Any = None, marks: Any = ()) -> ParameterSet:
    out = ParameterSet(values)
    out.renamed = id
    return out


def _outcome(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("pytest ends the import here: " + ", ".join(map(str, args)))


KNOWN_CALLS = {"pytest.param": _param} | {f"pytest.{n}": _outcome for n in ("skip", "fail", "exit", "xfail")}


def escape(how: str, values: list[Any]) -> None:
    """What the config doesn't control may change these from now on, or call them."""
    kept = [v for v in values if type(v) not in _CONSTANTS and not isinstance(v, (Unknown, type, types.ModuleType))]
    kept = [v for v in kept if not (isinstance(v, list) and v and all(type(x) in _CONSTANTS for x in v))]
    if kept:
        current().escapes.append((current().place(), how, kept))


# -- operations that Python gives no hook for ----------------------------------------------------------------------


def negate(value: Any) -> Any:
    if type(value) is not Unknown:
        return not value
    return Unknown(value._key, value._origin, compound=value._compound, negated=not value._negated)


def same(left: Any, right: Any) -> Any:
    unknown = left is not right and Unknown in (type(left), type(right))
    return operation("{} is {}", left, right) if unknown else left is right


def contains(item: Any, container: Any) -> Any:
    unknown = Unknown in (type(item), type(container))
    return operation("{} in {}", item, container) if unknown else item in container


def opcode(frame: types.FrameType) -> tuple[str, int]:
    """The instruction that a frame is at, with its argument."""
    code, at = frame.f_code.co_code, max(frame.f_lasti, 0)
    wide = code[at - 1] if at >= 2 and dis.opname[code[at - 2]] == "EXTENDED_ARG" else 0
    return dis.opname[code[at]], code[at + 1] + (wide << 8)
