"""Class definitions: plain classes, dataclasses, enumerations, named tuples, exceptions and case classes."""

from __future__ import annotations

import ast
from typing import Any

from .expressions import Expressions
from .values import (
    ABSENT,
    ClassV,
    DictV,
    EnumMember,
    Env,
    Exit,
    Field,
    FunctionV,
    Native,
    Opaque,
    PyRaise,
    Unknown,
    Value,
    Wrapped,
)

_PLAIN_BASES = frozenset({"object", "Generic", "Protocol", "ABC", "TypedDict"})
_MIXINS: dict[str, type] = {"str": str, "int": int, "float": float}
_ENUMS: dict[str, type | None] = {"Enum": None, "IntEnum": int, "StrEnum": str}


class Classes(Expressions):
    """`exec_ClassDef` and the class decorators."""

    def run_in(self, env: Env, body: list[ast.stmt]) -> list[Exit]:
        raise NotImplementedError

    def exec_ClassDef(self, stmt: ast.ClassDef) -> None:
        decorators = [self.eval(d) for d in stmt.decorator_list]
        bases = [self.eval(b) for b in stmt.bases]
        keywords = [self.eval(k.value) for k in stmt.keywords]
        ns = self.namespace()
        cls = ClassV(stmt.name, [], ns, opaque=bool(keywords), case=stmt.name == self.case_class_name)
        for base, node in zip(bases, stmt.bases, strict=False):
            self.add_base(cls, base, node)
        env = Env("class", ns, self.env, self.module, cls=cls)
        for e in self.run_in(env, stmt.body):
            if e.kind == "raise":
                self.pend(e.cond, e.value)
        if cls.kind == "enum":
            self.finish_enum(cls)
        elif cls.kind == "namedtuple":
            self.take_defaults(cls)
        value: Value = cls
        for decorator, node in zip(reversed(decorators), reversed(stmt.decorator_list), strict=False):
            if isinstance(decorator, Unknown) and cls.case and value is cls:
                cls.opaque = True  # some other record decorator: the fields as they are annotated
                continue
            value = self.call(decorator, [value], {}, node)
        self.bind(stmt.name, value)

    def add_base(self, cls: ClassV, base: Value, node: ast.expr) -> None:
        if isinstance(base, ClassV):
            cls.bases.append(base)
            cls.opaque = cls.opaque or (base.opaque and not base.case)
            if base.kind in ("enum", "exception", "namedtuple", "dataclass"):
                cls.kind = base.kind if base.kind != "dataclass" else cls.kind
                cls.mixin = cls.mixin or base.mixin
                cls.base_exception = base.base_exception
            cls.frozen = cls.frozen or base.frozen
            if base.case and base.opaque:
                cls.opaque = True
        elif isinstance(base, Native) and base.exception is not None:
            cls.kind, cls.base_exception = "exception", base.exception
        elif isinstance(base, Native) and base.name in _ENUMS:
            cls.kind, cls.mixin = "enum", cls.mixin or _ENUMS[base.name]
            if base.name == "StrEnum":
                cls.bases.append(ClassV("StrEnum", [], self.namespace(), opaque=False, case=False))
        elif isinstance(base, Native) and base.name == "NamedTuple":
            cls.kind = "namedtuple"
        elif isinstance(base, Native) and base.name in _MIXINS:
            cls.mixin = _MIXINS[base.name]
            cls.opaque = cls.opaque or False
        elif isinstance(base, Native) and base.name in _PLAIN_BASES:
            pass
        else:
            cls.opaque = True
            self.escape([cls], "used as a subclass of a class that isn't resolved", node)
        if cls.mixin is not None and cls.kind == "plain" and node is not None and isinstance(base, Native):
            cls.kind = "mixin"

    def annotated(self, stmt: ast.AnnAssign) -> None:
        """An annotated name in a class body: a field, for dataclasses and named tuples."""
        cls = self.env.cls
        if cls is None or not isinstance(stmt.target, ast.Name):
            return
        text = self.text(stmt.annotation)
        if "ClassVar" in text:
            return
        if "KW_ONLY" in text or "InitVar" in text:
            cls.opaque = True
            return
        cls.fields = [f for f in cls.fields if f.name != stmt.target.id]
        cls.fields.append(Field(stmt.target.id))

    def take_defaults(self, cls: ClassV) -> None:
        for f in cls.fields:
            held = cls.ns.vars.get(f.name, ABSENT)
            if isinstance(held, DictV) and "__field__" in held.entries:
                spec = {k: v for k, (_, v) in held.entries.items()}
                f.default = spec.get("default", ABSENT)
                f.factory = spec.get("default_factory", ABSENT)
                f.init = spec.get("init", True) is not False
                f.kw_only = spec.get("kw_only", False) is True
                cls.ns.vars.pop(f.name)
                if f.default is not ABSENT:
                    cls.ns.vars[f.name] = f.default
            elif held is not ABSENT:
                f.default = held

    def make_dataclass(self, cls: Value, options: dict[str, Value], node: ast.AST) -> Value:
        if not isinstance(cls, ClassV):
            return self.unresolved_call(
                self.placeholder(node), [cls], {}, node, "dataclass of something that isn't a class"
            )
        self.take_defaults(cls)
        cls.kind = "dataclass"
        cls.frozen = options.get("frozen") is True or cls.frozen
        cls.eq = options.get("eq", True) is True
        if options.get("init", True) is not True:
            cls.opaque = True
        if options.get("kw_only", False) is not False:
            for f in cls.fields:
                f.kw_only = True
        return cls

    def placeholder(self, node: ast.AST) -> Unknown:
        return self.unknown(node, "it isn't evaluated")

    def finish_enum(self, cls: ClassV) -> None:
        """Turn the plain attributes of an enumeration body into members."""
        inherited = {m.name for base in cls.bases for m in base.members}
        if inherited:
            raise PyRaise(TypeError, None, "an enumeration with members can't be extended")
        special = any(
            name in cls.ns.vars for name in ("_generate_next_value_", "__new__", "__init__", "_missing_", "_ignore_")
        )
        count: Any = 0
        strings = any(c.name == "StrEnum" for c in cls.mro())
        for name, value in list(cls.ns.vars.items()):
            if name.startswith("_") or isinstance(value, (FunctionV, Wrapped, ClassV)):
                continue
            if isinstance(value, Opaque):  # auto()
                value = (
                    name.lower()
                    if strings
                    else count + 1
                    if isinstance(count, int)
                    else self.unknown(value.site.node, "auto() after a value that isn't an integer")
                )
            count = value
            alias = next((m for m in cls.members if self.equal(m.value, value)), None)
            member = alias or EnumMember(cls, name, value)
            if alias is None:
                cls.members.append(member)
            cls.ns.vars[name] = member
        cls.opaque = cls.opaque or special
