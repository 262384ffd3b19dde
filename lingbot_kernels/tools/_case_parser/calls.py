"""Calls: functions of the source, classes, cases, attributes, and what an unresolved call may have done."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .conditions import NEVER
from .limits import MAX_CALL_DEPTH
from .methods import DICT_METHODS, LIST_METHODS, SET_METHODS, Methods
from .scopes import ScopeInfo, names_read
from .values import (
    ABSENT,
    Bound,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    Env,
    Exit,
    Field,
    FunctionV,
    Instance,
    IterV,
    Library,
    ListV,
    Method,
    Module,
    Namespace,
    Native,
    Partial,
    PyRaise,
    SetV,
    Site,
    Super,
    TupleV,
    Unknown,
    Value,
    Wrapped,
    is_scalar,
)

_REFLECTION = frozenset({"__globals__", "__dict__", "f_globals", "f_locals", "_getframe", "__builtins__", "gi_frame"})


class Calls(Methods):
    """`call`, `attribute` and `instantiate`."""

    def __init__(self) -> None:
        super().__init__()
        self.env = Env("module", Namespace(0), None, self.module)
        self.scopes: dict[ast.AST, ScopeInfo] = {}
        self.comp_names: dict[ast.AST, frozenset[str]] = {}
        self.yields: list[ListV] = []
        self.depth = 0
        self.main: Module | None = None
        self.line = 1
        self.star_import: Site | None = None
        self.outside_cases: dict[str, ClassV] = {}
        self.placeless = ast.Pass()

    # declared here, defined by the parts that build on this one
    def exec_block(self, body: list[ast.stmt]) -> list[Exit]:
        raise NotImplementedError

    def eval(self, node: ast.expr) -> Value:
        raise NotImplementedError

    def assign(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    def builtin(self, name: str) -> Value:
        raise NotImplementedError

    def library_member(self, library: Library, name: str, node: ast.AST) -> Value:
        raise NotImplementedError

    # -- unresolved calls ------------------------------------------------------------------------------------------

    def escape(self, values: list[Value], reason: str, node: ast.AST) -> None:
        """Code that isn't resolved got these values, so it may have changed what they reach."""
        for value in values:
            if not is_scalar(value):
                break
        else:
            return
        site = self.site(node)
        for obj in self.reach(values).values():
            if isinstance(obj, (ListV, DictV, Instance)):
                self.blur(obj, reason, site)
            elif isinstance(obj, FunctionV) and any(
                isinstance(n, (ast.Global, ast.Nonlocal)) for n in ast.walk(obj.node)
            ):
                self.report(site, f"{reason}; a function it got rebinds names outside itself")

    def unresolved_call(self, func: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST, why: str) -> Value:
        values = [*args, *kwargs.values()]
        text = self.text(node.func) if isinstance(node, ast.Call) else self.text(node)
        reason = f"passed to `{text}`, which isn't resolved: {why}"
        self.escape([func, *values], reason, node)
        out = self.unknown(node, f"call of `{text}` isn't resolved: {why}")
        out.old = [v for v in values if isinstance(v, ListV)]
        return out

    def unknown_call(self, func: Unknown, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        self.may_raise(node, self.text(node))
        func.atom = None
        if func.harmless:
            callables = (FunctionV, Bound, Method, Partial, Wrapped, ClassV)
            called = [v for v in (*args, *kwargs.values()) if isinstance(v, callables)]
            self.escape(called, f"passed to `{self.text(node)}`", node)
            return self.unknown(node, f"the result of `{self.text(node)}`: {func.reason}", harmless=True, dotted=f"{func.dotted}()")
        if func.old:  # a method of an object whose class isn't known
            self.escape(func.old, f"a method of it, `{self.text(node)}`, isn't resolved", node)
        return self.unresolved_call(func, args, kwargs, node, func.reason)

    # -- call ------------------------------------------------------------------------------------------------------

    def call(self, func: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        if isinstance(func, FunctionV):
            return self.call_function(func, args, kwargs, node)
        if isinstance(func, Bound):
            return self.call(func.func, [func.first, *args], kwargs, node)
        if isinstance(func, Native):
            return func.run(self, args, kwargs, node)
        if isinstance(func, Method):
            if any(isinstance(a, Choice) for a in args[:1]) and func.name in ("extend", "pop", "remove", "insert", "update"):
                alts = args[0].alts
                return self.fork_value(
                    [(c, lambda v=v: self.call_method(func, [v, *args[1:]], kwargs, node)) for c, v in alts],  # type: ignore[misc]
                    node,
                )
            return self.call_method(func, args, kwargs, node)
        if isinstance(func, ClassV):
            return self.instantiate(func, args, kwargs, node)
        if isinstance(func, Unknown):
            return self.unknown_call(func, args, kwargs, node)
        if isinstance(func, Partial):
            return self.call(func.func, [*func.args, *args], {**func.kwargs, **kwargs}, node)
        if isinstance(func, Choice):
            return self.fork_value([(c, lambda f=f: self.call(f, args, kwargs, node)) for c, f in func.alts], node)  # type: ignore[misc]
        if isinstance(func, Instance):
            method = self.class_attribute(func.cls, "__call__")
            if method is not ABSENT:
                return self.call(self.bound(method, func), args, kwargs, node)
            if func.cls.opaque:
                return self.unresolved_call(func, args, kwargs, node, f"class {func.cls.name} isn't fully known")
        if isinstance(func, Wrapped):
            return self.call(func.func, args, kwargs, node)
        if isinstance(func, EnumMember):
            return self.unresolved_call(func, args, kwargs, node, "an enumeration member is called")
        raise PyRaise(TypeError, node, "not callable")

    def call_function(self, func: FunctionV, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        if func.memo is not None:
            key = self.hashable(TupleV([*args, *kwargs, *kwargs.values()]))
            if key is ABSENT or self.segments:
                return self.unresolved_call(func, args, kwargs, node, "a cached function under a condition or with such arguments")
            if key not in func.memo:
                memo, func.memo = func.memo, None
                try:
                    memo[key] = self.call_function(func, args, kwargs, node)
                finally:
                    func.memo = memo
            return func.memo[key]
        if isinstance(func.node, ast.AsyncFunctionDef):
            return self.unresolved_call(func, args, kwargs, node, "it is a coroutine")
        values = self.bind_arguments(func, args, kwargs, node)
        info = self.scopes[func.node]
        ns = self.namespace(values)
        env = Env("function", ns, func.env, func.env.module, info.local, info.global_names, info.nonlocal_names)
        env.cls = func.owner
        env.first_arg = args[0] if args else None
        if func.generator:
            return IterV(
                lambda: self.run_generator(func, env, node),
                self.namespace(),
                lambda: self.reached_by_names(names_read(func.node), func.env) | set(self.reach(list(values.values()))),
            )
        return self.run_body(func, env, node)

    def run_generator(self, func: FunctionV, env: Env, node: ast.AST) -> list[Value]:
        out = self.list_of([])
        self.yields.append(out)
        try:
            self.run_body(func, env, node)
        finally:
            self.yields.pop()
        return list(out.items)

    def run_body(self, func: FunctionV, env: Env, node: ast.AST) -> Value:
        if self.depth >= MAX_CALL_DEPTH:
            self.tick(30)
            self.report(self.site(node), f"recursion deeper than {MAX_CALL_DEPTH} calls; not followed further")
            return self.unknown(node, f"recursion deeper than {MAX_CALL_DEPTH} calls")
        self.tick(10)
        saved_env, saved_module, saved_line = self.env, self.module, self.line
        if self.module is self.main and self.env.kind in ("module", "class", "comprehension") and self.depth == 0:
            self.line = getattr(node, "lineno", self.line)
        self.depth += 1
        self.env, self.module = env, env.module
        try:
            if isinstance(func.node, ast.Lambda):
                return self.eval(func.node.body)
            exits = self.exec_block(func.node.body)
        finally:
            self.depth -= 1
            self.env, self.module, self.line = saved_env, saved_module, saved_line
        if not exits:
            return None
        returns = [(e.cond, e.value) for e in exits if e.kind == "return"]
        raises = [e for e in exits if e.kind == "raise"]
        rest = self.conditions.negate(self.conditions.any_of([e.cond for e in exits]))
        for e in raises:
            self.pend(e.cond, e.value)
        return self.choose([*returns, (rest, None)] if rest != NEVER else returns, node)

    def bind_arguments(self, func: FunctionV, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> dict[str, Value]:
        spec = func.node.args
        positional = [a.arg for a in (*spec.posonlyargs, *spec.args)]
        only = {a.arg for a in spec.posonlyargs}
        values: dict[str, Value] = dict(zip(positional, args))
        if spec.vararg is not None:
            values[spec.vararg.arg] = TupleV(list(args[len(positional) :]))
        elif len(args) > len(positional):
            raise PyRaise(TypeError, node, f"{func.name}() got too many positional arguments")
        extra: dict[str, Value] = {}
        names = {*positional, *(a.arg for a in spec.kwonlyargs)} - only
        for k, v in kwargs.items():
            if k in names and k in values:
                raise PyRaise(TypeError, node, f"{func.name}() got two values for {k!r}")
            (values if k in names else extra)[k] = v
        if spec.kwarg is not None:
            dct = DictV(self.clock, {})
            dct.entries = {k: (k, v) for k, v in extra.items()}
            values[spec.kwarg.arg] = dct
        elif extra:
            raise PyRaise(TypeError, node, f"{func.name}() got an unexpected argument {next(iter(extra))!r}")
        for name, default in zip(positional[len(positional) - len(func.defaults) :], func.defaults):
            values.setdefault(name, default)
        for name, default in func.kw_defaults.items():
            values.setdefault(name, default)
        for name in (*positional, *(a.arg for a in spec.kwonlyargs)):
            if name not in values:
                raise PyRaise(TypeError, node, f"{func.name}() lacks argument {name!r}")
        return values

    # -- classes ---------------------------------------------------------------------------------------------------

    def outside_case_class(self, node: ast.AST) -> ClassV:
        """The case class where its definition isn't in reach: a record whose first argument is the id."""
        name = self.case_class_name
        if name not in self.outside_cases:
            self.outside_cases[name] = ClassV(name, [], Namespace(0), opaque=True, case=True)
        return self.outside_cases[name]

    def instantiate(self, cls: ClassV, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        if cls.kind == "exception":
            out = Instance(cls, self.namespace(), self.site(node), self.line)
            return out
        if cls.kind == "enum":
            return self.enum_lookup(cls, args, node)
        line = getattr(node, "lineno", 1) if self.module is self.main and self.depth == 0 else self.line
        obj = Instance(cls, self.namespace(), self.site(node), line)
        init = self.class_attribute(cls, "__init__")
        if self.class_attribute(cls, "__new__") is not ABSENT:
            return self.unresolved_call(cls, args, kwargs, node, "its class defines __new__")
        if init is not ABSENT:
            self.call(self.bound(init, obj), args, kwargs, node)
        elif cls.kind in ("dataclass", "namedtuple") and not any(c.opaque for c in cls.mro()):
            self.fill_fields(cls, obj, args, kwargs, node)
        elif self.is_case_class(cls):
            self.fill_case(cls, obj, args, kwargs)
        elif any(c.opaque for c in cls.mro()):
            return self.unresolved_call(cls, args, kwargs, node, f"class {cls.name} isn't fully known")
        elif args or kwargs:
            raise PyRaise(TypeError, node, f"{cls.name}() takes no arguments")
        return obj

    def fill_case(self, cls: ClassV, obj: Instance, args: list[Value], kwargs: dict[str, Value]) -> None:
        """Fields of a case whose class is a record with an unknown definition: the id is the first argument."""
        names = [f.name for c in reversed(cls.mro()) for f in c.fields]
        obj.ns.vars.update(zip(names, args))
        obj.ns.vars.update(kwargs)
        if not names and args:
            obj.ns.vars.setdefault(self.id_param, args[0])
        obj.positional = args

    def all_fields(self, cls: ClassV) -> list[Field]:
        out: dict[str, Field] = {}
        for c in reversed(cls.mro()):
            for f in c.fields:
                out[f.name] = f
        return list(out.values())

    def fill_fields(self, cls: ClassV, obj: Instance, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> None:
        fields = self.all_fields(cls)
        positional = [f.name for f in fields if f.init and not f.kw_only]
        if len(args) > len(positional):
            raise PyRaise(TypeError, node, f"{cls.name}() got too many positional arguments")
        given = dict(zip(positional, args))
        for k, v in kwargs.items():
            if k in given or k not in {f.name for f in fields if f.init}:
                raise PyRaise(TypeError, node, f"{cls.name}() got an unexpected or repeated argument {k!r}")
            given[k] = v
        for f in fields:
            if f.name in given:
                obj.ns.vars[f.name] = given[f.name]
            elif f.factory is not ABSENT:
                obj.ns.vars[f.name] = self.call(f.factory, [], {}, node)
            elif f.default is not ABSENT:
                obj.ns.vars[f.name] = f.default
            elif f.init:
                raise PyRaise(TypeError, node, f"{cls.name}() lacks argument {f.name!r}")
        post = self.class_attribute(cls, "__post_init__")
        if post is not ABSENT:
            self.call(self.bound(post, obj), [], {}, node)

    def enum_lookup(self, cls: ClassV, args: list[Value], node: ast.AST) -> Value:
        if len(args) == 1 and not cls.opaque:
            for m in cls.members:
                equal = m is args[0] or self.equal(m.value, args[0])
                if equal is None:
                    return self.unknown(node, "an enumeration member isn't resolved")
                if equal:
                    return m
            raise PyRaise(ValueError, node, f"not a valid {cls.name}")
        return self.unknown(node, "an enumeration member isn't resolved")

    # -- attributes ------------------------------------------------------------------------------------------------

    def class_attribute(self, cls: ClassV, name: str) -> Value:
        for c in cls.mro():
            value = c.ns.vars.get(name, ABSENT)
            if value is not ABSENT:
                return value
        return ABSENT

    def bound(self, value: Value, first: Value) -> Value:
        """What reading a class attribute through an instance gives."""
        if isinstance(value, FunctionV):
            return Bound(value, first)
        if isinstance(value, Wrapped):
            if value.kind == "staticmethod":
                return value.func
            if value.kind == "classmethod":
                return Bound(value.func, first.cls if isinstance(first, (Instance, EnumMember)) else first)
            return self.call(value.func, [first], {}, self.placeless)
        return value

    def attribute(self, owner: Value, name: str, node: ast.AST) -> Value:
        if name in _REFLECTION:
            self.report(self.site(node), f"reflection through {name} can reach any object")
            return self.unknown(node, f"reflection through {name}")
        if isinstance(owner, Unknown):
            return self.unknown_attribute(owner, name, node)
        if isinstance(owner, Choice):
            return self.fork_value([(c, lambda v=v: self.attribute(v, name, node)) for c, v in owner.alts], node)  # type: ignore[misc]
        if isinstance(owner, Instance):
            return self.instance_attribute(owner, name, node)
        if isinstance(owner, Module):
            value = owner.ns.vars.get(name, ABSENT)
            if value is ABSENT:
                self.may_raise(node, self.text(node))
                return self.unknown(node, f"module {owner.name} has no resolved attribute {name}")
            return self.bound_value(value, node, name)
        if isinstance(owner, Library):
            return self.library_member(owner, name, node)
        if isinstance(owner, ClassV):
            return self.class_level_attribute(owner, name, node)
        if isinstance(owner, EnumMember):
            if name in ("value", "_value_"):
                return owner.value
            if name in ("name", "_name_"):
                return owner.name
            value = self.class_attribute(owner.cls, name)
            if value is not ABSENT:
                return self.bound(value, owner)
            if owner.cls.mixin is str and isinstance(owner.value, str):
                return Method(owner.value, name)
            return self.unknown(node, f"attribute {name} of an enumeration member")
        if isinstance(owner, Super):
            return self.super_attribute(owner, name, node)
        known = self.method_names(owner)
        if known is not None:
            if name in known:
                return Method(owner, name)
            if name.startswith("__"):
                return self.unresolved_call(owner, [], {}, node, f"attribute {name}")
            raise PyRaise(AttributeError, node, name)
        if isinstance(owner, FunctionV):
            if name in ("__name__", "__qualname__"):
                return owner.name
            value = owner.attrs.vars.get(name, ABSENT)
            return self.unknown(node, f"attribute {name} of a function") if value is ABSENT else value
        if isinstance(owner, Native) and owner.name in ("str", "list", "dict", "set", "tuple", "object", "chain"):
            return self.native_attribute(owner, name, node)
        if owner is None and not name.startswith("__"):
            raise PyRaise(AttributeError, node, name)
        return self.unresolved_call(owner, [], {}, node, f"attribute {name} isn't evaluated")

    def native_attribute(self, owner: Native, name: str, node: ast.AST) -> Value:
        """``list.append`` and the like, called with the object first."""
        if owner.name == "dict" and name == "fromkeys":

            def fromkeys(ev: Any, args: list[Value], kwargs: dict[str, Value], at: ast.AST) -> Value:
                out = DictV(self.clock, {})
                self.each(args[0], lambda k: self.dict_set(out, k, args[1] if len(args) > 1 else None, at), at)  # type: ignore[func-returns-value]
                return out

            return Native("dict.fromkeys", fromkeys)
        member = self.library_member(Library(f"builtins.{owner.name}"), name, node)
        if not isinstance(member, Unknown):
            return member

        def run(ev: Any, args: list[Value], kwargs: dict[str, Value], at: ast.AST) -> Value:
            if not args:
                raise PyRaise(TypeError, at, name)
            return self.call(self.attribute(args[0], name, at), args[1:], kwargs, at)

        return Native(f"{owner.name}.{name}", run)

    def bound_value(self, value: Value, node: ast.AST, name: str) -> Value:
        if isinstance(value, Choice) and any(v is ABSENT for _, v in value.alts):
            absent = self.conditions.any_of([c for c, v in value.alts if v is ABSENT])
            self.pend(absent, PyRaise(AttributeError, node, name))
            return self.choose([(c, v) for c, v in value.alts if v is not ABSENT], node)
        return value

    def method_names(self, owner: Value) -> frozenset[str] | None:
        if isinstance(owner, ListV):
            return LIST_METHODS
        if isinstance(owner, SetV):
            return SET_METHODS
        if isinstance(owner, DictV):
            return DICT_METHODS
        if isinstance(owner, TupleV):
            return frozenset({"index", "count"})
        if isinstance(owner, (str, bytes, int, float, complex)):
            return frozenset(dir(owner))
        return None

    def unknown_attribute(self, owner: Unknown, name: str, node: ast.AST) -> Value:
        if name == self.case_class_name:
            return self.outside_case_class(node)
        if name in ("append", "extend", "insert"):
            return Native(name, self._adder(owner, name))
        dotted = f"{owner.dotted}.{name}" if owner.dotted else ""
        if dotted == "sys.modules":
            self.report(self.site(node), "sys.modules can reach any object")
        return Unknown(owner.reason, owner.site, harmless=owner.harmless, dotted=dotted)

    def _adder(self, owner: Unknown, name: str) -> Callable[..., Value]:
        """append, extend or insert on an unresolved list: the list is reported, what is added is kept."""

        def run(ev: Any, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
            if owner.added is None:
                owner.added = ListV(0, [])
            if args:
                self.call_method(Method(owner.added, "extend" if name == "extend" else "append"), args[-1:], {}, node)
            return self.unknown_call(Unknown(owner.reason, owner.site), args, kwargs, node)

        return run

    def instance_attribute(self, owner: Instance, name: str, node: ast.AST) -> Value:
        if owner.taint is not None:
            return self.unknown(node, owner.taint.reason)
        held = self.class_attribute(owner.cls, name)
        if isinstance(held, Wrapped) and held.kind == "property":
            return self.call(held.func, [owner], {}, node)
        value = owner.ns.vars.get(name, ABSENT)
        if value is not ABSENT:
            return self.bound_value(value, node, name)
        if held is not ABSENT:
            return self.bound(held, owner)
        if name == "__class__":
            return owner.cls
        if owner.cls.kind == "namedtuple" and name == "_replace":
            return Native("_replace", lambda ev, args, kwargs, at: self.replaced(owner, kwargs, at))
        if self.is_case_class(owner.cls) and name in ("model_copy", "copy") and owner.cls.opaque:
            return Native(name, lambda ev, args, kwargs, at: self.model_copy(owner, args, kwargs, at))
        getattr_method = self.class_attribute(owner.cls, "__getattr__")
        if getattr_method is not ABSENT:
            return self.call(self.bound(getattr_method, owner), [name], {}, node)
        if any(c.opaque for c in owner.cls.mro()):
            self.may_raise(node, self.text(node))
            out = self.unknown(node, f"attribute {name}: class {owner.cls.name} isn't fully known")
            out.old = [owner]
            return out
        raise PyRaise(AttributeError, node, name)

    def model_copy(self, owner: Instance, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        update = kwargs.get("update")
        if args or set(kwargs) - {"update", "deep"} or not (update is None or isinstance(update, DictV)):
            return self.unresolved_call(owner, args, kwargs, node, f"class {owner.cls.name} isn't fully known")
        if isinstance(update, DictV) and not self.plain(update):
            return self.unresolved_call(owner, args, kwargs, node, "its update isn't resolved")
        changes = {} if update is None else {str(k): v for k, (_, v) in update.entries.items()}
        return self.replaced(owner, changes, node)

    def replaced(self, owner: Instance, changes: dict[str, Value], node: ast.AST) -> Value:
        """A copy with changed fields, as dataclasses.replace makes it."""
        if owner.taint is not None:
            return self.unknown(node, owner.taint.reason)
        line = getattr(node, "lineno", 1) if self.module is self.main and self.depth == 0 else self.line
        fields = self.all_fields(owner.cls)
        if owner.cls.kind in ("dataclass", "namedtuple") and not any(c.opaque for c in owner.cls.mro()):
            values = {f.name: self.bound_value(owner.ns.vars[f.name], node, f.name) for f in fields if f.init and f.name in owner.ns.vars}
            values.update(changes)
            return self.instantiate(owner.cls, [], values, node)
        out = Instance(owner.cls, self.namespace({**owner.ns.vars, **changes}), self.site(node), line)
        out.positional = owner.positional
        return out

    def class_level_attribute(self, owner: ClassV, name: str, node: ast.AST) -> Value:
        value = self.class_attribute(owner, name)
        if value is not ABSENT:
            if isinstance(value, Wrapped) and value.kind != "property":
                return value.func if value.kind == "staticmethod" else Bound(value.func, owner)
            return self.bound_value(value, node, name)
        if name in ("__name__", "__qualname__"):
            return owner.name
        if owner.kind == "enum" and name == "__members__":
            out = DictV(self.clock, {})
            out.entries = {m.name: (m.name, m) for m in owner.members}
            return out
        if any(c.opaque for c in owner.mro()):
            self.may_raise(node, self.text(node))
            return self.unknown(node, f"attribute {name}: class {owner.name} isn't fully known")
        if name.startswith("__"):
            return self.unknown(node, f"attribute {name} of class {owner.name}")
        raise PyRaise(AttributeError, node, name)

    def super_attribute(self, owner: Super, name: str, node: ast.AST) -> Value:
        start = owner.first.cls if isinstance(owner.first, Instance) else owner.first
        after = start.mro()[start.mro().index(owner.cls) + 1 :] if isinstance(start, ClassV) else []
        for c in after:
            value = c.ns.vars.get(name, ABSENT)
            if value is not ABSENT:
                return self.bound(value, owner.first)
            if name == "__init__" and c.kind in ("dataclass",) and not c.opaque:
                return Native(name, lambda ev, args, kwargs, at, c=c: self.fill_fields(c, owner.first, args, kwargs, at))  # type: ignore[misc]
            if name == "__init__" and c.case and isinstance(owner.first, Instance):
                return Native(name, lambda ev, args, kwargs, at, c=c: self.fill_case(c, owner.first, args, kwargs))  # type: ignore[misc]
            if c.opaque:
                return self.unknown(node, f"class {c.name} isn't fully known")
        if name == "__init__":
            return Native(name, lambda ev, args, kwargs, at: None)
        raise PyRaise(AttributeError, node, name)

    def store_outside(self, owner: Value, value: Value, node: ast.AST) -> None:
        self.may_raise(node, self.text(node))
        self.escape([owner, value], f"stored in `{self.text(node)}`, which isn't resolved", node)
