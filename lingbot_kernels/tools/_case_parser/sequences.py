"""Iteration, element selection and equality over values that may hold conditional or unknown elements."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .conditions import ALWAYS, NEVER, Cond
from .limits import MAX_ITEMS, LimitReachedError
from .machine import Machine
from .scopes import may_mutate, names_read
from .values import (
    ABSENT,
    LEFT,
    Bound,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    Env,
    Exit,
    FunctionV,
    Instance,
    IterV,
    ListV,
    Maybe,
    Method,
    Module,
    Namespace,
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

Body = Callable[[Value], "list[Exit] | None"]


class Sequences(Machine):
    """What loops, unpacking, indexing and `in` need."""

    def __init__(self) -> None:
        super().__init__()
        self.case_class_name = ""
        self.id_param = ""
        self.sources: dict[ast.AST, str] = {}

    def text(self, node: ast.AST) -> str:
        """Source text of an expression, on one line."""
        known = self.sources.get(node)
        if known is None:
            try:
                known = " ".join(ast.unparse(node).split())
            except (RecursionError, ValueError):
                known = "an expression"
            if isinstance(node, (ast.BoolOp, ast.IfExp, ast.Lambda, ast.NamedExpr)):
                known = f"({known})"
            self.sources[node] = known = known if len(known) <= 200 else known[:197] + "..."
        return known

    # declared here, defined by the parts that build on this one
    def call(self, func: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        raise NotImplementedError

    def class_attribute(self, cls: ClassV, name: str) -> Value:
        raise NotImplementedError

    def bound(self, value: Value, first: Value) -> Value:
        raise NotImplementedError

    def is_case_class(self, cls: ClassV) -> bool:
        return any(c.case for c in cls.mro())

    # -- elements --------------------------------------------------------------------------------------------------

    def sequence(self, value: Value, node: ast.AST) -> list[Value]:
        """The elements an iteration over `value` gives; an iterator is used up."""
        if isinstance(value, (ListV, TupleV)):
            self.tick(len(value.items) // 8)
            return list(value.items)
        if isinstance(value, SetV):
            items = self.keys(value)
            if len(items) > 1:
                self.report(self.site(node), "the order of a set isn't fixed; its elements are taken as written")
            return items
        if isinstance(value, DictV):
            return self.keys(value)
        if isinstance(value, (str, bytes)):
            self.tick(len(value))
            return list(value)
        if isinstance(value, Choice):
            alts = self.fork([(c, lambda v=v: self.sequence(v, node)) for c, v in value.alts])  # type: ignore[misc]
            return alts[0][1] if len(alts) == 1 else self.merge_sequences(alts)
        if isinstance(value, IterV):
            return self.take_all(value, node)
        if isinstance(value, Unknown):
            return [*self.old_items(value), Opaque(value.reason, value.site)]
        if isinstance(value, ClassV) and value.kind == "enum" and not value.opaque:
            return list(value.members)
        if isinstance(value, Instance):
            return self.instance_items(value, node)
        if isinstance(value, ClassV) and value.opaque:
            return [Opaque(f"class {value.name} isn't fully known", self.site(node))]
        if isinstance(value, EnumMember):
            return [Opaque("an enumeration member is iterated", self.site(node))]
        raise PyRaise(TypeError, node, "not iterable")

    def instance_items(self, value: Instance, node: ast.AST) -> list[Value]:
        method = self.class_attribute(value.cls, "__iter__")
        if method is not ABSENT:
            return self.sequence(self.call(self.bound(method, value), [], {}, node), node)
        return [Opaque(f"an object of class {value.cls.name} is iterated", self.site(node))]

    def old_items(self, value: Unknown) -> list[Value]:
        """Cases in the lists an unresolved call was given, under a condition that names the call."""
        lists = [v for v in value.old if isinstance(v, ListV)]
        if value.added is not None:
            lists.append(value.added)
        out: list[Value] = []
        atom: Cond | None = None
        for lst in lists:
            for item in lst.items:
                inner = item.value if isinstance(item, Maybe) else item
                if not (isinstance(inner, Instance) and self.is_case_class(inner.cls)):
                    continue
                if atom is None:
                    atom = self.conditions.atom(f"unresolved `{self.text(value.site.node)}` keeps it")
                cond = self.conditions.both(atom, item.cond) if isinstance(item, Maybe) else atom
                out.append(Maybe(cond, inner))
        return out

    def keys(self, value: DictV) -> list[Value]:
        out: list[Value] = []
        for key, held in value.entries.values():
            cond = self.present(held)
            out.append(key if cond == ALWAYS else Maybe(cond, key))
        if value.opaque is not None:
            out.append(value.opaque)
        return out

    def present(self, value: Value) -> Cond:
        """The condition under which a dict entry is there."""
        if isinstance(value, Choice):
            absent = self.conditions.any_of([c for c, v in value.alts if v is ABSENT])
            return self.conditions.negate(absent)
        return ALWAYS

    def pairs(self, value: DictV, node: ast.AST) -> list[Value]:
        out: list[Value] = []
        for key, held in value.entries.values():
            cond = self.present(held)
            if isinstance(held, Choice) and cond != ALWAYS:
                held = self.choose([(c, v) for c, v in held.alts if v is not ABSENT], node)
            pair = TupleV([key, held])
            out.append(pair if cond == ALWAYS else Maybe(cond, pair))
        if value.opaque is not None:
            out.append(value.opaque)
        return out

    # -- iterators -------------------------------------------------------------------------------------------------

    def take_all(self, it: IterV, node: ast.AST) -> list[Value]:
        def take(left: Value) -> list[Value]:
            items = it.make() if left is ABSENT else self.sequence(left, node)
            self.set_var(it.ns, LEFT, TupleV([]))
            return items

        left = it.ns.vars.get(LEFT, ABSENT)
        if isinstance(left, Choice):
            alts = self.fork([(c, lambda v=v: take(v)) for c, v in left.alts])  # type: ignore[misc]
            return self.merge_sequences(alts)
        return take(left)

    def take_next(self, it: IterV, default: Value, node: ast.AST) -> Value:
        items, changed = self.tracked(lambda: self.take_all(it, node))
        if changed:
            self.report(self.site(node), "next() of an iterator whose making changes other objects")
        if not items:
            self.set_var(it.ns, LEFT, TupleV([]))
            if default is ABSENT:
                raise PyRaise(StopIteration, node)
            return default
        first = items[0]
        if isinstance(first, Maybe) or any(isinstance(i, Opaque) for i in items):
            self.set_var(it.ns, LEFT, self.unknown(node, "what an iterator has left depends on a condition"))
            if isinstance(first, Maybe) and len(items) == 1 and default is not ABSENT:
                return self.choose([(first.cond, first.value), (self.conditions.negate(first.cond), default)], node)
            unknown = self.unknown(node, "the next element depends on a condition")
            unknown.old = [self.list_of(items)]
            return unknown
        self.set_var(it.ns, LEFT, TupleV(items[1:]))
        return first

    def tracked(self, thunk: Callable[[], Any]) -> tuple[Any, set[Any]]:
        """Run `thunk`; also return the older objects (and names, as (namespace, name)) that it changed."""
        self._push(self.path)
        result, exits = self.closed(thunk)
        seg, state = self._pop()
        changed: set[Any] = set()
        for key, (obj, saved) in seg.saved.items():
            names = ((key, name) for name in saved if name != LEFT) if isinstance(obj, Namespace) else (key,)
            changed.update(names)
        self._merge([(ALWAYS, state)])
        if self.stopped:
            raise self.stopped
        for e in exits:
            self.pend(e.cond, e.value)
        return result, changed

    # -- loops -----------------------------------------------------------------------------------------------------

    def each(self, source: Value, body: Body, node: ast.AST, *, statement: bool = False) -> list[Exit]:
        """Run `body` for every element, each under its condition. With `statement`, `body` returns its exits."""
        if isinstance(source, IterV) and source.reads is not None:
            items, changed = self.tracked(lambda: self.sequence(source, node))
            if changed:
                self.report(self.site(node), "the generator changes other objects while it is looped over")
            reads = source.reads()
            loop = lambda: self._each(TupleV(items), body, node, statement)  # noqa: E731
            exits, written = self.tracked(loop)
            if any(w in reads or (isinstance(w, tuple) and w[0] in reads) for w in written):
                self.report(self.site(node), "the loop changes what its generator reads")
            if exits:
                self.set_var(source.ns, LEFT, self.unknown(node, "what a generator has left after a loop"))
            return exits or []
        return self._each(source, body, node, statement)

    def _each(self, source: Value, body: Body, node: ast.AST, statement: bool) -> list[Exit]:
        if isinstance(source, ListV):
            items, version = source.items, source.version
        else:
            items, version = self.sequence(source, node), 0
        if not self._exact(items) and any(isinstance(i, Opaque) for i in items):
            # An unknown pass comes first: any element may be missing, and any may end the loop.
            items = sorted(items, key=lambda i: not isinstance(i, Opaque))
        watched = [v for _, v in source.alts if isinstance(v, ListV)] if isinstance(source, Choice) else []
        sizes = [(v.version, len(v.items)) for v in watched]
        levels: list[tuple[int, list[Exit]]] = [(len(self.segments), [])]
        i = 0
        while i < len(items):
            self.tick()
            item = items[i]
            i += 1
            new = self.attempt(lambda item=item: self._one(item, body), levels)  # type: ignore[misc]
            if isinstance(source, ListV) and source.version != version:
                version = source.version
                if not self.plain(source):
                    self.blur(source, "a conditional change of a list that is being looped over", self.site(node))
            if not self._continue(levels, [e for e in new if e.kind != "continue"]):
                break
        if [(v.version, len(v.items)) for v in watched] != sizes:
            for v in watched:
                self.blur(v, "a change of a list that is being looped over", self.site(node))
        return self._finish(levels) if statement else []

    def _one(self, item: Value, body: Body) -> list[Exit]:
        if isinstance(item, Opaque):
            unknown = Unknown(item.reason, item.site)
            return self.unknown_loop(lambda: body(unknown), item.reason, item.site)
        if isinstance(item, Maybe):
            results = self.fork(
                [(item.cond, lambda: body(item.value)), (self.conditions.negate(item.cond), lambda: None)]
            )
            return [e for _, exits in results for e in exits or ()]
        return body(item) or []

    def attempt(self, thunk: Callable[[], list[Exit]], levels: list[tuple[int, list[Exit]]]) -> list[Exit]:
        """Run a step of a block; once there are exits under other conditions, what it raises is one more of them."""
        try:
            return thunk()
        except PyRaise as e:
            if len(levels) == 1 and not levels[0][1]:
                raise
            return [Exit(ALWAYS, "raise", e)]

    def _continue(self, levels: list[tuple[int, list[Exit]]], new: list[Exit]) -> bool:
        """Take note of exits; False when nothing goes on, else the rest runs under the opposite condition."""
        if not new:
            return True
        levels[-1][1].extend(new)
        gone = self.conditions.any_of([e.cond for e in new])
        decided = self.decide(gone)
        if decided:
            return False
        if decided is None:
            levels.append((len(self.segments), []))
            self.open(self.conditions.negate(gone))
        return True

    def _finish(self, levels: list[tuple[int, list[Exit]]]) -> list[Exit]:
        exits: list[Exit] = []
        while levels:
            mark, own = levels.pop()
            exits = self.close(mark, own + exits)
        if self.try_depth == 0:
            for e in exits:
                if e.kind == "raise":
                    self.pend(e.cond, e.value)
            exits = [e for e in exits if e.kind != "raise"]
        return exits

    def unknown_loop(self, step: Callable[[], list[Exit] | None], reason: str, site: Any) -> list[Exit]:
        """An unknown number of passes: what they change becomes unknown, what they append is conditional."""
        atom = self.conditions.atom(f"a pass of the loop at line {getattr(site.node, 'lineno', 1)}")
        outer = self.path
        seen: set[Any] = set()
        for _ in range(6):
            self.path = self.conditions.both(outer, atom)
            self._push(self.path)
            result, raised = self.closed(step)
            seg, state = self._pop()
            self.path = outer
            if self.stopped:
                self._merge([(atom, state), (self.conditions.negate(atom), {})])
                raise self.stopped
            changed: set[Any] = set()
            for key, (obj, saved) in seg.saved.items():
                if isinstance(obj, Namespace):
                    for name in saved:
                        changed.add((key, name))
                        unknown = Unknown(f"changed in a loop that isn't resolved: {reason}", site)
                        unknown.old = [v for v in (obj.vars.get(name), state[key][1][name]) if v is not ABSENT]
                        self.set_var(obj, name, unknown)
                else:
                    changed.add(key)
                    self.blur(obj, f"changed in a loop that isn't resolved: {reason}", site)
            if changed <= seen:
                break
            seen |= changed
        else:
            self.report(site, "the effects of this loop don't settle")
        self._merge([(atom, state), (self.conditions.negate(atom), {})])
        exits: list[Exit] = [e for e in result or () if isinstance(e, Exit) and e.kind != "continue"]
        if self.try_depth:
            exits += raised
        for e in exits:
            e.cond = self.conditions.both(e.cond, atom)
        return exits

    # -- positions -------------------------------------------------------------------------------------------------

    def counts(self, items: list[Value]) -> list[list[tuple[int, Cond]]] | None:
        """Before each element and after the last: how many are there, by condition. None when that isn't known."""
        now: list[tuple[int, Cond]] = [(0, ALWAYS)]
        out = [now]
        for item in items:
            if isinstance(item, Opaque):
                return None
            if isinstance(item, Maybe):
                grown: dict[int, Cond] = {}
                for n, cond in now:
                    for k, c in ((n, self.conditions.negate(item.cond)), (n + 1, item.cond)):
                        both = self.conditions.both(cond, c)
                        if both != NEVER and not self.conditions.excludes(both, self.path):
                            grown[k] = self.conditions.either(grown.get(k, NEVER), both)
                now = sorted(grown.items())
                if len(now) > 12:
                    return None
            else:
                now = [(n + 1, c) for n, c in now]
            self.tick()
            out.append(now)
        return out

    def length(self, value: Value, node: ast.AST) -> Value:
        if isinstance(value, (str, bytes)):
            return len(value)
        items = self.keys(value) if isinstance(value, DictV) else value.items
        counts = None if any(type(i) is Opaque for i in items) else self.counts(items) if not self._exact(items) else []
        if counts == []:
            return len(items)
        if counts is None:
            return self.unknown(node, "the length of a list with unknown elements")
        return self.choose([(c, n) for n, c in counts[-1]], node)

    @staticmethod
    def _exact(items: list[Value]) -> bool:
        return not any(type(i) is Maybe or type(i) is Opaque for i in items)

    def chosen(self, items: list[Value], wanted: Callable[[int, int], bool]) -> list[Cond] | None:
        """For each element the condition under which it is there and `wanted(its index, the length)`."""
        counts = self.counts(items)
        if counts is None:
            return None
        out = []
        for item, before in zip(items, counts, strict=False):
            there = item.cond if isinstance(item, Maybe) else ALWAYS
            hit = NEVER
            for n, cond in before:
                for total, final in counts[-1]:
                    if wanted(n, total):
                        hit = self.conditions.either(hit, self.conditions.both(cond, final))
            out.append(self.conditions.both(there, hit))
            self.tick(len(before))
        return out

    # -- equality --------------------------------------------------------------------------------------------------

    def equal(self, a: Value, b: Value) -> bool | None:
        """Whether two values are equal; None when that isn't known."""
        if a is b and not isinstance(a, (Unknown, Choice, float)):
            return True
        for x, y in ((a, b), (b, a)):
            if isinstance(x, EnumMember) and x.cls.mixin is not None and not isinstance(y, EnumMember):
                return self.equal(x.value, y)
        if is_scalar(a) and is_scalar(b):
            return bool(a == b)
        if any(isinstance(v, (Unknown, Choice, IterV)) for v in (a, b)):
            return None
        if isinstance(a, (ListV, TupleV)) and type(a) is type(b):
            if not (self.plain(a) and self.plain(b)):
                return None
            if len(a.items) != len(b.items):
                return False
            return self._all(self.equal(x, y) for x, y in zip(a.items, b.items, strict=False))
        if isinstance(a, DictV) and type(a) is type(b):
            if not (self.plain(a) and self.plain(b)):
                return None
            if a.entries.keys() != b.entries.keys():
                return False
            return self._all(self.equal(v, b.entries[k][1]) for k, (_, v) in a.entries.items())
        if isinstance(a, Instance) or isinstance(b, Instance):
            return self._equal_instances(a, b)
        return False

    @staticmethod
    def _all(results: Any) -> bool | None:
        out: bool | None = True
        for r in results:
            if r is False:
                return False
            if r is None:
                out = None
        return out

    def _equal_instances(self, a: Value, b: Value) -> bool | None:
        if any(isinstance(v, Instance) and self.class_attribute(v.cls, "__eq__") is not ABSENT for v in (a, b)):
            return None
        if not (isinstance(a, Instance) and isinstance(b, Instance)):
            return None if any(isinstance(v, Instance) and v.cls.opaque for v in (a, b)) else False
        if a.taint or b.taint:
            return None
        if self.is_case_class(a.cls) and self.is_case_class(b.cls):
            ids = self.equal(a.ns.vars.get(self.id_param, ABSENT), b.ns.vars.get(self.id_param, ABSENT))
            if ids is False or a.cls.opaque or b.cls.opaque:
                return False if ids is False else None
        if a.cls is not b.cls:
            return False
        if a.cls.kind in ("dataclass", "namedtuple") and a.cls.eq:
            names = [f.name for c in a.cls.mro() for f in c.fields]
            return self._all(self.equal(a.ns.vars.get(n, ABSENT), b.ns.vars.get(n, ABSENT)) for n in names)
        return None if a.cls.opaque else False

    # -- reachable objects -----------------------------------------------------------------------------------------

    def reach(self, values: list[Value]) -> dict[Any, Value]:
        """Every object that code holding `values` could change: id -> object."""
        out: dict[Any, Value] = {}
        stack = list(values)
        while stack:
            v = stack.pop()
            if is_scalar(v) or id(v) in out or isinstance(v, (Opaque, Native)):
                continue
            self.tick()
            if len(out) > 4 * MAX_ITEMS:
                raise LimitReachedError("too many objects are reachable from an argument")
            out[id(v)] = v
            if isinstance(v, (ListV, TupleV)):
                stack.extend(v.items)
            elif isinstance(v, Maybe):
                stack.append(v.value)
            elif isinstance(v, Unknown):
                stack.extend(v.old)
            elif isinstance(v, DictV):
                stack.extend(x for pair in v.entries.values() for x in pair)
            elif isinstance(v, Choice):
                stack.extend(x for _, x in v.alts)
            elif isinstance(v, (Instance, Module)):
                out[id(v.ns)] = v.ns
                stack.extend(v.ns.vars.values())
                if isinstance(v, Instance):
                    stack.append(v.cls)
            elif isinstance(v, ClassV):
                out[id(v.ns)] = v.ns
                stack.extend(v.ns.vars.values())
                stack.extend(v.bases)
            elif isinstance(v, (Bound, Super)):
                stack.append(v.first)
                stack.append(v.func if isinstance(v, Bound) else v.cls)
            elif isinstance(v, Method):
                stack.append(v.owner)
            elif isinstance(v, Partial):
                stack.extend([v.func, *v.args, *v.kwargs.values()])
            elif isinstance(v, Wrapped):
                stack.append(v.func)
            elif isinstance(v, IterV):
                stack.extend(v.ns.vars.values())
            elif isinstance(v, FunctionV) and may_mutate(v.node):
                stack.extend([*v.defaults, *v.kw_defaults.values()])
                stack.extend(self.values_of_names(names_read(v.node), v.env).values())
        return out

    def values_of_names(self, names: set[str], env: Env | None) -> dict[Any, Value]:
        """(namespace, name) -> value of the names, seen from `env` outwards."""
        out: dict[Any, Value] = {}
        while env is not None:
            for name in names:
                if name in env.ns.vars:
                    out[(id(env.ns), name)] = env.ns.vars[name]
                else:
                    out[(id(env.ns), name)] = None
            env = env.parent
        return out

    def reached_by_names(self, names: set[str], env: Env | None) -> set[Any]:
        """What code with these names may look at, through the functions it names too."""
        out: set[Any] = set()
        todo: list[tuple[set[str], Env | None]] = [(names, env)]
        entered: set[ast.AST] = set()
        while todo:
            found = self.values_of_names(*todo.pop())
            out |= set(found) | set(self.reach(list(found.values())))
            for v in found.values():
                if isinstance(v, FunctionV) and v.node not in entered:
                    entered.add(v.node)
                    todo.append((names_read(v.node), v.env))
        return out
