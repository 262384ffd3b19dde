"""Statements of the static evaluator: one method per AST node class, each returning its exits.

An exit (return, break, continue, raise) taken under a condition leaves the rest of the block to the opposite condition.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import Any

from .classes import Classes
from .conditions import ALWAYS, NEVER, Cond
from .values import (
    ABSENT,
    Choice,
    ClassV,
    DictV,
    Env,
    Exit,
    FunctionV,
    Instance,
    ListV,
    Module,
    Native,
    Opaque,
    PyRaise,
    TupleV,
    Unknown,
    Value,
    Wrapped,
)

_INPLACE_METHODS = {ast.Add: "extend", ast.BitOr: "update"}


class Statements(Classes):
    """`exec_block` and one method per statement."""

    def __init__(self) -> None:
        super().__init__()
        self.handling: list[PyRaise] = []

    def exec_block(self, body: list[ast.stmt]) -> list[Exit]:
        levels: list[tuple[int, list[Exit]]] = [(len(self.segments), [])]
        for stmt in body:
            if not self._continue(levels, self.attempt(lambda stmt=stmt: self.exec_stmt(stmt), levels)):  # type: ignore[misc]
                break
        return self._finish(levels)

    def exec_stmt(self, stmt: ast.stmt) -> list[Exit]:
        self.tick()
        if self.module is self.main and self.depth == 0:
            self.line = stmt.lineno
        mark = len(self.segments)
        handler: Callable[[ast.stmt], list[Exit] | None] | None = getattr(self, f"exec_{type(stmt).__name__}", None)
        if handler is None:
            self.report(self.site(stmt), f"{type(stmt).__name__} statements aren't evaluated")
            return []
        try:
            exits = handler(stmt) or []
        except PyRaise as e:
            if e.node is None:
                e.node = stmt
            if len(self.segments) == mark:
                raise
            exits = [Exit(ALWAYS, "raise", e)]
        return self.close(mark, exits) if len(self.segments) > mark else exits

    def exec_Pass(self, stmt: ast.Pass) -> None:
        pass

    def exec_Global(self, stmt: ast.Global) -> None:
        if self.env.kind in ("module", "class"):
            self.env.global_names |= set(stmt.names)

    def exec_Nonlocal(self, stmt: ast.Nonlocal) -> None:
        pass

    def exec_Expr(self, stmt: ast.Expr) -> None:
        if not isinstance(stmt.value, ast.Constant):
            self.eval(stmt.value)

    # -- assignment ------------------------------------------------------------------------------------------------

    def exec_Assign(self, stmt: ast.Assign) -> None:
        value = self.eval(stmt.value)
        for target in stmt.targets:
            self.assign(target, value)

    def exec_AnnAssign(self, stmt: ast.AnnAssign) -> None:
        if self.env.kind == "class" and isinstance(stmt.target, ast.Name):
            self.annotated(stmt)
        if stmt.value is not None:
            self.assign(stmt.target, self.eval(stmt.value))

    def assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.bind(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self.unpack(target.elts, value, target)
        elif isinstance(target, ast.Attribute):
            self.store_attribute(self.eval(target.value), target.attr, value, target)
        elif isinstance(target, ast.Subscript):
            owner = self.eval(target.value)
            self.store(owner, self.eval(target.slice), value, target)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)

    def store(self, owner: Value, index: Value, value: Value, node: ast.AST) -> None:
        if isinstance(owner, Instance):
            method = self.class_attribute(owner.cls, "__setitem__")
            if method is not ABSENT:
                self.call(self.bound(method, owner), [index, value], {}, node)
                return
        self.store_element(owner, index, value, node)

    def unpack(self, targets: list[ast.expr], value: Value, node: ast.AST) -> None:
        if isinstance(value, Choice):
            self.fork([(c, lambda v=v: self.unpack(targets, v, node)) for c, v in value.alts])  # type: ignore[misc]
            return
        items = self.sequence(value, node)
        star = next((i for i, t in enumerate(targets) if isinstance(t, ast.Starred)), None)
        if not self._exact(items):
            unknown = self.unknown(node, "the number of values to unpack isn't known")
            unknown.old = [self.list_of(items)]
            if any(type(i) is Opaque for i in items):
                self.may_raise(node, self.text(node))
            for t in targets:
                self.assign(t.value if isinstance(t, ast.Starred) else t, unknown)
            return
        short = len(items) < len(targets) - (star is not None)
        if short or (star is None and len(items) > len(targets)):
            raise PyRaise(ValueError, node, "wrong number of values to unpack")
        if star is None:
            for t, v in zip(targets, items, strict=False):
                self.assign(t, v)
            return
        after = len(targets) - star - 1
        middle = items[star : len(items) - after]
        for t, v in zip(targets[:star], items, strict=False):
            self.assign(t, v)
        self.assign(targets[star], self.list_of(middle))
        for t, v in zip(targets[star + 1 :], items[len(items) - after :], strict=False):
            self.assign(t, v)

    def store_attribute(self, owner: Value, name: str, value: Value, node: ast.AST) -> None:
        if isinstance(owner, Choice):
            self.fork([(c, lambda v=v: self.store_attribute(v, name, value, node)) for c, v in owner.alts])  # type: ignore[misc]
        elif isinstance(owner, Instance):
            if owner.cls.frozen:
                raise PyRaise(AttributeError, node, f"cannot assign to field {name!r}")
            held = self.class_attribute(owner.cls, name)
            if (isinstance(held, Wrapped) and held.kind == "property") or self.class_attribute(
                owner.cls, "__setattr__"
            ) is not ABSENT:
                self.escape([owner, value], f"`{self.text(node)}` is set by code that isn't followed", node)
            else:
                self.set_var(owner.ns, name, value)
        elif isinstance(owner, (ClassV, Module)):
            self.set_var(owner.ns, name, value)
        elif isinstance(owner, FunctionV):
            self.set_var(owner.attrs, name, value)
        else:
            self.store_outside(owner, value, node)

    def exec_AugAssign(self, stmt: ast.AugAssign) -> None:
        target = stmt.target
        if isinstance(target, ast.Name):
            now = self.load_name(target.id, target)
            self.bind(target.id, self.augmented(now, stmt))
        elif isinstance(target, ast.Attribute):
            owner = self.eval(target.value)
            now = self.attribute(owner, target.attr, target)
            self.store_attribute(owner, target.attr, self.augmented(now, stmt), target)
        else:
            owner, index = self.eval(target.value), self.eval(target.slice)
            now = self.subscript(owner, index, target)
            self.store(owner, index, self.augmented(now, stmt), target)

    def augmented(self, now: Value, stmt: ast.AugAssign) -> Value:
        value = self.eval(stmt.value)
        return self.inplace(now, value, stmt)

    def inplace(self, now: Value, value: Value, stmt: ast.AugAssign) -> Value:
        if isinstance(now, Choice):
            return self.fork_value([(c, lambda v=v: self.inplace(v, value, stmt)) for c, v in now.alts], stmt)  # type: ignore[misc]
        method = _INPLACE_METHODS.get(type(stmt.op))
        if isinstance(now, ListV) and method == "extend":
            if isinstance(value, Choice):
                self.fork([(c, lambda v=v: self._list_extend(now, stmt, v)) for c, v in value.alts])  # type: ignore[misc]
            else:
                self._list_extend(now, stmt, value)
            return now
        if isinstance(now, ListV) and isinstance(stmt.op, ast.Mult):
            product = self.binary(stmt.op, now, value, stmt)
            if isinstance(product, ListV):
                self.touch_list(now, 0)
                now.items[:] = product.items
            else:
                self.blur(now, "a repetition that isn't resolved", self.site(stmt))
            return now
        if isinstance(now, DictV):
            result = self.binary(stmt.op, now, value, stmt)
            self.touch_dict(now)
            if isinstance(result, DictV):
                now.entries, now.opaque = result.entries, result.opaque
            else:
                self.blur(now, "an in-place operation that isn't resolved", self.site(stmt))
            return now
        if isinstance(now, Unknown) and method == "extend":
            self.call(self.unknown_attribute(now, "extend", stmt), [value], {}, stmt)
            return now
        return self.binary(stmt.op, now, value, stmt)

    def exec_Delete(self, stmt: ast.Delete) -> None:
        for target in stmt.targets:
            self.delete(target)

    def delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if self.lookup(target.id) is ABSENT:
                raise PyRaise(NameError, target, target.id)
            self.bind(target.id, ABSENT)
        elif isinstance(target, ast.Subscript):
            owner = self.eval(target.value)
            self.delete_element(owner, self.eval(target.slice), target)
        elif isinstance(target, ast.Attribute):
            owner = self.eval(target.value)
            if isinstance(owner, (Instance, ClassV, Module)):
                self.set_var(owner.ns, target.attr, ABSENT)
            elif not isinstance(owner, Unknown):
                self.report(self.site(target), "a deletion that isn't resolved")
        else:
            for t in getattr(target, "elts", []):
                self.delete(t)

    # -- control flow ----------------------------------------------------------------------------------------------

    def exec_Return(self, stmt: ast.Return) -> list[Exit]:
        return [Exit(ALWAYS, "return", None if stmt.value is None else self.eval(stmt.value))]

    def exec_Break(self, stmt: ast.Break) -> list[Exit]:
        return [Exit(ALWAYS, "break")]

    def exec_Continue(self, stmt: ast.Continue) -> list[Exit]:
        return [Exit(ALWAYS, "continue")]

    def exec_If(self, stmt: ast.If) -> list[Exit]:
        holds = self.truth(self.eval(stmt.test), stmt.test)
        return self.branches(
            [
                (holds, lambda: self.exec_block(stmt.body)),
                (self.conditions.negate(holds), lambda: self.exec_block(stmt.orelse)),
            ]
        )

    def branches(self, alts: list[tuple[Cond, Callable[[], list[Exit]]]]) -> list[Exit]:
        return [e for _, exits in self.fork(alts) for e in exits or ()]

    def exec_For(self, stmt: ast.For) -> list[Exit]:
        source = self.eval(stmt.iter)

        def body(item: Value) -> list[Exit]:
            try:
                self.assign(stmt.target, item)
            except PyRaise as e:
                return [Exit(ALWAYS, "raise", e)] if self.try_depth else self._raise(e)
            return self.exec_block(stmt.body)

        exits = self.each(source, body, stmt.iter, statement=True)
        return self.after_loop(exits, stmt.orelse)

    @staticmethod
    def _raise(e: PyRaise) -> list[Exit]:
        raise e

    def after_loop(self, exits: list[Exit], orelse: list[ast.stmt]) -> list[Exit]:
        out = [e for e in exits if e.kind in ("return", "raise")]
        if not orelse:
            return out
        gone = self.conditions.any_of([e.cond for e in exits])
        if self.decide(gone) is True:
            return out
        rest = self.conditions.negate(gone)
        return out + self.branches([(rest, lambda: self.exec_block(orelse)), (gone, lambda: [])])

    def exec_While(self, stmt: ast.While) -> list[Exit]:
        levels: list[tuple[int, list[Exit]]] = [(len(self.segments), [])]
        ended = False

        def body() -> list[Exit]:
            self.truth(self.eval(stmt.test), stmt.test)
            return self.exec_block(stmt.body)

        def step() -> list[Exit]:
            nonlocal ended
            decided = self.decide(self.truth(self.eval(stmt.test), stmt.test))
            ended = not decided
            if decided is None:
                return self.unknown_loop(body, f"`while {self.text(stmt.test)}`", self.site(stmt.test))
            return [e for e in self.exec_block(stmt.body) if e.kind != "continue"] if decided else []

        while not ended:
            self.tick()
            if not self._continue(levels, self.attempt(step, levels)):
                break
        return self.after_loop(self._finish(levels), stmt.orelse)

    def exec_With(self, stmt: ast.With) -> list[Exit]:
        managers = [self.eval(item.context_expr) for item in stmt.items]
        for item, manager in zip(stmt.items, managers, strict=False):
            entered: Value = self.unknown(item.context_expr, "what a context manager gives")
            if isinstance(manager, Instance) and self.class_attribute(manager.cls, "__enter__") is not ABSENT:
                entered = self.call(self.attribute(manager, "__enter__", item.context_expr), [], {}, stmt)
            elif not isinstance(manager, Unknown) or not manager.harmless:
                self.escape([manager], "used as a context manager that isn't resolved", item.context_expr)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, entered)
        swallows = any(not (isinstance(m, Unknown) and m.dotted.startswith(("open(", "open"))) for m in managers)
        self.try_depth += swallows
        try:
            _, exits = self.block_exits(stmt.body)
        finally:
            self.try_depth -= swallows
        for manager in reversed(managers):
            if isinstance(manager, Instance) and self.class_attribute(manager.cls, "__exit__") is not ABSENT:
                result = self.call(self.attribute(manager, "__exit__", stmt), [None, None, None], {}, stmt)
                if any(e.kind == "raise" for e in exits) and result is not None and result is not False:
                    self.report(self.site(stmt), "a context manager of this file may swallow an exception")
        out = [e for e in exits if e.kind != "raise"]
        for e in exits:
            if e.kind == "raise" and not swallows:
                self.pend(e.cond, e.value)
            elif e.kind == "raise" and self.try_depth:
                passes = self.conditions.atom(f"`{self.text(stmt.items[0].context_expr)}` lets an exception through")
                out.append(Exit(self.conditions.both(e.cond, passes), "raise", e.value))
        return out

    def block_exits(self, body: list[ast.stmt]) -> tuple[Any, list[Exit]]:
        """Exits of a block, what it raises among them."""
        result, raised = self.closed(lambda: self.exec_block(body))
        if self.stopped:
            raise self.stopped
        return result, [*(result or []), *raised]

    # -- exceptions ------------------------------------------------------------------------------------------------

    def exec_Raise(self, stmt: ast.Raise) -> None:
        if stmt.exc is None:
            raise self.handling[-1] if self.handling else PyRaise(RuntimeError, stmt)
        value = self.eval(stmt.exc)
        kind: Any = None
        if isinstance(value, Native) and value.exception is not None:
            kind = value.exception
        elif isinstance(value, ClassV):
            kind = value
        elif isinstance(value, Instance):
            kind = value.cls
        elif isinstance(value, Unknown) and value.dotted.startswith("exception:"):
            kind = getattr(builtins, value.dotted[10:], None)
        error = PyRaise(kind, stmt, "" if stmt.exc is None else self.text(stmt.exc))
        error.value = value
        raise error

    def exec_Assert(self, stmt: ast.Assert) -> None:
        holds = self.truth(self.eval(stmt.test), stmt.test)
        self.pend(self.conditions.negate(holds), PyRaise(AssertionError, stmt, self.text(stmt.test)))

    def exec_Try(self, stmt: ast.Try) -> list[Exit]:
        self.try_depth += 1
        try:
            _, exits = self.block_exits(stmt.body)
        finally:
            self.try_depth -= 1
        raised = [e for e in exits if e.kind == "raise"]
        out = [e for e in exits if e.kind != "raise"]
        gone = self.conditions.any_of([e.cond for e in exits])
        guarded = bool(stmt.finalbody)
        self.try_depth += guarded
        try:
            if stmt.orelse and self.decide(gone) is not True:
                rest = self.conditions.negate(gone)
                _, more = self.outcome([(rest, lambda: self.exec_block(stmt.orelse)), (gone, lambda: [])])
                out += more
            for e in raised:
                otherwise = self.conditions.negate(e.cond)
                _, more = self.outcome([(e.cond, lambda e=e: self.handle(stmt, e.value)), (otherwise, lambda: [])])  # type: ignore[misc]
                out += more
        finally:
            self.try_depth -= guarded
        if guarded:
            final = self.exec_block(stmt.finalbody)
            stays = self.conditions.negate(self.conditions.any_of([e.cond for e in final]))
            for e in out:
                e.cond = self.conditions.both(e.cond, stays)
            out += final
        result = []
        for e in out:
            if e.kind == "raise" and self.try_depth == 0:
                self.pend(e.cond, e.value)
            elif e.cond != NEVER:
                result.append(e)
        return result

    exec_TryStar = exec_Try

    def outcome(self, alts: list[tuple[Cond, Callable[[], list[Exit]]]]) -> tuple[None, list[Exit]]:
        result, raised = self.closed(lambda: self.branches(alts))
        if self.stopped:
            raise self.stopped
        if self.try_depth == 0:
            for e in raised:
                self.pend(e.cond, e.value)
            raised = []
        return None, [*(result or []), *raised]

    def handle(self, stmt: ast.Try, error: PyRaise) -> list[Exit]:
        """Run the first handler that takes `error`; where that isn't known, each under a condition."""

        def from_handler(i: int) -> list[Exit]:
            if i == len(stmt.handlers):
                raise error
            handler = stmt.handlers[i]
            takes = True if handler.type is None else self.takes(self.eval(handler.type), error)
            if takes is None and self.try_depth == 0 and i + 1 == len(stmt.handlers):
                takes = True  # otherwise the import would fail, and there would be no cases
            if takes is None:
                shown = self.text(handler.type) if handler.type is not None else ""
                cond = self.conditions.atom(f"the exception is {shown}", f"the exception isn't {shown}")
                other = self.conditions.negate(cond)
                return self.branches([(cond, lambda: run(handler)), (other, lambda: from_handler(i + 1))])
            return run(handler) if takes else from_handler(i + 1)

        def run(handler: ast.ExceptHandler) -> list[Exit]:
            if handler.name:
                shown = self.unknown(handler, "an exception object", harmless=True)
                self.bind(handler.name, error.value if error.value is not None else shown)
            self.handling.append(error)
            try:
                return self.exec_block(handler.body)
            finally:
                self.handling.pop()

        return from_handler(0)

    def takes(self, kind: Value, error: PyRaise) -> bool | None:
        if isinstance(kind, TupleV):
            results = [self.takes(k, error) for k in kind.items]
            return True if True in results else None if None in results else False
        wanted = kind.exception if isinstance(kind, Native) else kind if isinstance(kind, ClassV) else None
        if wanted in (Exception, BaseException):
            return True
        if wanted is None or error.kind is None:
            return None
        if isinstance(error.kind, ClassV):
            if any(c.opaque for c in error.kind.mro()) and wanted not in error.kind.mro():
                return None
            if isinstance(wanted, ClassV):
                return wanted in error.kind.mro()
            return issubclass(error.kind.base_exception, wanted)
        return isinstance(wanted, type) and issubclass(error.kind, wanted)

    # -- definitions -----------------------------------------------------------------------------------------------

    def exec_FunctionDef(self, stmt: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        decorators = [self.eval(d) for d in stmt.decorator_list]
        value: Value = self.make_function(stmt, stmt.name)
        if self.env.kind == "class":
            value.owner = self.env.cls
        for decorator, node in zip(reversed(decorators), reversed(stmt.decorator_list), strict=False):
            value = self.call(decorator, [value], {}, node)
        self.bind(stmt.name, value)

    exec_AsyncFunctionDef = exec_FunctionDef

    def exec_TypeAlias(self, stmt: ast.stmt) -> None:
        self.bind(stmt.name.id, self.unknown(stmt, "a type alias", harmless=True))  # type: ignore[attr-defined]

    # -- match -----------------------------------------------------------------------------------------------------

    def exec_Match(self, stmt: ast.Match) -> list[Exit]:
        subject = self.eval(stmt.subject)

        def from_case(i: int) -> list[Exit]:
            if i == len(stmt.cases):
                return []
            case = stmt.cases[i]
            holds = self.matches(case.pattern, subject, case)
            if case.guard is not None:
                test = case.guard
                alts = [
                    (holds, lambda: self.truth_value(self.truth(self.eval(test), test))),
                    (self.conditions.negate(holds), lambda: False),
                ]
                holds = self.truth(self.fork_value(alts, test), test)
            other = self.conditions.negate(holds)
            return self.branches([(holds, lambda: self.exec_block(case.body)), (other, lambda: from_case(i + 1))])

        return from_case(0)

    def matches(self, pattern: ast.pattern, subject: Value, case: ast.match_case) -> Cond:
        """The condition under which a pattern matches; its names are bound."""
        if isinstance(subject, Choice) and not isinstance(pattern, ast.MatchAs):
            return self.conditions.any_of(
                [
                    self.conditions.both(c, self.matches(pattern, v, case))
                    for c, v in subject.alts
                    if self.decide(c) is not False
                ]
            )
        if isinstance(pattern, ast.MatchAs):
            holds = ALWAYS if pattern.pattern is None else self.matches(pattern.pattern, subject, case)
            if pattern.name is not None:
                self.bind(pattern.name, subject)
            return holds
        if isinstance(pattern, ast.MatchOr):
            return self.conditions.any_of([self.matches(p, subject, case) for p in pattern.patterns])
        if isinstance(pattern, (ast.MatchValue, ast.MatchSingleton)):
            value = self.eval(pattern.value) if isinstance(pattern, ast.MatchValue) else pattern.value
            same = (
                self.equal(value, subject) if isinstance(pattern, ast.MatchValue) else self._identical(value, subject)
            )
            if same is not None:
                return ALWAYS if same else NEVER
        elif (
            isinstance(pattern, ast.MatchSequence)
            and isinstance(subject, (ListV, TupleV))
            and self._exact(subject.items)
        ):
            if not any(isinstance(p, ast.MatchStar) for p in pattern.patterns):
                if len(pattern.patterns) != len(subject.items):
                    return NEVER
                holds = ALWAYS
                for p, item in zip(pattern.patterns, subject.items, strict=False):
                    holds = self.conditions.both(holds, self.matches(p, item, case))
                return holds
        elif isinstance(pattern, ast.MatchSequence) and (isinstance(subject, (str, DictV)) or subject is None):
            return NEVER
        for n in ast.walk(pattern):
            for name in (getattr(n, "name", None), getattr(n, "rest", None)):
                if isinstance(name, str):
                    self.bind(name, self.unknown(pattern, "captured by a pattern that isn't resolved"))
        self.may_raise(pattern, "match")
        return self.conditions.atom(f"`match` takes `case {self.text(pattern)}`")

    # -- scopes for modules and classes -----------------------------------------------------------------------------

    def run_in(self, env: Env, body: list[ast.stmt]) -> list[Exit]:
        saved_env, saved_module = self.env, self.module
        self.env, self.module = env, env.module
        try:
            return self.exec_block(body)
        finally:
            self.env, self.module = saved_env, saved_module
