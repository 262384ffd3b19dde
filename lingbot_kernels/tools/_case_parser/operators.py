"""Operators, subscripts and formatting on resolved values, by Python's own where both sides are plain Python data."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from .conditions import ALWAYS, NEVER
from .limits import MAX_INT_BITS, MAX_ITEMS, MAX_STRING
from .sequences import Sequences
from .values import (
    ABSENT,
    Choice,
    ClassV,
    DictV,
    EnumMember,
    FunctionV,
    Instance,
    IterV,
    ListV,
    Maybe,
    Native,
    Opaque,
    PyRaise,
    SetV,
    TupleV,
    Unknown,
    Value,
    is_scalar,
)

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.BitAnd: operator.and_,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.invert}


class NotPlainError(Exception):
    """A value isn't plain Python data."""


def to_python(value: Value, depth: int = 0) -> Any:
    """A resolved value as the Python object it stands for; `NotPlainError` for anything else."""
    if is_scalar(value):
        return value
    if depth > 20:
        raise NotPlainError
    if isinstance(value, (ListV, TupleV)):
        items = [to_python(i, depth + 1) for i in value.items]
        return items if isinstance(value, ListV) else tuple(items)
    if isinstance(value, DictV) and value.opaque is None:
        pairs = {to_python(k, depth + 1): to_python(v, depth + 1) for k, v in value.entries.values()}
        return set(pairs) if isinstance(value, SetV) else pairs
    raise NotPlainError


