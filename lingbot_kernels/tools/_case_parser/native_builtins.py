"""Built-in functions as the evaluator runs them: each takes (evaluator, args, kwargs, node)."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .conditions import ALWAYS, NEVER
from .limits import MAX_ITEMS, MAX_STRING
from .values import (
    ABSENT,
    LEFT,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    Instance,
    IterV,
    ListV,
    Maybe,
    Native,
    Opaque,
    PyRaise,
    SetV,
    Super,
    TupleV,
    Unknown,
    Value,
    Wrapped,
    is_scalar,
)

if TYPE_CHECKING:
    from .library import Lib

_Args = list[Value]
_Kwargs = dict[str, Value]


def make_exception(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return ev.unknown(node, "an exception object", harmless=True, dotted=f"exception:{name}")


def _list(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.list_of(ev.sequence(args[0], node) if args else [])


def _tuple(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return TupleV(ev.sequence(args[0], node) if args else [])


def _set(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.make_set(ev.unordered(args[0], node) if args else [], node)


def _dict(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    out = DictV(ev.clock, {})
    if args:
        ev.dict_update(out, args[0], node)
    for k, v in kwargs.items():
        ev.dict_set(out, k, v, node)
    return out


def _len(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    value = args[0]
    if isinstance(value, Choice):
        return ev.fork_value([(c, lambda v=v: _len(ev, [v], {}, node)) for c, v in value.alts], node)  # type: ignore[misc]
    if isinstance(value, ClassV) and value.kind == "enum":
        return len(value.members)
    if isinstance(value, (ListV, TupleV, DictV, str, bytes)):
        return ev.length(value, node)
    if isinstance(value, Instance) and ev.class_attribute(value.cls, "__len__") is not ABSENT:
        return ev.call(ev.attribute(value, "__len__", node), [], {}, node)
    if isinstance(value, (Unknown, Instance)):
        ev.may_raise(node, ev.text(node))
        return ev.unknown(node, "a length isn't resolved")
    raise PyRaise(TypeError, node, "object has no len()")


def _range(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if all(isinstance(a, int) for a in args):
        try:
            numbers = range(*args)
        except (TypeError, ValueError) as e:
            raise PyRaise(type(e), node, str(e)) from None
        if not numbers or abs(numbers[-1] - numbers[0]) // abs(numbers.step) < MAX_ITEMS:
            return TupleV(list(numbers))
        return ev.unknown(node, f"a range of more than {MAX_ITEMS} numbers")
    at = next((i for i, a in enumerate(args) if isinstance(a, Choice)), None)
    if at is not None:
        branches = [(c, [*args[:at], v, *args[at + 1 :]]) for c, v in args[at].alts]
        return ev.fork_value([(c, lambda a=a: _range(ev, a, {}, node)) for c, a in branches], node)  # type: ignore[misc]
    return ev.unknown(node, "the bounds of a range aren't resolved")


def _enumerate(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    start = args[1] if len(args) > 1 else kwargs.get("start", 0)

    def make() -> list[Value]:
        items = ev.sequence(args[0], node)
        if not isinstance(start, int):
            counts: Any = None
        else:
            counts = [[(i, ALWAYS)] for i in range(len(items))] if ev._exact(items) else ev.counts(items)
        out: list[Value] = []
        for i, item in enumerate(items):
            if isinstance(item, Opaque):
                out.append(item)
                continue
            index: Value = ev.unknown(node, "the position of a conditional element")
            if counts is not None:
                index = ev.choose([(c, n + start) for n, c in counts[i]], node)
            value = item.value if isinstance(item, Maybe) else item
            pair = TupleV([index, value])
            out.append(Maybe(item.cond, pair) if isinstance(item, Maybe) else pair)
        return out

    return ev.lazy(make, args[:1], [])


def _zip(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    def make() -> list[Value]:
        columns = [ev.sequence(a, node) for a in args]
        for a in args:
            if isinstance(a, IterV):
                ev.set_var(a.ns, LEFT, ev.unknown(node, "what zip() left in an iterator"))
        if not all(ev._exact(c) for c in columns):
            ev.escape([TupleV(c) for c in columns], "zip() of sequences with conditional elements", node)
            return [Opaque("zip() of sequences with conditional elements", ev.site(node))]
        if kwargs.get("strict") is True and len({len(c) for c in columns}) > 1:
            raise PyRaise(ValueError, node, "zip() arguments differ in length")
        return [TupleV(list(row)) for row in zip(*columns, strict=False)]

    return ev.lazy(make, args, [])


def _map(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    def make() -> list[Value]:
        if len(args) == 2:
            return ev.per_item(ev.sequence(args[1], node), lambda v: ev.call(args[0], [v], {}, node))
        rows = _zip(ev, args[1:], {}, node)
        return ev.per_item(ev.sequence(rows, node), lambda row: ev.call(args[0], _row(ev, row, node), {}, node))

    return ev.lazy(make, args[1:], args[:1])


def _row(ev: Lib, row: Value, node: ast.AST) -> list[Value]:
    return list(row.items) if isinstance(row, TupleV) else [row]


def _filter(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    test: ast.expr = node.args[0] if isinstance(node, ast.Call) and node.args else ast.Constant(None)

    def make() -> list[Value]:
        out = ev.list_of([])

        def keep(v: Value) -> None:
            holds = ev.truth(v if args[0] is None else ev.call(args[0], [v], {}, node), test)
            if ev.decide(holds) is None and isinstance(v, Instance) and ev.is_case_class(v.cls):
                ev.report(ev.site(node), "the filter of existing cases isn't resolved; they are kept, conditional")
            ev.fork([(holds, lambda: ev.append(out, v)), (ev.conditions.negate(holds), lambda: None)])

        ev.each(args[1], keep, node)  # type: ignore[arg-type]
        return list(out.items)

    return ev.lazy(make, args[1:], args[:1])


def _sorted(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    items = ev.sorted_items(ev.unordered(args[0], node), kwargs.get("key"), kwargs.get("reverse", False), node)
    if items is not None:
        return ev.list_of(items)
    out = ev.unknown(node, "the sort key isn't resolved")
    out.old = [args[0]]
    return out


def _reversed(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.lazy(lambda: ev.sequence(args[0], node)[::-1], args, [])


def _iter(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) != 1:
        return ev.unresolved_call(args[0], args[1:], kwargs, node, "iter() with a sentinel isn't evaluated")
    return args[0] if isinstance(args[0], IterV) else ev.lazy(lambda: ev.sequence(args[0], node), args, [])


def _next(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if isinstance(args[0], IterV):
        left = args[0].ns.vars.get(LEFT, ABSENT)
        if isinstance(left, Choice):
            ev.set_var(args[0].ns, LEFT, ev.unknown(node, "what an iterator has left depends on a condition"))
        return ev.take_next(args[0], args[1] if len(args) > 1 else ABSENT, node)
    return ev.unresolved_call(args[0], args[1:], kwargs, node, "next() of something that isn't resolved")


def _reduce_bool(want: bool) -> Callable[..., Value]:
    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        items = ev.unordered(args[0], node)
        if any(isinstance(i, Opaque) for i in items):
            return ev.unknown(node, f"`{ev.text(node)}` isn't resolved")
        hit = NEVER
        shown: ast.expr = node  # type: ignore[assignment]
        for item in items:
            there, value = (item.cond, item.value) if isinstance(item, Maybe) else (ALWAYS, item)
            holds = ev.truth(value, shown)
            hit = ev.conditions.either(hit, ev.conditions.both(there, holds if want else ev.conditions.negate(holds)))
        return ev.truth_value(hit if want else ev.conditions.negate(hit))

    return run


def _pure_of_sequence(fn: Callable[..., Any]) -> Callable[..., Value]:
    """sum, min and max over plain data."""

    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        if len(args) == 1 and not is_scalar(args[0]):
            items = ev.unordered(args[0], node)
            if fn is not sum and "key" in kwargs and not set(kwargs) - {"key"} and ev._exact(items):
                best = ev.sorted_items(items, kwargs["key"], fn is max, node)
                if best:
                    return best[0]
            args = [ev.list_of(items)]
        if kwargs:
            out = ev.unknown(node, f"`{ev.text(node)}` isn't resolved")
            out.old = list(args)
            return out
        if fn is sum and len(args) == 2 and isinstance(args[1], ListV):
            total = list(args[1].items)
            for item in ev.sequence(args[0], node):
                total += (
                    [item]
                    if isinstance(item, Opaque)
                    else ev.sequence(item.value if isinstance(item, Maybe) else item, node)
                )
                if isinstance(item, Maybe):
                    return ev.unknown(node, "sum() of conditional lists")
            return ev.list_of(total)
        return ev.map_pure(fn, args, node)

    return run


def _scalar(fn: Callable[..., Any]) -> Callable[..., Value]:
    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        if kwargs or any(isinstance(a, (SetV, Instance)) for a in args):
            return ev.unknown(node, f"`{ev.text(node)}` isn't resolved")
        if any(isinstance(a, (str, bytes)) and len(a) > MAX_STRING for a in args):
            return ev.unknown(node, "too long a string")
        return ev.map_pure(fn, args, node)

    return run


def _str(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) != 1 or kwargs:
        return "" if not args else ev.unknown(node, "str() of bytes")
    value = args[0]
    if isinstance(value, EnumMember) and value.cls.mixin is not None:
        strings = any(c.name == "StrEnum" for c in value.cls.mro())
        return value.value if strings else ev.unknown(node, "str() of a mixed-in enumeration member")
    return ev.format_value(value, 115, "", node)


def _print(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return None


def reflect(name: str) -> Callable[..., Value]:
    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        ev.report(ev.site(node), f"{name}() can reach or change any name")
        return ev.unknown(node, f"{name}() isn't evaluated")

    return run


def _vars(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if args:
        ev.escape(args, "passed to vars()", node)
        return ev.unknown(node, "vars() isn't evaluated")
    return reflect("vars")(ev, args, kwargs, node)


def _getattr(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) not in (2, 3) or not isinstance(args[1], str):
        return ev.unresolved_call(
            ev.unknown(node, "getattr"), args, kwargs, node, "the attribute's name isn't resolved"
        )
    if len(args) == 2:
        return ev.attribute(args[0], args[1], node)
    ev.try_depth += 1
    try:
        value, exits = ev.closed(lambda: ev.attribute(args[0], args[1], node))
    finally:
        ev.try_depth -= 1
    missing = ev.conditions.any_of([e.cond for e in exits])
    return ev.choose([(ev.conditions.negate(missing), value), (missing, args[2])], node)


def _hasattr(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    marker = ev.namespace()
    value = _getattr(ev, [*args[:2], marker], {}, node)
    if isinstance(value, Unknown):
        return ev.unknown(node, f"`{ev.text(node)}` isn't resolved")
    if isinstance(value, Choice):
        return ev.choose([(c, v is not marker) for c, v in value.alts], node)
    return value is not marker


def store_attribute(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 3 and isinstance(args[1], str):
        if isinstance(args[0], Instance) and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            ev.set_var(args[0].ns, args[1], args[2])  # object.__setattr__: frozen or not
        else:
            ev.store_attribute(args[0], args[1], args[2], node)
    else:
        ev.report(ev.site(node), "setattr() of a name that isn't resolved")
        ev.escape(args, "passed to setattr()", node)
    return None


def _isinstance(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    value, kind = args[0], args[1]
    names = {"list": ListV, "tuple": TupleV, "str": str, "int": int, "dict": DictV, "bool": bool, "float": float}
    if isinstance(kind, Native) and kind.name in names and not isinstance(value, (Unknown, Choice, EnumMember)):
        return isinstance(value, names[kind.name]) and not (kind.name == "dict" and isinstance(value, SetV))
    if isinstance(kind, ClassV) and isinstance(value, Instance):
        if kind in value.cls.mro():
            return True
        if not any(c.opaque for c in value.cls.mro()):
            return False
    if isinstance(value, Choice):
        return ev.choose([(c, _isinstance(ev, [v, kind], {}, node)) for c, v in value.alts], node)
    return ev.unknown(node, f"`{ev.text(node)}` isn't resolved")


def _super(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 2 and isinstance(args[0], ClassV):
        return Super(args[0], args[1])
    if ev.env.cls is not None and ev.env.kind == "function" and not args:
        return Super(ev.env.cls, ev.env.first_arg)
    return ev.unknown(node, "super() isn't resolved")


def _wrapped(kind: str) -> Callable[..., Value]:
    return lambda ev, args, kwargs, node: Wrapped(kind, args[0] if args else None)


def _type(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) == 1 and isinstance(args[0], (Instance, EnumMember)):
        return args[0].cls
    return ev.unresolved_call(ev.unknown(node, "type"), args, kwargs, node, "type() isn't evaluated")


def _unknown_builtin(name: str) -> Callable[..., Value]:
    return lambda ev, args, kwargs, node: ev.unknown(
        node, f"{name}() isn't evaluated", harmless=True, dotted=f"{name}()"
    )


def marker(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.unresolved_call(ev.unknown(node, "it isn't evaluated"), args, kwargs, node, "it isn't evaluated")


BUILTINS: dict[str, Callable[..., Value]] = {
    "list": _list,
    "tuple": _tuple,
    "set": _set,
    "frozenset": _set,
    "dict": _dict,
    "len": _len,
    "range": _range,
    "enumerate": _enumerate,
    "zip": _zip,
    "map": _map,
    "filter": _filter,
    "sorted": _sorted,
    "reversed": _reversed,
    "iter": _iter,
    "next": _next,
    "any": _reduce_bool(True),
    "all": _reduce_bool(False),
    "str": _str,
    "print": _print,
    "sum": _pure_of_sequence(sum),
    "min": _pure_of_sequence(min),
    "max": _pure_of_sequence(max),
    "int": _scalar(int),
    "float": _scalar(float),
    "abs": _scalar(abs),
    "round": _scalar(round),
    "divmod": _scalar(divmod),
    "repr": _scalar(repr),
    "chr": _scalar(chr),
    "ord": _scalar(ord),
    "hex": _scalar(hex),
    "oct": _scalar(oct),
    "bin": _scalar(bin),
    "bool": lambda ev, args, kwargs, node: ev.truth_value(ev.truth(args[0], node.args[0])) if args else False,
    "globals": reflect("globals"),
    "locals": reflect("locals"),
    "vars": _vars,
    "exec": reflect("exec"),
    "eval": reflect("eval"),
    "__import__": reflect("__import__"),
    "compile": _unknown_builtin("compile"),
    "open": _unknown_builtin("open"),
    "getattr": _getattr,
    "hasattr": _hasattr,
    "setattr": store_attribute,
    "delattr": reflect("delattr"),
    "isinstance": _isinstance,
    "super": _super,
    "property": _wrapped("property"),
    "staticmethod": _wrapped("staticmethod"),
    "classmethod": _wrapped("classmethod"),
    "type": _type,
    "object": marker,
    "id": _unknown_builtin("id"),
    "callable": lambda ev, args, kwargs, node: ev.unknown(node, "callable() isn't evaluated"),
}
