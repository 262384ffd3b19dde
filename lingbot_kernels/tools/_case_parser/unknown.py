"""Values that a config can't know here: each operation on one gives another, with its expression as text.

``bool`` of one is a decision of the current `Run`, keyed by its text and the same throughout the run.
"""

from __future__ import annotations

import dis
import enum
import hashlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

MAX_REPEATS = 3000
"""How often one decision is asked for before the loop around it counts as one that waits for the other outcome."""
_MAX_KEY, _MAX_TEXT = 300, 160
_CONSTANTS = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
_MODULE_DUNDERS = ("__version__", "__version_info__", "__file__", "__name__", "__doc__", "__all__")
Site = tuple[str, int, int]  # file, line, column


class StuckError(BaseException):
    """A loop asks for one decision again and again."""


class Run:
    """One execution of a config: its decisions, what it left unresolved, and what stopped it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.config: str = request["config"]
        self.name: str = request["name"]
        self.case_class: str = request["case_class"]
        self.id_param: str = request["id_param"]
        self.forced: dict[str, bool] = request["forced"]
        self.assumed: dict[str, bool] = request["assume"]
        self.places: dict[str, bool] = request.get("places", {})  # outcomes of what is first met there
        self.sweep: set[str] = set(request.get("sweep", ()))
        self.flipped = ""  # in a branch of a sweep: the decision that is the other way
        self.prefix = 0  # decisions before it
        self.values: dict[str, bool] = {}
        self.repeats: dict[str, int] = {}
        self.trace: list[list[Any]] = []  # [key, text, kind, value, default, place, site]
        self.notes: dict[tuple[Site, str], None] = {}
        self.refused: list[tuple[Site, str]] = []
        self.escapes: list[tuple[Any, str, list[Any]]] = []
        self.made: dict[str, int] = {}  # ids of the cases made, with their lines
        self.assumed_met: set[str] = set()
        self.tries: dict[str, list[tuple[int, int, list[types.CodeType | None]]]] = {}  # by file: lines, handlers
        self.lines: dict[int, tuple[Any, int]] = {}

    # -- places ----------------------------------------------------------------------------------------------------

    def frames(self) -> Iterator[types.FrameType]:
        """Frames of the executed files, innermost first."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename in self.tries:
                yield frame
            frame = frame.f_back

    def place(self) -> tuple[types.CodeType | None, int, int]:
        """Where the config is now, cheaply: resolve it by `site`."""
        for frame in self.frames():
            return frame.f_code, frame.f_lasti, frame.f_lineno
        return None, 0, 1

    def site(self, place: tuple[types.CodeType | None, int, int] | None = None) -> Site:
        code, last, line = place or self.place()
        if code is None:
            return self.config, 1, 1
        column = 0
        if hasattr(code, "co_positions"):  # Python 3.11
            found = next(itertools.islice(code.co_positions(), last // 2, None), None)
            if found is not None and found[0] is not None and found[2] is not None:
                line, column = found[0], found[2] + 1
        return code.co_filename, line, column

    def module_line(self) -> int:
        """Line of the config's own module code that is being executed; 0 where none is."""
        line = 0
        for frame in self.frames():
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename == self.config:
                line = frame.f_lineno
        return line

    # -- decisions -------------------------------------------------------------------------------------------------

    def decide(self, key: str, text: str, *, kind: str = "", default: bool = False) -> bool:
        """The outcome of a test in this run: as assumed, as forced, else `default`."""
        self.repeats[key] = n = self.repeats.get(key, 0) + 1
        if n > MAX_REPEATS:
            raise StuckError(f"`{text}` is asked for {n} times")
        if key in self.values:
            return self.values[key]
        for name in (text, key):
            if name in self.assumed:
                self.assumed_met.add(name)
                self.values[key] = self.assumed[name]
                return self.values[key]
        code, last, _ = self.place()
        where = f"{code.co_filename}:{code.co_firstlineno}:{last}" if code is not None else ""
        default = self.places.get(where, default)
        value = self.forced.get(key, default)
        if key in self.sweep and not self.flipped and self.branch():
            self.flipped, value, self.prefix = key, not value, len(self.trace)
        self.values[key] = value
        self.trace.append([key, text, kind, value, default, where, self.site() if kind else None])
        return value

    def branch(self) -> bool:
        """Fork: True in a branch, which is waited for."""
        raise NotImplementedError

    def note(self, reason: str, site: Site | None = None) -> None:
        """Report something that could hide a case."""
        self.notes[(site or self.site(), reason)] = None

    def may_raise(self, key: str, text: str, kinds: tuple[type, ...] | None) -> None:
        """Raise, as one decision a handler, what an enclosing ``try`` would catch.

        `kinds`: only handlers of one of these; None: any handler but those of failing imports.
        """
        for frame in self.frames():
            for first, last, handlers in self.tries[frame.f_code.co_filename]:
                if not first <= frame.f_lineno <= last:
                    continue
                for handler in handlers:
                    self._raise_for(handler, frame, key, text, kinds)

    def _raise_for(
        self,
        handler: types.CodeType | None,
        frame: types.FrameType,
        key: str,
        text: str,
        kinds: tuple[type, ...] | None,
    ) -> None:
        try:
            caught = Exception if handler is None else eval(handler, frame.f_globals, frame.f_locals)
        except Exception:
            return
        for kind in caught if isinstance(caught, tuple) else (caught,):
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                continue
            wide = kind in (Exception, BaseException)
            if kinds is None and (issubclass(kind, ImportError) or not (wide or issubclass(kind, Exception))):
                continue
            if kinds is not None and not (kind in kinds or (wide and ImportError in kinds)):
                continue
            if kinds is not None and ImportError in kinds:
                if not self.decide(key, f"`{text}` succeeds", kind="import", default=True):
                    raise ModuleNotFoundError(f"{text} is taken to fail")
                continue
            name = "an exception" if wide else kind.__name__
            if self.decide(f"{key} raises {kind.__name__}", f"`{text}` raises {name}"):
                try:
                    error = kind(f"{text} is taken to raise")
                except Exception:
                    error = Exception(f"{text} is taken to raise")
                raise error


_run: list[Run] = []


def start(run: Run) -> None:
    """Make `run` the current one."""
    _run[:] = [run]


def current() -> Run:
    return _run[0]


def _cut(text: str, limit: int, *, unique: bool) -> str:
    if len(text) <= limit:
        return text
    tail = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest() if unique else ""
    return f"{text[:limit]}...{tail}"


def render(value: Any, key: bool, depth: int = 0) -> str:
    """Text of an argument: source-like for constants, the expression for unknowns; `key`: the unambiguous form."""
    if type(value) is Unknown:
        return value._u.key if key else value._u.shown()
    if type(value) in _CONSTANTS:
        return repr(value) if key or not isinstance(value, (str, bytes)) or len(value) < 60 else f"{value[:50]!r}..."
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return getattr(value, "__qualname__", "?")
    if isinstance(value, types.ModuleType):
        return value.__name__
    if depth > 3:
        return "..."
    if isinstance(value, list) and value and not key and is_case(value[0]):
        named = sys.modules[current().name].__dict__.items()
        return next((n for n, v in named if v is value), f"{len(value)} cases")
    if isinstance(value, (list, tuple, set, frozenset)):
        left, right = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        shown = [render(v, key, depth + 1) for v in itertools.islice(value, 40 if key else 4)]
        if isinstance(value, (set, frozenset)):
            shown.sort()
        return left + ", ".join(shown + (["..."] if len(value) > len(shown) else [])) + right
    if isinstance(value, dict):
        pairs = itertools.islice(list(value.items()), 40 if key else 3)
        return "{" + ", ".join(f"{render(k, key, depth + 1)}: {render(v, key, depth + 1)}" for k, v in pairs) + "}"
    held = getattr(value, "__dict__", None)
    name = type(value).__name__
    if is_case(value) and isinstance(held, dict) and not key:
        return f"{name}({held.get(current().id_param)!r})"
    if not isinstance(held, dict):
        return name
    inner = ", ".join(f"{k}={render(v, key, depth + 1)}" for k, v in list(held.items())[:20] if k[:4] != "_lk_")
    return f"{name}({inner})" if key else f"{name}(...)"


class _Info:
    """What an `Unknown` is: key, text, whether it is negated or needs parentheses, and where it comes from."""

    __slots__ = ("compound", "element", "held", "items", "key", "negated", "origin", "place", "text")

    def __init__(self, key: str, text: str, origin: str, *, compound: bool = False, negated: bool = False) -> None:
        self.key = _cut(key, _MAX_KEY, unique=True)
        self.text = _cut(text, _MAX_TEXT, unique=False)
        self.origin = origin
        self.compound = compound
        self.negated = negated
        self.element = False
        self.held: list[Any] = []
        self.items: dict[str, Any] | None = None
        self.place = current().place()

    def shown(self, *, inner: bool = False) -> str:
        text = f"not {self.text}" if self.negated else self.text
        return f"({text})" if inner and (self.compound or self.negated) else text


class Unknown:
    """A value that isn't known; see the module."""

    __slots__ = ("_u",)
    _u: _Info

    def __init__(self, key: str, text: str, origin: str, *, compound: bool = False, negated: bool = False) -> None:
        object.__setattr__(self, "_u", _Info(key, text, origin, compound=compound, negated=negated))

    def _child(self, key: str, text: str, *, compound: bool = False) -> Unknown:
        return Unknown(key, text, self._u.origin, compound=compound)

    def _compound(self, form: str, *others: Any) -> Unknown:
        keys = [f"({render(v, True)})" for v in (self, *others)]
        texts = [v._u.shown(inner=True) if type(v) is Unknown else render(v, False) for v in (self, *others)]
        return self._child(form.format(*keys), form.format(*texts), compound=True)

    def __getattr__(self, name: str) -> Any:
        run, u = current(), self._u
        if name.startswith("__") and name.endswith("__") and name not in _MODULE_DUNDERS:
            raise AttributeError(name)
        if u.items is not None and f".{name}" in u.items:
            return u.items[f".{name}"]
        if name == run.case_class:
            return recorded_class()
        text = f"{u.shown(inner=True)}.{name}"
        run.may_raise(f"{u.key}.{name}", text, (AttributeError,))
        return self._child(f"{u.key}.{name}", text)

    def __setattr__(self, name: str, value: Any) -> None:
        self._store(f".{name}", value)

    def __delattr__(self, name: str) -> None:
        self._store(f".{name}", None)

    def __getitem__(self, index: Any) -> Any:
        u, key = self._u, render(index, True)
        if u.items is not None and f"[{key}]" in u.items:
            return u.items[f"[{key}]"]
        text = f"{u.shown(inner=True)}[{render(index, False)}]"
        current().may_raise(f"{u.key}[{key}]", text, (KeyError, IndexError, LookupError))
        return self._child(f"{u.key}[{key}]", text)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._store(f"[{render(index, True)}]", value)

    def __delitem__(self, index: Any) -> None:
        self._store(f"[{render(index, True)}]", None)

    def _store(self, where: str, value: Any) -> None:
        if self._u.items is None:
            self._u.items = {}
        self._u.items[where] = value
        escape(f"stored in `{self._u.shown()}`", [value])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        u, run = self._u, current()
        known = KNOWN_CALLS.get(u.key)
        if known is not None:
            return known(*args, **kwargs)

        def joined(key: bool) -> str:
            return ", ".join([render(v, key) for v in args] + [f"{k}={render(v, key)}" for k, v in kwargs.items()])

        key, text = f"{u.key}({joined(True)})", f"{u.shown(inner=True)}({joined(False)})"
        held = [*args, *kwargs.values()]
        if not u.key.startswith(("pytest.mark.", "pytest.fixture")):
            escape(f"passed to `{u.shown()}`", held)
        run.may_raise(key, text, None)
        out = self._child(key, text)
        out._u.held = [v for v in held if isinstance(v, (list, tuple)) or is_case(v)]
        return out

    def __bool__(self) -> bool:
        u = self._u
        return current().decide(u.key, u.text, default=u.negated) != u.negated

    def __iter__(self) -> Iterator[Any]:
        name, arg = opcode(sys._getframe(1))
        if name.startswith("UNPACK"):
            return iter([self._element(i) for i in range((arg & 0xFF) + (arg >> 8))])
        u, run = self._u, current()
        if run.decide(f"{u.key} has elements", f"`{u.shown()}` has elements", kind="iter", default=True):
            return iter([self._element(None)])
        return iter([])

    __reversed__ = __iter__

    def _element(self, index: int | None) -> Unknown:
        shown = "..." if index is None else index
        out = self._child(f"{self._u.key}[{shown}]", f"{self._u.shown(inner=True)}[{shown}]")
        out._u.place, out._u.element = self._u.place, index is None
        out._u.held = self._u.held
        return out

    def __eq__(self, other: Any) -> Any:
        if type(other) is Unknown and other._u.key == self._u.key and other._u.negated == self._u.negated:
            return True
        return self._compound("{} == {}", other)

    def __ne__(self, other: Any) -> Any:
        return negate(self == other)

    def __hash__(self) -> int:
        return hash(self._u.key)

    def __contains__(self, item: Any) -> bool:
        return bool(contains(item, self))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, (list, tuple)):
            return reflected("+", self, other)
        name, arg = opcode(sys._getframe(1))
        if isinstance(other, list) and (name == "INPLACE_ADD" or (name == "BINARY_OP" and arg == 13)):
            other.extend(list(self))  # keeps the list's identity, as ``+=`` of a list does
            return other
        return [*other, *self] if isinstance(other, list) else (*other, *self)

    def __enter__(self) -> Any:
        return self._child(f"{self._u.key}.__enter__()", f"{self._u.shown(inner=True)}.__enter__()")

    def __exit__(self, *_: Any) -> None:
        pass

    def __instancecheck__(self, value: Any) -> bool:
        return bool(self._compound("isinstance({1}, {0})", value))

    def __subclasscheck__(self, value: Any) -> bool:
        return bool(self._compound("issubclass({1}, {0})", value))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        if next(b for b in bases if type(b) is Unknown) is not self:
            return ()
        plain = all(type(b) in (type, Unknown) for b in bases)
        return (StubBase if plain else PlainStubBase,)

    def __copy__(self) -> Unknown:
        return self

    def __deepcopy__(self, memo: Any) -> Unknown:
        return self

    def __repr__(self) -> str:
        return f"\ue000{self._u.shown()}\ue001"  # marks a text that holds it

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)


