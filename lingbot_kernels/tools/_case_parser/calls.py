"""Calls: functions of the source, classes, cases, attributes, and what an unresolved call may have done."""

from __future__ import annotations

import ast

from .conditions import NEVER
from .limits import MAX_CALL_DEPTH
from .methods import Methods
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
    Site,
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

    def attribute(self, owner: Value, name: str, node: ast.AST) -> Value:
        raise NotImplementedError

    def bound_value(self, value: Value, node: ast.AST, name: str) -> Value:
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

    def unresolved_call(
        self, func: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST, why: str
    ) -> Value:
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
            return self.unknown(
                node, f"the result of `{self.text(node)}`: {func.reason}", harmless=True, dotted=f"{func.dotted}()"
            )
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
            if any(isinstance(a, Choice) for a in args[:1]) and func.name in (
                "extend",
                "pop",
                "remove",
                "insert",
                "update",
            ):
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
                return self.unresolved_call(
                    func, args, kwargs, node, "a cached function under a condition or with such arguments"
                )
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

    def bind_arguments(
        self, func: FunctionV, args: list[Value], kwargs: dict[str, Value], node: ast.AST
    ) -> dict[str, Value]:
        spec = func.node.args
        positional = [a.arg for a in (*spec.posonlyargs, *spec.args)]
        only = {a.arg for a in spec.posonlyargs}
        values: dict[str, Value] = dict(zip(positional, args, strict=False))
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
        for name, default in zip(positional[len(positional) - len(func.defaults) :], func.defaults, strict=False):
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
        obj.ns.vars.update(zip(names, args, strict=False))
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

    def fill_fields(
        self, cls: ClassV, obj: Instance, args: list[Value], kwargs: dict[str, Value], node: ast.AST
    ) -> None:
        fields = self.all_fields(cls)
        positional = [f.name for f in fields if f.init and not f.kw_only]
        if len(args) > len(positional):
            raise PyRaise(TypeError, node, f"{cls.name}() got too many positional arguments")
        given = dict(zip(positional, args, strict=False))
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

    def store_outside(self, owner: Value, value: Value, node: ast.AST) -> None:
        self.may_raise(node, self.text(node))
        self.escape([owner, value], f"stored in `{self.text(node)}`, which isn't resolved", node)
