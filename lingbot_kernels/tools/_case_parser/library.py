"""Built-in functions and the parts of the standard library that configs use, as `Native` functions.

Each takes (evaluator, args, kwargs, node); what isn't modelled is unknown, harmless where its library changes no argument.
"""

from __future__ import annotations

import ast
import builtins
import itertools
from collections.abc import Callable
from typing import Any

from .conditions import ALWAYS, NEVER
from .limits import MAX_ITEMS, MAX_STRING
from .operators import NotPlainError, to_python
from .statements import Statements
from .values import (
    ABSENT,
    LEFT,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    FunctionV,
    Instance,
    IterV,
    Library,
    ListV,
    Maybe,
    Native,
    Opaque,
    Partial,
    PyRaise,
    SetV,
    Super,
    TupleV,
    Unknown,
    Value,
    Wrapped,
    is_scalar,
)

_Args = list[Value]
_Kwargs = dict[str, Value]

# Modules whose functions neither change their arguments nor give them back inside something else.
HARMLESS = frozenset(
    "base64 csv datetime fnmatch glob hashlib json logging math numbers os pathlib platform pprint re secrets shutil "
    "socket string sys tempfile textwrap time typing typing_extensions uuid warnings __future__".split()
)
# Modules that every Python has, so that importing them doesn't raise.
SAFE_IMPORTS = HARMLESS - {"typing_extensions"} | frozenset(
    "abc argparse collections contextlib copy dataclasses enum functools inspect itertools operator random types unittest".split()
)


class Lib(Statements):
    """Looks up built-in names and library members."""

    def builtin(self, name: str) -> Value:
        run = BUILTINS.get(name)
        if run is not None:
            return Native(name, run)
        obj = getattr(builtins, name, None)
        if isinstance(obj, type) and issubclass(obj, BaseException):
            return Native(name, _make_exception, exception=obj)
        if name in ("True", "False", "None", "NotImplemented", "__debug__"):
            return None
        if obj is not None and not name.startswith("_"):
            return Unknown(f"built-in {name} isn't evaluated", self.site(ast.Pass()), harmless=True, dotted=name)
        return None

    def library_member(self, library: Library, name: str, node: ast.AST) -> Value:
        dotted = f"{library.name}.{name}"
        if dotted in CONSTANTS:
            return CONSTANTS[dotted]
        run = LIBRARY.get(dotted)
        if run is not None:
            return Native(name, run)
        root = library.name.split(".")[0]
        return self.unknown(node, f"{dotted} isn't evaluated", harmless=root in HARMLESS, dotted=dotted)

    # -- helpers of the natives --------------------------------------------------------------------------------------

    def lazy(self, make: Callable[[], list[Value]], sources: list[Value], funcs: list[Value]) -> IterV:
        def reads() -> set[Any]:
            out: set[Any] = {id(s) for s in sources}
            for f in funcs:
                if isinstance(f, FunctionV):
                    from .scopes import names_read

                    out |= self.reached_by_names(names_read(f.node), f.env) | set(self.reach(list(sources)))
            return out

        return IterV(make, self.namespace(), reads)

    def per_item(self, items: list[Value], fn: Callable[[Value], Value]) -> list[Value]:
        """`fn` of every element, conditional where the element is."""
        out = self.list_of([])
        self.each(TupleV(items), lambda v: self.append(out, fn(v)), self.placeless)  # type: ignore[func-returns-value]
        return list(out.items)

    def pure(self, fn: Callable[..., Any], args: _Args, node: ast.AST) -> Value:
        return self.map_pure(fn, args, node)


