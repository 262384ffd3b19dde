"""Functions of the standard library that configs use: each takes (evaluator, args, kwargs, node)."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .limits import MAX_ITEMS
from .native_builtins import marker, reflect, store_attribute
from .values import (
    ABSENT,
    LEFT,
    Choice,
    DictV,
    FunctionV,
    Instance,
    IterV,
    ListV,
    Maybe,
    Native,
    Opaque,
    Partial,
    PyRaise,
    TupleV,
    Unknown,
    Value,
)

if TYPE_CHECKING:
    from .library import Lib

_Args = list[Value]
_Kwargs = dict[str, Value]


def _replace(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 1 and isinstance(args[0], Choice):
        return ev.fork_value([(c, lambda v=v: _replace(ev, [v], kwargs, node)) for c, v in args[0].alts], node)  # type: ignore[misc]
    if len(args) == 1 and isinstance(args[0], Instance):
        return ev.replaced(args[0], kwargs, node)
    if len(args) == 1 and isinstance(args[0], Unknown):
        ev.may_raise(node, ev.text(node))
        return ev.unknown(node, args[0].reason)
    raise PyRaise(TypeError, node, "replace() of something that isn't a dataclass instance")


def _copy(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    value = args[0]
    if isinstance(value, Choice):
        return ev.fork_value([(c, lambda v=v: _copy(ev, [v], {}, node)) for c, v in value.alts], node)  # type: ignore[misc]
    if isinstance(value, ListV):
        return ev.list_of(list(value.items))
    if isinstance(value, DictV):
        return type(value)(ev.clock, dict(value.entries), value.opaque)
    if isinstance(value, Instance):
        if any(ev.class_attribute(value.cls, n) is not ABSENT for n in ("__copy__", "__deepcopy__", "__reduce__")):
            return ev.unresolved_call(ev.unknown(node, "copy"), args, {}, node, "its class defines how it is copied")
        out = Instance(value.cls, ev.namespace(dict(value.ns.vars)), value.site, value.line)
        out.positional, out.taint = value.positional, value.taint
        return out
    if isinstance(value, (Unknown, IterV)):
        return ev.unknown(node, "a copy of something that isn't resolved")
    return value


def _deepcopy(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    memo: dict[int, Value] = {}

    def deep(v: Value) -> Value:
        if isinstance(v, Maybe):
            return Maybe(v.cond, deep(v.value))
        if isinstance(v, Choice):
            return Choice([(c, x if x is ABSENT else deep(x)) for c, x in v.alts])
        if isinstance(v, TupleV):
            return TupleV([deep(i) for i in v.items])
        if not isinstance(v, (ListV, DictV, Instance)):
            return v
        if id(v) in memo:
            return memo[id(v)]
        out = memo[id(v)] = _copy(ev, [v], {}, node)
        ev.tick()
        if isinstance(out, ListV) and isinstance(v, ListV):
            out.items[:] = [deep(i) for i in v.items]
        elif isinstance(out, DictV) and isinstance(v, DictV):
            out.entries = {k: (shown, deep(x)) for k, (shown, x) in v.entries.items()}
        elif isinstance(out, Instance):
            out.ns.vars = {k: deep(x) for k, x in out.ns.vars.items()}
        return out

    return deep(args[0])


def _dataclass(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if args:
        return ev.make_dataclass(args[0], kwargs, node)
    return Native("dataclass", lambda ev, inner, _, at: ev.make_dataclass(inner[0], kwargs, at))


def _field(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    out = DictV(ev.clock, {"__field__": ("__field__", True)})
    out.entries.update({k: (k, v) for k, v in kwargs.items()})
    return out


def _cache(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 1 and isinstance(args[0], FunctionV):
        args[0].memo = {}
        return args[0]
    return Native("cache", _cache)


def _wraps(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return Native("wraps", lambda ev, inner, _, at: inner[0])


def _partial(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return Partial(args[0], args[1:], kwargs)


def _reduce(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    items = ev.sequence(args[1], node)
    if not ev._exact(items):
        return ev.unresolved_call(args[0], args[1:], kwargs, node, "reduce() over conditional elements")
    if len(args) > 2:
        items = [args[2], *items]
    if not items:
        raise PyRaise(TypeError, node, "reduce() of an empty sequence")
    out = items[0]
    for item in items[1:]:
        out = ev.call(args[0], [out, item], {}, node)
    return out


def _chain(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.lazy(lambda: [i for a in args for i in ev.sequence(a, node)], args, [])


def _chain_from(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    def make() -> list[Value]:
        out = ev.list_of([])
        ev.each(args[0], lambda v: ev._list_extend(out, node, v), node)  # type: ignore[func-returns-value]
        return list(out.items)

    return ev.lazy(make, args, [])


def _combine(fn: Callable[..., Any]) -> Callable[..., Value]:
    """product, combinations, permutations, pairwise over sequences without conditional elements."""

    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        numbers = {k: v for k, v in kwargs.items() if isinstance(v, int)}
        columns = [a if isinstance(a, int) else ev.sequence(a, node) for a in args]
        if len(numbers) != len(kwargs) or any(isinstance(c, list) and not ev._exact(c) for c in columns):
            ev.escape([*args], f"{fn.__name__}() of conditional elements", node)
            return TupleV([Opaque(f"{fn.__name__}() of conditional elements", ev.site(node))])
        try:
            rows = list(itertools.islice(fn(*columns, **numbers), MAX_ITEMS + 1))
        except (TypeError, ValueError) as e:
            raise PyRaise(type(e), node, str(e)) from None
        ev.tick(len(rows))
        if len(rows) > MAX_ITEMS:
            return ev.unknown(node, f"more than {MAX_ITEMS} combinations")
        return ev.lazy(lambda: [TupleV(list(r)) if isinstance(r, tuple) else r for r in rows], [], [])

    return run


def _islice(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    items = ev.sequence(args[0], node)
    if isinstance(args[0], IterV):
        ev.set_var(args[0].ns, LEFT, ev.unknown(node, "what islice() left in an iterator"))
    bounds = args[1:]
    if not ev._exact(items) or not all(b is None or (isinstance(b, int) and b >= 0) for b in bounds):
        ev.escape([TupleV(items)], "islice() of conditional elements", node)
        return TupleV([Opaque("islice() of conditional elements", ev.site(node))])
    return ev.lazy(lambda: list(itertools.islice(items, *bounds)), [], [])


def _repeat(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 2 and isinstance(args[1], int) and args[1] < MAX_ITEMS:
        return ev.lazy(lambda: [args[0]] * args[1], [], [])
    return ev.unknown(node, "an endless repeat()", harmless=True)


def _attrgetter(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) != 1 or not isinstance(args[0], str) or "." in args[0]:
        return ev.unknown(node, "attrgetter of several names", harmless=True)
    return Native("attrgetter", lambda ev, inner, _, at: ev.attribute(inner[0], args[0], at))


def _itemgetter(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) != 1:
        return ev.unknown(node, "itemgetter of several keys", harmless=True)
    return Native("itemgetter", lambda ev, inner, _, at: ev.subscript(inner[0], args[0], at))


def _auto(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return Opaque("auto", ev.site(node))


def _first(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return args[0] if args else None


def _cast(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return args[1] if len(args) > 1 else None


LIBRARY: dict[str, Callable[..., Value]] = {
    "dataclasses.replace": _replace,
    "copy.replace": _replace,
    "dataclasses.dataclass": _dataclass,
    "dataclasses.field": _field,
    "copy.copy": _copy,
    "copy.deepcopy": _deepcopy,
    "functools.partial": _partial,
    "functools.reduce": _reduce,
    "functools.cache": _cache,
    "functools.lru_cache": _cache,
    "functools.wraps": _wraps,
    "itertools.chain": _chain,
    "builtins.chain.from_iterable": _chain_from,
    "itertools.product": _combine(itertools.product),
    "itertools.combinations": _combine(itertools.combinations),
    "itertools.permutations": _combine(itertools.permutations),
    "itertools.islice": _islice,
    "itertools.repeat": _repeat,
    "operator.attrgetter": _attrgetter,
    "operator.itemgetter": _itemgetter,
    "enum.auto": _auto,
    "enum.unique": _first,
    "typing.cast": _cast,
    "typing.final": _first,
    "builtins.object.__setattr__": store_attribute,
    "enum.Enum": marker,
    "enum.IntEnum": marker,
    "enum.StrEnum": marker,
    "typing.NamedTuple": marker,
    "abc.ABC": marker,
    "typing.Generic": marker,
    "typing.Protocol": marker,
    "typing.TypedDict": marker,
    "importlib.import_module": reflect("import_module"),
    "gc.get_objects": reflect("gc.get_objects"),
    "abc.abstractmethod": _first,
    "typing.overload": _first,
}

CONSTANTS: dict[str, Value] = {"typing.TYPE_CHECKING": False, "typing_extensions.TYPE_CHECKING": False}
LIBRARIES = frozenset(n.rsplit(".", 1)[0] for n in (*LIBRARY, *CONSTANTS) if not n.startswith("builtins."))