def reflected(symbol: str, value: Unknown, other: Any) -> Unknown:
    left = f"({render(other, True)})"
    key = f"{left} {symbol} ({value._u.key})"
    return value._child(key, f"{render(other, False)} {symbol} {value._u.shown(inner=True)}", compound=True)


def _define_operators() -> None:
    def forward(symbol: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: self._compound(f"{{}} {symbol} {{}}", other)

    def backward(symbol: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: reflected(symbol, self, other)

    symbols = (
        ("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/"), ("floordiv", "//"), ("mod", "%"), ("pow", "**"),
        ("matmul", "@"), ("and", "&"), ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>"),
    )  # fmt: skip
    for name, symbol in symbols:
        setattr(Unknown, f"__{name}__", forward(symbol))
        if name != "add":
            setattr(Unknown, f"__r{name}__", backward(symbol))
    for name, symbol in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        setattr(Unknown, f"__{name}__", forward(symbol))
    for name, symbol in (("neg", "-"), ("pos", "+"), ("invert", "~")):
        setattr(Unknown, f"__{name}__", lambda self, symbol=symbol: self._compound(symbol + "{}"))


_define_operators()


class _StubMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Unknown(f"{cls.__qualname__}.{name}", f"{cls.__name__}.{name}", "a base class outside the scope")


class PlainStubBase:
    """Stands in for a base class that isn't known: keeps what it is given, by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [n for c in reversed(type(self).__mro__) for n in inspect.get_annotations(c)]
        self.__dict__.update(zip(names, args))  # noqa: B905 - more arguments than names are dropped
        self.__dict__.update(kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        text = f"{type(self).__name__}.{name}"
        return Unknown(f"{render(self, True)}.{name}", text, "a base class outside the scope")


class StubBase(PlainStubBase, metaclass=_StubMeta):
    """As `PlainStubBase`, with unknown class attributes."""


# -- cases ---------------------------------------------------------------------------------------------------------


class RecordedCase:
    """Stands in for a case class that isn't in the scope: a record of what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        run, held = current(), self.__dict__
        if args and run.id_param not in kwargs:
            held[run.id_param], args = args[0], args[1:]
        held.update(kwargs)
        held["_lk_args"] = args
        remember(self, run.module_line())

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__" or name[:4] == "_lk_" or name == current().id_param:
            raise AttributeError(name)
        return Unknown(f"{render(self, True)}.{name}", f"{render(self, False)}.{name}", "the case class isn't known")

    def __eq__(self, other: Any) -> Any:
        if type(other) is not type(self):
            return NotImplemented
        name, mine, its = current().id_param, self.__dict__, other.__dict__
        return bool(mine.get(name) == its.get(name)) and mine == its

    def __hash__(self) -> int:
        return hash(self.__dict__.get(current().id_param))

    def __repr__(self) -> str:
        return render(self, False)

    def __replace__(self, **changes: Any) -> Any:
        return type(self)(*self._lk_args, **{k: v for k, v in self.__dict__.items() if k != "_lk_args"} | changes)


def remember(case: Any, line: int) -> None:
    """Note the line that made a case, and its id."""
    run = current()
    case_id = getattr(case, run.id_param, None)
    if isinstance(case_id, str):
        run.made.setdefault(str(case_id), line)
    run.lines[id(case)] = (case, line)


def line_of(case: Any, case_id: str) -> int:
    """The module-level line that made a case; a copy has the line of its id."""
    run = current()
    found = run.lines.get(id(case))
    return found[1] if found else run.made.get(case_id, 0)


def recorded_class() -> type:
    run = current()
    if not hasattr(run, "recorded"):
        run.recorded = type(run.case_class, (RecordedCase,), {})  # type: ignore[attr-defined]
    return run.recorded  # type: ignore[attr-defined,no-any-return]


def case_class(cls: Any) -> Any:
    """Decorates the case class of the scope so that its cases note their lines."""
    if not isinstance(cls, type):
        return recorded_class()
    original = cls.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        line = current().module_line()
        original(self, *args, **kwargs)
        remember(self, line)

    init.__wrapped__ = original  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[misc]
    return cls


def is_case(value: Any) -> bool:
    name = current().case_class
    return any(c.__name__ == name for c in type(value).__mro__) and not isinstance(value, type)


class ParameterSet(tuple):  # type: ignore[type-arg]
    """What ``pytest.param`` gives: the values of one run of a test."""

    renamed: Any = None


def _param(*values: Any, id: Any = None, marks: Any = ()) -> ParameterSet:
    out = ParameterSet(values)
    out.renamed = id
    return out


def _outcome(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("pytest ends the import here: " + ", ".join(map(str, args)))


KNOWN_CALLS: dict[str, Callable[..., Any]] = {
    "pytest.param": _param,
    "pytest.skip": _outcome,
    "pytest.fail": _outcome,
    "pytest.exit": _outcome,
    "pytest.xfail": _outcome,
}


def escape(how: str, values: list[Any]) -> None:
    """Something the config doesn't control may change these from now on, or call them."""
    kept = [v for v in values if type(v) not in _CONSTANTS and type(v) is not Unknown]
    if kept:
        run = current()
        run.escapes.append((run.place(), how, kept)) if any(map(_could_matter, kept)) else None


def _could_matter(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, dict, types.FunctionType, types.MethodType)):
        return True
    if isinstance(value, (tuple, set, frozenset)):
        return depth < 3 and any(_could_matter(v, depth + 1) for v in value)
    return hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType))


# -- operations that Python gives no hook for ----------------------------------------------------------------------


def negate(value: Any) -> Any:
    if type(value) is not Unknown:
        return not value
    u = value._u
    return Unknown(u.key, u.text, u.origin, compound=u.compound, negated=not u.negated)


def same(left: Any, right: Any) -> Any:
    if type(left) is Unknown:
        return True if left is right else left._compound("{} is {}", right)
    return right._compound("{1} is {0}", left) if type(right) is Unknown else left is right


def contains(item: Any, container: Any) -> Any:
    if type(container) is Unknown:
        key = f"({render(item, True)}) in ({container._u.key})"
        shown = item._u.shown(inner=True) if type(item) is Unknown else render(item, False)
        return container._child(key, f"{shown} in {container._u.shown(inner=True)}", compound=True)
    if type(item) is Unknown:
        return item._compound("{} in {}", container)
    return item in container


def opcode(frame: types.FrameType) -> tuple[str, int]:
    """The instruction that a frame is at, with its argument."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if at < 0:
        return "", 0
    wide = code[at - 1] if at >= 2 and dis.opname[code[at - 2]] == "EXTENDED_ARG" else 0
    return dis.opname[code[at]], code[at + 1] + (wide << 8)
