"""Expressions of the static evaluator: one method per AST node class.

What can't be resolved becomes `Unknown`; only what ends up in a suite list is reported for it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .attributes import Attributes
from .conditions import ALWAYS, Cond
from .scopes import names_read, scope_info
from .values import (
    ABSENT,
    Choice,
    DictV,
    EnumMember,
    Env,
    FunctionV,
    Instance,
    IterV,
    ListV,
    Maybe,
    Opaque,
    PyRaise,
    TupleV,
    Unknown,
    Value,
    is_scalar,
)


class Expressions(Attributes):
    """`eval` and what it needs of names and scopes."""

    def eval(self, node: ast.expr) -> Value:
        self.tick()
        kind = type(node)
        if kind is ast.Constant:
            return node.value  # type: ignore[attr-defined]
        if kind is ast.Name:
            return self.load_name(node.id, node)  # type: ignore[attr-defined]
        handler: Callable[[ast.expr], Value] | None = getattr(self, f"eval_{kind.__name__}", None)
        if handler is None:
            self.report(self.site(node), f"{kind.__name__} expressions aren't evaluated")
            return self.unknown(node, f"{kind.__name__} expressions aren't evaluated")
        return handler(node)

    # -- names -----------------------------------------------------------------------------------------------------

    def load_name(self, name: str, node: ast.AST) -> Value:
        value = self.lookup(name)
        if value is ABSENT:
            builtin = self.builtin(name)
            if builtin is not None:
                return builtin
            if name == self.case_class_name:
                return self.outside_case_class(node)
            if self.is_local(name):
                raise PyRaise(UnboundLocalError, node, name)
            if self.star_import is not None:
                return Unknown(f"`{name}` may come from an unresolved star import", self.star_import)
            self.may_raise(node, name)
            return self.unknown(node, f"name `{name}` isn't defined in this file", dotted=name)
        if type(value) is Choice and any(v is ABSENT for _, v in value.alts):
            return self.bound_part(value, node, name)
        return value

    def bound_part(self, value: Choice, node: ast.AST, name: str) -> Value:
        """The alternatives in which a name or key is bound; the others raise."""
        absent = self.conditions.any_of([c for c, v in value.alts if v is ABSENT])
        self.pend(absent, PyRaise(NameError, node, name))
        return self.choose([(c, v) for c, v in value.alts if v is not ABSENT], node)

    def lookup(self, name: str) -> Value:
        env: Env | None = self.env
        first = True
        while env is not None:
            if env.kind == "class" and not first:
                env = env.parent
                continue
            if name in env.global_names:
                return env.module.ns.vars.get(name, ABSENT)
            if env.kind in ("module", "class") or name in env.local:
                value = env.ns.vars.get(name, ABSENT)
                if value is not ABSENT or env.kind not in ("class",):
                    return value
            first = False
            env = env.parent
        return ABSENT

    def is_local(self, name: str) -> bool:
        env: Env | None = self.env
        while env is not None:
            if env.kind in ("function", "comprehension") and name in env.local:
                return True
            env = env.parent
        return False

    def bind(self, name: str, value: Value) -> None:
        env = self.env
        if name in env.global_names:
            self.set_var(env.module.ns, name, value)
            return
        if name in env.nonlocal_names or (env.kind == "comprehension" and name not in env.local):
            outer = env.parent
            while outer is not None:
                if env.kind == "comprehension" and outer.kind != "comprehension":
                    saved, self.env = self.env, outer
                    try:
                        self.bind(name, value)
                    finally:
                        self.env = saved
                    return
                if outer.kind == "function" and name in outer.local:
                    self.set_var(outer.ns, name, value)
                    return
                outer = outer.parent
        self.set_var(env.ns, name, value)

    # -- literals --------------------------------------------------------------------------------------------------

    def elements(self, nodes: list[ast.expr]) -> list[Value]:
        out: list[Value] = []
        for n in nodes:
            if isinstance(n, ast.Starred):
                out.extend(self.sequence(self.eval(n.value), n))
            else:
                out.append(self.eval(n))
        return out

    def eval_List(self, node: ast.List) -> Value:
        return self.list_of(self.elements(node.elts))

    def eval_Tuple(self, node: ast.Tuple) -> Value:
        return TupleV(self.elements(node.elts))

    def eval_Set(self, node: ast.Set) -> Value:
        return self.make_set(self.elements(node.elts), node)

    def eval_Dict(self, node: ast.Dict) -> Value:
        out = DictV(self.clock, {})
        for key_node, value_node in zip(node.keys, node.values, strict=False):
            if key_node is None:
                self.dict_update(out, self.eval(value_node), value_node)
            else:
                key = self.eval(key_node)
                self.dict_set(out, key, self.eval(value_node), key_node)
        return out

    def eval_JoinedStr(self, node: ast.JoinedStr) -> Value:
        parts = []
        for piece in node.values:
            if isinstance(piece, ast.FormattedValue):
                parts.append(self.eval_FormattedValue(piece))
            else:
                parts.append(self.eval(piece))
        return self.map_pure(lambda *strings: "".join(strings), parts, node)

    def eval_FormattedValue(self, node: ast.FormattedValue) -> Value:
        value = self.eval(node.value)
        spec = self.eval(node.format_spec) if node.format_spec is not None else ""
        return self.format_value(value, node.conversion, spec, node)

    # -- operators -------------------------------------------------------------------------------------------------

    def eval_BoolOp(self, node: ast.BoolOp) -> Value:
        stop_on = isinstance(node.op, ast.Or)

        def rest(i: int) -> Value:
            value = self.eval(node.values[i])
            if i + 1 == len(node.values):
                return value
            holds = self.truth(value, node.values[i])
            stops = holds if stop_on else self.conditions.negate(holds)
            goes = self.conditions.negate(stops)
            return self.fork_value([(stops, lambda: value), (goes, lambda: rest(i + 1))], node)

        return rest(0)

    def eval_UnaryOp(self, node: ast.UnaryOp) -> Value:
        value = self.eval(node.operand)
        if isinstance(node.op, ast.Not):
            return self.truth_value(self.conditions.negate(self.truth(value, node.operand)))
        return self.unary(node.op, value, node)

    def eval_BinOp(self, node: ast.BinOp) -> Value:
        spine: list[ast.BinOp] = []
        left: ast.expr = node
        while isinstance(left, ast.BinOp):
            spine.append(left)
            left = left.left
        value = self.eval(left)
        for part in reversed(spine):
            self.tick()
            value = self.binary(part.op, value, self.eval(part.right), part)
        return value

    def eval_Compare(self, node: ast.Compare) -> Value:
        def rest(i: int, left: Value) -> Value:
            right = self.eval(node.comparators[i])
            result = self.compare(node.ops[i], left, right, node)
            if i + 1 == len(node.ops):
                return result
            holds = self.truth(result, node)
            fails = self.conditions.negate(holds)
            return self.fork_value([(fails, lambda: result), (holds, lambda: rest(i + 1, right))], node)

        return rest(0, self.eval(node.left))

    def eval_IfExp(self, node: ast.IfExp) -> Value:
        holds = self.truth(self.eval(node.test), node.test)
        fails = self.conditions.negate(holds)
        return self.fork_value(
            [(holds, lambda: self.eval(node.body)), (fails, lambda: self.eval(node.orelse))],
            node,
        )

    def eval_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.eval(node.value)
        self.bind(node.target.id, value)
        return value

    # -- access ----------------------------------------------------------------------------------------------------

    def eval_Attribute(self, node: ast.Attribute) -> Value:
        return self.attribute(self.eval(node.value), node.attr, node)

    def eval_Subscript(self, node: ast.Subscript) -> Value:
        owner = self.eval(node.value)
        return self.subscript(owner, self.eval(node.slice), node)

    def eval_Slice(self, node: ast.Slice) -> Value:
        parts = [None if p is None else self.eval(p) for p in (node.lower, node.upper, node.step)]
        if all(p is None or isinstance(p, int) for p in parts):
            return slice(*parts)
        return self.unknown(node, "the bounds of a slice aren't resolved")

    def eval_Starred(self, node: ast.Starred) -> Value:
        return self.eval(node.value)

    # -- functions -------------------------------------------------------------------------------------------------

    def eval_Lambda(self, node: ast.Lambda) -> Value:
        return self.make_function(node, "<lambda>")

    def make_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, name: str) -> FunctionV:
        defaults = [self.eval(d) for d in node.args.defaults]
        kw_defaults = {
            a.arg: self.eval(d)
            for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=False)
            if d is not None
        }
        info = self.scopes.get(node)
        if info is None:
            info = self.scopes[node] = scope_info(node)
        return FunctionV(node, self.env, name, defaults, kw_defaults, self.namespace(), generator=info.yields)

    def eval_Call(self, node: ast.Call) -> Value:
        func = self.eval(node.func)
        args: list[Value] = []
        kwargs: dict[str, Value] = {}
        exact = True
        for a in node.args:
            if isinstance(a, ast.Starred):
                items = self.sequence(self.eval(a.value), a)
                exact = exact and not any(isinstance(i, (Maybe, Opaque)) for i in items)
                args.extend(items)
            else:
                args.append(self.eval(a))
        for k in node.keywords:
            value = self.eval(k.value)
            if k.arg is not None:
                kwargs[k.arg] = value
            elif isinstance(value, DictV) and self.plain(value) and all(isinstance(s, str) for s in value.entries):
                kwargs.update({s: v for s, (_, v) in value.entries.items()})
            else:
                exact = False
                args.append(value)
        if not exact:
            args = [a.value if isinstance(a, Maybe) else a for a in args if not isinstance(a, Opaque)]
            return self.unresolved_call(func, args, kwargs, node, "its * or ** arguments aren't resolved")
        return self.call(func, args, kwargs, node)

    def eval_Await(self, node: ast.Await) -> Value:
        self.eval(node.value)
        return self.unknown(node, "await isn't evaluated")

    def eval_Yield(self, node: ast.Yield) -> Value:
        value = None if node.value is None else self.eval(node.value)
        self.yielded(value, node)
        return None

    def eval_YieldFrom(self, node: ast.YieldFrom) -> Value:
        source = self.eval(node.value)
        out = self.yields[-1] if self.yields else None
        if out is None:
            raise PyRaise(SyntaxError, node, "yield outside a function")
        items = self.sequence(source, node)
        self.touch_list(out, len(out.items))
        out.items.extend(items)
        return None

    def yielded(self, value: Value, node: ast.AST) -> None:
        if not self.yields:
            raise PyRaise(SyntaxError, node, "yield outside a function")
        out = self.yields[-1]
        self.touch_list(out, len(out.items))
        out.items.append(value)

    # -- comprehensions --------------------------------------------------------------------------------------------

    def eval_ListComp(self, node: ast.ListComp) -> Value:
        out = self.list_of([])
        self.comprehend(node, lambda: self.append(out, self.eval(node.elt)))
        return out

    def eval_SetComp(self, node: ast.SetComp) -> Value:
        out = self.list_of([])
        self.comprehend(node, lambda: self.append(out, self.eval(node.elt)))
        return self.make_set(out.items, node)

    def eval_DictComp(self, node: ast.DictComp) -> Value:
        out = DictV(self.clock, {})

        def add() -> None:
            key = self.eval(node.key)
            self.dict_set(out, key, self.eval(node.value), node)

        self.comprehend(node, add)
        return out

    def eval_GeneratorExp(self, node: ast.GeneratorExp) -> Value:
        first = self.eval(node.generators[0].iter)
        env = self.env

        def make() -> list[Value]:
            out = self.list_of([])
            saved, self.env = self.env, env
            try:
                self.comprehend(node, lambda: self.append(out, self.eval(node.elt)), first)
            finally:
                self.env = saved
            return out.items

        def reads() -> set[Any]:
            return self.reached_by_names(names_read(node), env) | set(self.reach([first]))

        return IterV(make, self.namespace(), reads)

    def append(self, out: ListV, value: Value) -> None:
        self.touch_list(out, len(out.items))
        out.items.append(value)

    def comprehend(
        self,
        node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp,
        emit: Callable[[], None],
        first: Value = ABSENT,
    ) -> None:
        local = self.comprehension_names(node)
        if first is ABSENT:
            first = self.eval(node.generators[0].iter)
        saved = self.env
        self.env = Env("comprehension", self.namespace(), saved, saved.module, local)

        def level(i: int) -> None:
            if i == len(node.generators):
                emit()
                return
            gen = node.generators[i]
            source = first if i == 0 else self.eval(gen.iter)

            def body(item: Value) -> None:
                self.assign(gen.target, item)
                filters(i, 0, item)

            self.each(source, body, gen.iter)

        def filters(i: int, j: int, item: Value) -> None:
            tests = node.generators[i].ifs
            if j == len(tests):
                level(i + 1)
                return
            holds = self.truth(self.eval(tests[j]), tests[j])
            existing = isinstance(item, Instance) and self.is_case_class(item.cls)
            if existing and self.decide(holds) is None and not self.only_outside(tests[j], local):
                reason = "the filter of existing cases isn't resolved; they are kept, conditional"
                self.report(self.site(tests[j]), reason)
            self.fork([(holds, lambda: filters(i, j + 1, item)), (self.conditions.negate(holds), lambda: None)])

        try:
            level(0)
        finally:
            self.env = saved

    def comprehension_names(self, node: ast.AST) -> frozenset[str]:
        known = self.comp_names.get(node)
        if known is None:
            names: set[str] = set()
            for gen in node.generators:  # type: ignore[attr-defined]
                names.update(n.id for n in ast.walk(gen.target) if isinstance(n, ast.Name))
            known = self.comp_names[node] = frozenset(names)
        return known

    @staticmethod
    def only_outside(test: ast.expr, local: frozenset[str]) -> bool:
        return not any(isinstance(n, ast.Name) and n.id in local for n in ast.walk(test))

    # -- truth -----------------------------------------------------------------------------------------------------

    def truth_value(self, cond: Cond) -> Value:
        decided = self.decide(cond)
        if decided is not None:
            return decided
        return Choice([(cond, True), (self.conditions.negate(cond), False)])

    def truth(self, value: Value, node: ast.expr) -> Cond:
        """The condition under which `value` is true; an unknown one becomes an atom with the text of `node`."""
        if is_scalar(value):
            return ALWAYS if value else 0
        if isinstance(value, Choice):
            return self.conditions.any_of(
                [self.conditions.both(c, self.truth(v, node)) for c, v in value.alts if v is not ABSENT]
            )
        if isinstance(value, (ListV, TupleV, DictV)):
            items = self.sequence(value, node) if isinstance(value, DictV) else value.items
            if any(isinstance(i, Opaque) for i in items):  # elements may have come or gone
                return self.conditions.atom(self.text(node))
            return self.conditions.any_of([i.cond if isinstance(i, Maybe) else ALWAYS for i in items])
        if isinstance(value, Unknown):
            if value.atom is None:
                self.may_raise(node, self.text(node))
                value.atom = self.conditions.atom(self.text(node))
            return value.atom
        if isinstance(value, Instance):
            return self.instance_truth(value, node)
        if isinstance(value, EnumMember) and value.cls.mixin is not None:
            return self.truth(value.value, node)
        return ALWAYS

    def instance_truth(self, value: Instance, node: ast.expr) -> Cond:
        for name in ("__bool__", "__len__"):
            method = self.class_attribute(value.cls, name)
            if method is not ABSENT:
                return self.truth(self.call(self.bound(method, value), [], {}, node), node)
        return ALWAYS