def _make_exception(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
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
    for i, a in enumerate(args):
        if isinstance(a, Choice):
            return ev.fork_value(
                [(c, lambda v=v: _range(ev, [*args[:i], v, *args[i + 1 :]], {}, node)) for c, v in a.alts],  # type: ignore[misc]
                node,
            )
    return ev.unknown(node, "the bounds of a range aren't resolved")


def _enumerate(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    start = args[1] if len(args) > 1 else kwargs.get("start", 0)

    def make() -> list[Value]:
        items = ev.sequence(args[0], node)
        if not isinstance(start, int):
            counts: Any = None
        else:
            counts = [[(i, ALWAYS)] for i in range(len(items))] if ev._exact(items) else ev.counts(items)
        out = []
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
            return [Opaque("zip() of sequences with conditional elements", ev.site(node))]
        if kwargs.get("strict") is True and len({len(c) for c in columns}) > 1:
            raise PyRaise(ValueError, node, "zip() arguments differ in length")
        return [TupleV(list(row)) for row in zip(*columns)]

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
                total += [item] if isinstance(item, Opaque) else ev.sequence(item.value if isinstance(item, Maybe) else item, node)
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


def _reflect(name: str) -> Callable[..., Value]:
    def run(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
        ev.report(ev.site(node), f"{name}() can reach or change any name")
        return ev.unknown(node, f"{name}() isn't evaluated")

    return run


def _vars(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if args:
        ev.escape(args, "passed to vars()", node)
        return ev.unknown(node, "vars() isn't evaluated")
    return _reflect("vars")(ev, args, kwargs, node)


def _getattr(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    if len(args) not in (2, 3) or not isinstance(args[1], str):
        return ev.unresolved_call(ev.unknown(node, "getattr"), args, kwargs, node, "the attribute's name isn't resolved")
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


def _setattr(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
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
    return lambda ev, args, kwargs, node: ev.unknown(node, f"{name}() isn't evaluated", harmless=True, dotted=f"{name}()")


# -- library functions ---------------------------------------------------------------------------------------------


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
    if not ev._exact(items) or not all(b is None or isinstance(b, int) and b >= 0 for b in bounds):
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


def _marker(ev: Lib, args: _Args, kwargs: _Kwargs, node: ast.AST) -> Value:
    return ev.unresolved_call(ev.unknown(node, "it isn't evaluated"), args, kwargs, node, "it isn't evaluated")


BUILTINS: dict[str, Callable[..., Value]] = {
    "list": _list, "tuple": _tuple, "set": _set, "frozenset": _set, "dict": _dict, "len": _len, "range": _range,
    "enumerate": _enumerate, "zip": _zip, "map": _map, "filter": _filter, "sorted": _sorted, "reversed": _reversed,
    "iter": _iter, "next": _next, "any": _reduce_bool(True), "all": _reduce_bool(False), "str": _str, "print": _print,
    "sum": _pure_of_sequence(sum), "min": _pure_of_sequence(min), "max": _pure_of_sequence(max),
    "int": _scalar(int), "float": _scalar(float), "abs": _scalar(abs), "round": _scalar(round), "divmod": _scalar(divmod),
    "repr": _scalar(repr), "chr": _scalar(chr), "ord": _scalar(ord), "hex": _scalar(hex), "oct": _scalar(oct), "bin": _scalar(bin),
    "bool": lambda ev, args, kwargs, node: ev.truth_value(ev.truth(args[0], node.args[0])) if args else False,
    "globals": _reflect("globals"), "locals": _reflect("locals"), "vars": _vars, "exec": _reflect("exec"), "eval": _reflect("eval"),
    "__import__": _reflect("__import__"), "compile": _unknown_builtin("compile"), "open": _unknown_builtin("open"),
    "getattr": _getattr, "hasattr": _hasattr, "setattr": _setattr, "delattr": _reflect("delattr"), "isinstance": _isinstance,
    "super": _super, "property": _wrapped("property"), "staticmethod": _wrapped("staticmethod"),
    "classmethod": _wrapped("classmethod"), "type": _type, "object": _marker, "id": _unknown_builtin("id"),
    "callable": lambda ev, args, kwargs, node: ev.unknown(node, "callable() isn't evaluated"),
}  # fmt: skip

LIBRARY: dict[str, Callable[..., Value]] = {
    "dataclasses.replace": _replace, "copy.replace": _replace, "dataclasses.dataclass": _dataclass, "dataclasses.field": _field,
    "copy.copy": _copy, "copy.deepcopy": _deepcopy, "functools.partial": _partial, "functools.reduce": _reduce,
    "functools.cache": _cache, "functools.lru_cache": _cache, "functools.wraps": _wraps, "itertools.chain": _chain,
    "builtins.chain.from_iterable": _chain_from, "itertools.product": _combine(itertools.product),
    "itertools.combinations": _combine(itertools.combinations), "itertools.permutations": _combine(itertools.permutations),
    "itertools.islice": _islice, "itertools.repeat": _repeat, "operator.attrgetter": _attrgetter, "operator.itemgetter": _itemgetter,
    "enum.auto": _auto, "enum.unique": _first, "typing.cast": _cast, "typing.final": _first, "builtins.object.__setattr__": _setattr,
    "enum.Enum": _marker, "enum.IntEnum": _marker, "enum.StrEnum": _marker, "typing.NamedTuple": _marker, "abc.ABC": _marker,
    "typing.Generic": _marker, "typing.Protocol": _marker, "typing.TypedDict": _marker, "importlib.import_module": _reflect("import_module"),
    "gc.get_objects": _reflect("gc.get_objects"), "abc.abstractmethod": _first, "typing.overload": _first,
}  # fmt: skip

CONSTANTS: dict[str, Value] = {"typing.TYPE_CHECKING": False, "typing_extensions.TYPE_CHECKING": False}
LIBRARIES = frozenset(n.rsplit(".", 1)[0] for n in (*LIBRARY, *CONSTANTS) if not n.startswith("builtins."))

__all__ = ["BUILTINS", "HARMLESS", "LIBRARIES", "LIBRARY", "Lib", "NotPlainError", "to_python"]
