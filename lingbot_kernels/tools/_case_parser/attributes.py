"""Attributes: of instances, classes, modules, enumerations, built-in values and what isn't resolved."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .calls import Calls
from .methods import DICT_METHODS, LIST_METHODS, SET_METHODS
from .values import (
    ABSENT,
    Bound,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    FunctionV,
    Instance,
    Library,
    ListV,
    Method,
    Module,
    Native,
    PyRaise,
    SetV,
    Super,
    TupleV,
    Unknown,
    Value,
    Wrapped,
)

_REFLECTION = frozenset({"__globals__", "__dict__", "f_globals", "f_locals", "_getframe", "__builtins__", "gi_frame"})


class Attributes(Calls):
    """`attribute` and what it needs."""

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
        out = Unknown(owner.reason, owner.site, harmless=owner.harmless, dotted=dotted)
        out.old = owner.old
        return out

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
            values = {
                f.name: self.bound_value(owner.ns.vars[f.name], node, f.name)
                for f in fields
                if f.init and f.name in owner.ns.vars
            }
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
                return Native(
                    name, lambda ev, args, kwargs, at, c=c: self.fill_fields(c, owner.first, args, kwargs, at)
                )  # type: ignore[misc]
            if name == "__init__" and c.case and isinstance(owner.first, Instance):
                return Native(name, lambda ev, args, kwargs, at, c=c: self.fill_case(c, owner.first, args, kwargs))  # type: ignore[misc]
            if c.opaque:
                return self.unknown(node, f"class {c.name} isn't fully known")
        if name == "__init__":
            return Native(name, lambda ev, args, kwargs, at: None)
        raise PyRaise(AttributeError, node, name)