class Operators(Sequences):
    """Pure operations; each unknown operand gives an unknown result, each alternative one alternative."""

    def from_python(self, obj: Any) -> Value:
        if isinstance(obj, list):
            return self.list_of([self.from_python(i) for i in obj])
        if isinstance(obj, tuple):
            return TupleV([self.from_python(i) for i in obj])
        if isinstance(obj, dict):
            out = DictV(self.clock, {})
            for k, v in obj.items():
                self.dict_set(out, self.from_python(k), self.from_python(v), ast.Pass())
            return out
        return obj

    def map_pure(self, fn: Callable[..., Any], values: list[Value], node: ast.AST) -> Value:
        """`fn` over Python data, for every combination of alternatives; unknown where an operand is."""
        combos: list[tuple[int, list[Any]]] = [(ALWAYS, [])]
        for value in values:
            if isinstance(value, Unknown):
                return self.unknown(node, value.reason)
            alts = value.alts if isinstance(value, Choice) else [(ALWAYS, value)]
            grown = []
            for cond, known in combos:
                for c, v in alts:
                    both = self.conditions.both(cond, c)
                    if both != NEVER and (both == ALWAYS or self.decide(both) is not False):
                        grown.append((both, [*known, v]))
            if len(grown) > 64:
                return self.unknown(node, "too many combinations of alternatives")
            combos = grown
        results: list[tuple[int, Value]] = []
        raised = []
        for cond, known in combos:
            try:
                results.append((cond, self.from_python(fn(*[to_python(v) for v in known]))))
            except NotPlainError:
                results.append((cond, self.unknown(node, f"`{self.text(node)}` isn't resolved")))
            except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as e:
                raised.append((cond, PyRaise(type(e), node, str(e))))
        for cond, error in raised:
            self.pend(cond, error)
        return self.choose(results, node)

    # -- formatting ------------------------------------------------------------------------------------------------

    def format_value(self, value: Value, conversion: int, spec: Value, node: ast.AST) -> Value:
        if isinstance(value, Choice) and any(isinstance(v, EnumMember) for _, v in value.alts):
            return self.choose([(c, self.format_value(v, conversion, spec, node)) for c, v in value.alts], node)
        if isinstance(value, EnumMember):
            if value.cls.mixin is not None and value.cls.kind == "enum":
                if "StrEnum" not in [c.name for c in value.cls.mro()]:
                    return self.unknown(node, "how a mixed-in enumeration member formats depends on the Python version")
                value = value.value
            elif self.class_attribute(value.cls, "__str__") is ABSENT and conversion != 114:
                value = f"{value.cls.name}.{value.name}"
            else:
                return self.unknown(node, "how an enumeration member formats isn't resolved")
        if isinstance(value, (SetV, Instance)) or self._holds_set(value):
            return self.unknown(node, f"`{self.text(node)}` isn't resolved")

        def run(v: Any, s: str) -> str:
            if any(int(n) > 1000 for n in re.findall(r"\d+", s)):
                raise NotPlainError
            return format({-1: v, 115: str(v), 114: repr(v), 97: ascii(v)}[conversion], s)

        return self.map_pure(run, [value, spec], node)

    def _holds_set(self, value: Value) -> bool:
        if isinstance(value, (ListV, TupleV)):
            return any(isinstance(i, SetV) for i in value.items)
        return False

    # -- operators -------------------------------------------------------------------------------------------------

    def unary(self, op: ast.unaryop, value: Value, node: ast.AST) -> Value:
        return self.map_pure(_UNARY[type(op)], [value], node)

    def binary(self, op: ast.operator, left: Value, right: Value, node: ast.AST) -> Value:
        kind = type(op)
        if isinstance(left, Choice) and not self._scalars(left):
            return self.fork_value([(c, lambda v=v: self.binary(op, v, right, node)) for c, v in left.alts], node)  # type: ignore[misc]
        if isinstance(right, Choice) and not self._scalars(right):
            return self.fork_value([(c, lambda v=v: self.binary(op, left, v, node)) for c, v in right.alts], node)  # type: ignore[misc]
        listed = isinstance(left, (ListV, Unknown)) and isinstance(right, (ListV, Unknown))
        if kind is ast.Add and listed and not (isinstance(left, Unknown) and isinstance(right, Unknown)):
            return self.list_of([*self.sequence(left, node), *self.sequence(right, node)])
        if kind is ast.Add and isinstance(left, TupleV) and isinstance(right, TupleV):
            return TupleV([*left.items, *right.items])
        if kind is ast.Mult:
            for a, b in ((left, right), (right, left)):
                if isinstance(a, (ListV, TupleV)) and isinstance(b, int):
                    if len(a.items) * b > MAX_ITEMS:
                        return self.unknown(node, f"a list of more than {MAX_ITEMS} elements")
                    return self.list_of(a.items * b) if isinstance(a, ListV) else TupleV(a.items * b)
        if isinstance(left, DictV) and isinstance(right, DictV):
            return self.combine(kind, left, right, node)
        if isinstance(left, Instance) or isinstance(right, Instance):
            operands = self.unknown(node, "an operator of a class")
            return self.call(operands, [left, right], {}, node)
        if isinstance(left, Unknown) or isinstance(right, Unknown):
            self.may_raise(node, self.text(node))
            reason = left.reason if isinstance(left, Unknown) else right.reason
            out = self.unknown(node, reason)
            out.old = [v for v in (left, right) if isinstance(v, ListV)]
            return out
        if kind is ast.BitOr and any(isinstance(v, (ClassV, Native)) or v is None for v in (left, right)):
            return self.unknown(node, "a type union", harmless=True)
        if kind is ast.Mod and isinstance(left, str) and not is_scalar(right) and not isinstance(right, Choice):
            right = self._percent_arguments(right)
            if isinstance(right, TupleV) and self._exact(right.items) and not self._too_large(kind, left, right):
                return self.map_pure(lambda template, *rest: template % rest, [left, *right.items], node)
        if self._too_large(kind, left, right):
            return self.unknown(node, "the result is too large")
        return self.map_pure(_BINARY.get(kind, self._refuse), [left, right], node)

    @staticmethod
    def _refuse(*_: Any) -> Any:
        raise NotPlainError

    @staticmethod
    def _scalars(value: Choice) -> bool:
        return all(is_scalar(v) for _, v in value.alts)

    def _percent_arguments(self, value: Value) -> Value:
        if self._holds_set(value) or isinstance(value, SetV):
            return Unknown("a set is formatted", self.site(ast.Pass()))
        return value

    def _too_large(self, kind: type, left: Value, right: Value) -> bool:
        sides = [
            v for value in (left, right) for v in ([a for _, a in value.alts] if isinstance(value, Choice) else [value])
        ]
        for v in sides:
            if isinstance(v, int) and v.bit_length() > MAX_INT_BITS:
                return True
            if isinstance(v, (str, bytes)) and len(v) > MAX_STRING:
                return True
        if kind is ast.Mod:
            texts = [str(v) for v in sides if isinstance(v, (str, bytes))]
            return any(int(n) > 1000 for t in texts for n in re.findall(r"\d{4,9}", t)) or any(
                re.search(r"\d{10}|\*", t) for t in texts
            )
        if kind in (ast.Pow, ast.LShift):
            return any(isinstance(v, int) and abs(v) > 256 for v in sides)
        if kind is ast.Mult:
            strings = [v for v in sides if isinstance(v, (str, bytes))]
            counts = [v for v in sides if isinstance(v, int)]
            return any(len(s) * n > MAX_STRING for s in strings for n in counts)
        return False

    def compare(self, op: ast.cmpop, left: Value, right: Value, node: ast.AST) -> Value:
        for value in (left, right):
            if isinstance(value, Choice):
                other_first = value is left
                alts = []
                for c, v in value.alts:
                    if self.decide(c) is not False:
                        alts.append(
                            (c, self.compare(op, v, right, node) if other_first else self.compare(op, left, v, node))
                        )
                return self.choose(alts, node)
        kind = type(op)
        if kind in (ast.Is, ast.IsNot):
            result = self._identical(left, right)
        elif kind in (ast.Eq, ast.NotEq):
            result = self.equal(left, right)
        elif kind in (ast.In, ast.NotIn):
            return self.contains(left, right, node, negate=kind is ast.NotIn)
        elif isinstance(left, SetV) and isinstance(right, SetV) and self.plain(left) and self.plain(right):
            return _COMPARE[kind](set(left.entries), set(right.entries))
        else:
            if isinstance(left, Unknown) or isinstance(right, Unknown):
                self.may_raise(node, self.text(node))
            return self.map_pure(_COMPARE[kind], [left, right], node)
        if result is None:
            return self.unknown(node, f"`{self.text(node)}` isn't resolved")
        return result if kind in (ast.Is, ast.Eq) else not result

    @staticmethod
    def _identical(a: Value, b: Value) -> bool | None:
        if a is b and not isinstance(a, Unknown):
            return True
        if isinstance(a, Unknown) or isinstance(b, Unknown):
            return True if a is b else None
        singletons = (bool, type(None), type(Ellipsis))
        if isinstance(a, singletons) or isinstance(b, singletons):
            return False
        return None if is_scalar(a) and is_scalar(b) else False

    def contains(self, item: Value, owner: Value, node: ast.AST, *, negate: bool = False) -> Value:
        if isinstance(owner, str) and isinstance(item, str):
            return (item in owner) != negate
        if isinstance(owner, (Unknown, Instance, str, bytes)) or isinstance(item, Unknown):
            self.may_raise(node, self.text(node))
            return self.unknown(node, f"`{self.text(node)}` isn't resolved")
        if isinstance(owner, DictV):
            key = self.hashable(item)
            if owner.opaque is not None or key is ABSENT:
                return self.unknown(node, f"`{self.text(node)}` isn't resolved")
            held = owner.entries.get(key)
            found = NEVER if held is None else self.present(held[1])
        else:
            found = NEVER
            for other in self.sequence(owner, node):
                if isinstance(other, Opaque):
                    return self.unknown(node, f"`{self.text(node)}` isn't resolved")
                there, value = (other.cond, other.value) if isinstance(other, Maybe) else (ALWAYS, other)
                equal = self.equal(item, value)
                if equal is None:
                    return self.unknown(node, f"`{self.text(node)}` isn't resolved")
                if equal:
                    found = self.conditions.either(found, there)
        cond = self.conditions.negate(found) if negate else found
        decided = self.decide(cond)
        return decided if decided is not None else Choice([(cond, True), (self.conditions.negate(cond), False)])

    # -- dicts and sets --------------------------------------------------------------------------------------------

    def hashable(self, value: Value) -> Any:
        """A Python key that stands for a resolved value; ABSENT when its equality isn't known."""
        if is_scalar(value):
            return value
        if isinstance(value, TupleV) and self.plain(value):
            keys = [self.hashable(i) for i in value.items]
            return ABSENT if any(k is ABSENT for k in keys) else ("tuple", *keys)
        if isinstance(value, EnumMember):
            return self.hashable(value.value) if value.cls.mixin is not None else value
        if isinstance(value, (FunctionV, Native, ClassV)):
            return value
        if isinstance(value, Instance) and not value.cls.opaque and value.cls.kind == "plain":
            return value if self.class_attribute(value.cls, "__eq__") is ABSENT else ABSENT
        return ABSENT

    def make_set(self, items: list[Value], node: ast.AST) -> SetV:
        out = SetV(self.clock, {})
        for item in items:
            if isinstance(item, Opaque):
                out.opaque = item
                continue
            inner = item.value if isinstance(item, Maybe) else item
            key = self.hashable(inner)
            if key is ABSENT:
                if isinstance(inner, (ListV, DictV)):
                    raise PyRaise(TypeError, node, "unhashable type")
                out.opaque = out.opaque or Opaque("a set element isn't resolved", self.site(node))
                continue
            present: Value = True
            if isinstance(item, Maybe):
                before = self.present(out.entries[key][1]) if key in out.entries else NEVER
                cond = self.conditions.either(before, item.cond)
                present = self.choose([(cond, True), (self.conditions.negate(cond), ABSENT)], node)
            if key not in out.entries or present is True:
                out.entries[key] = (out.entries[key][0] if key in out.entries else inner, present)
        return out

    def combine(self, kind: type, left: DictV, right: DictV, node: ast.AST) -> Value:
        """``|``, ``&``, ``-`` and ``^`` of sets, ``|`` of dicts."""
        if isinstance(left, SetV) and isinstance(right, SetV):
            if not (self.plain(left) and self.plain(right)):
                return self.unknown(node, f"`{self.text(node)}` isn't resolved")
            keys = {**left.entries, **right.entries}
            keeps: dict[type, Callable[[Any], bool]] = {
                ast.BitOr: lambda k: True,
                ast.BitAnd: lambda k: k in left.entries and k in right.entries,
                ast.Sub: lambda k: k in left.entries and k not in right.entries,
                ast.BitXor: lambda k: (k in left.entries) != (k in right.entries),
            }
            keep = keeps.get(kind)
            if keep is None:
                raise PyRaise(TypeError, node, "unsupported operand types")
            return SetV(self.clock, {k: v for k, v in keys.items() if keep(k)})
        if kind is ast.BitOr and type(left) is DictV and type(right) is DictV:
            out = DictV(self.clock, dict(left.entries), left.opaque)
            self.dict_update(out, right, node)
            return out
        raise PyRaise(TypeError, node, "unsupported operand types")

    def dict_set(self, dct: DictV, key: Value, value: Value, node: ast.AST) -> None:
        self.touch_dict(dct)
        if isinstance(key, Choice) and not any(v is ABSENT for _, v in key.alts):
            self.fork([(c, lambda k=k: self.dict_set(dct, k, value, node)) for c, k in key.alts])  # type: ignore[misc]
            return
        known = self.hashable(key)
        if known is ABSENT:
            if isinstance(key, (ListV, DictV)):
                raise PyRaise(TypeError, node, "unhashable type")
            dct.opaque = dct.opaque or Opaque("a key isn't resolved", self.site(node))
            return
        dct.entries[known] = (dct.entries[known][0] if known in dct.entries else key, value)

    def dict_update(self, dct: DictV, other: Value, node: ast.AST) -> None:
        if isinstance(other, DictV):
            self.touch_dict(dct)
            for key, (shown, value) in other.entries.items():
                if isinstance(value, Choice) and self.present(value) != ALWAYS:
                    now = dct.entries[key][1] if key in dct.entries else ABSENT
                    value = self.choose([(c, now if v is ABSENT else v) for c, v in value.alts], node)
                dct.entries[key] = (dct.entries[key][0] if key in dct.entries else shown, value)
            dct.opaque = dct.opaque or other.opaque
        elif isinstance(other, Choice):
            self.fork([(c, lambda v=v: self.dict_update(dct, v, node)) for c, v in other.alts])  # type: ignore[misc]
        elif isinstance(other, (ListV, TupleV, IterV)):
            for pair in self.sequence(other, node):
                if isinstance(pair, TupleV) and len(pair.items) == 2 and self.plain(pair):
                    self.dict_set(dct, pair.items[0], pair.items[1], node)
                else:
                    self.blur(dct, "a dict is updated with pairs that aren't resolved", self.site(node))
        else:
            self.blur(dct, "a dict is updated with a value that isn't resolved", self.site(node))

    # -- subscripts ------------------------------------------------------------------------------------------------

    def subscript(self, owner: Value, index: Value, node: ast.AST) -> Value:
        if isinstance(owner, Choice):
            return self.fork_value([(c, lambda v=v: self.subscript(v, index, node)) for c, v in owner.alts], node)  # type: ignore[misc]
        if isinstance(index, Choice):
            return self.fork_value([(c, lambda v=v: self.subscript(owner, v, node)) for c, v in index.alts], node)  # type: ignore[misc]
        if isinstance(owner, (ListV, TupleV)):
            return self.element(owner, index, node)
        if isinstance(owner, DictV) and not isinstance(owner, SetV):
            return self.dict_get(owner, index, ABSENT, node)
        if isinstance(owner, (str, bytes)) and isinstance(index, (int, slice)):
            try:
                return owner[index]
            except IndexError as e:
                raise PyRaise(IndexError, node, str(e)) from None
        if isinstance(owner, ClassV) and owner.kind == "enum" and isinstance(index, str):
            for m in owner.members:
                if m.name == index:
                    return m
            raise PyRaise(KeyError, node, index)
        if isinstance(owner, (ClassV, Native)):
            return owner
        if isinstance(owner, Instance):
            method = self.class_attribute(owner.cls, "__getitem__")
            if method is not ABSENT:
                return self.call(self.bound(method, owner), [index], {}, node)
        if isinstance(owner, (Unknown, Instance, EnumMember)) or isinstance(index, Unknown):
            self.may_raise(node, self.text(node))
            reason = owner.reason if isinstance(owner, Unknown) else f"`{self.text(node)}` isn't resolved"
            out = self.unknown(node, reason, harmless=isinstance(owner, Unknown) and owner.harmless)
            out.old = [owner]
            return out
        raise PyRaise(TypeError, node, "not subscriptable")

    def element(self, owner: Value, index: Value, node: ast.AST) -> Value:
        wrap: Callable[[list[Value]], Value] = self.list_of if isinstance(owner, ListV) else TupleV
        plain = self._exact(owner.items)
        if isinstance(index, slice) and (plain or index == slice(None)):
            try:
                return wrap(owner.items[index])
            except ValueError as e:
                raise PyRaise(ValueError, node, str(e)) from None
        if isinstance(index, bool):
            index = int(index)
        if isinstance(index, int) and plain:
            try:
                return owner.items[index]
            except IndexError as e:
                raise PyRaise(IndexError, node, str(e)) from None
        if isinstance(index, (int, slice)):
            conds = self.chosen(owner.items, self.wanted(index))
            if conds is not None and isinstance(index, slice) and index.step in (None, 1):
                return wrap([self.guarded(c, i) for c, i in zip(conds, owner.items, strict=False) if c != NEVER])
            if conds is not None and isinstance(index, int):
                alts = [
                    (c, i.value if isinstance(i, Maybe) else i)
                    for c, i in zip(conds, owner.items, strict=False)
                    if c != NEVER
                ]
                missing = self.conditions.negate(self.conditions.any_of([c for c, _ in alts]))
                self.pend(missing, PyRaise(IndexError, node, "list index out of range"))
                return self.choose(alts, node)
        elif not isinstance(index, Unknown):
            raise PyRaise(TypeError, node, "list indices must be integers or slices")
        self.may_raise(node, self.text(node))
        out = self.unknown(node, f"`{self.text(node)}` isn't resolved")
        out.old = [self.list_of(list(owner.items))]
        return out

    @staticmethod
    def wanted(index: int | slice) -> Callable[[int, int], bool]:
        if isinstance(index, slice):
            return lambda n, total: n in range(total)[slice(index.start, index.stop)]
        return lambda n, total: n == (index if index >= 0 else total + index)

    def guarded(self, cond: int, item: Value) -> Value:
        value = item.value if isinstance(item, Maybe) else item
        return value if self.decide(cond) else Maybe(cond, value)

    def dict_get(self, owner: DictV, index: Value, default: Value, node: ast.AST) -> Value:
        """The value for a key; ABSENT as `default` means that a missing key raises KeyError."""
        key = self.hashable(index)
        if owner.opaque is not None or key is ABSENT:
            self.may_raise(node, self.text(node))
            reason = owner.opaque.reason if owner.opaque is not None else "a key isn't resolved"
            out = self.unknown(node, reason)
            out.old = [v for _, v in owner.entries.values()]
            return out
        held = owner.entries[key][1] if key in owner.entries else ABSENT
        alts = held.alts if isinstance(held, Choice) else [(ALWAYS, held)]
        missing = self.conditions.any_of([c for c, v in alts if v is ABSENT])
        if default is ABSENT:
            self.pend(missing, PyRaise(KeyError, node, repr(index)))
            return self.choose([(c, v) for c, v in alts if v is not ABSENT], node)
        return self.choose([(c, default if v is ABSENT else v) for c, v in alts], node)
