"""Methods of lists, dicts, sets, tuples and strings, on values that may hold conditional elements."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .conditions import ALWAYS, NEVER
from .limits import MAX_STRING
from .operators import NotPlainError, Operators
from .values import (
    ABSENT,
    Choice,
    DictV,
    IterV,
    ListV,
    Maybe,
    Method,
    Opaque,
    PyRaise,
    SetV,
    TupleV,
    Unknown,
    Value,
    is_scalar,
)

_SIZED = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
_STRING = frozenset(n for n in dir(str) if not n.startswith("_")) - {"format", "format_map", "translate", "encode"}
LIST_METHODS = frozenset(n for n in dir(list) if not n.startswith("_"))
DICT_METHODS = frozenset(n for n in dir(dict) if not n.startswith("_"))
SET_METHODS = frozenset(n for n in dir(set) if not n.startswith("_"))


class Methods(Operators):
    """`call_method` dispatches on the owner's class."""

    def call_method(self, m: Method, args: list[Value], kwargs: dict[str, Value], node: ast.AST) -> Value:
        owner = m.owner
        if isinstance(owner, (ListV, DictV)):
            handler: Callable[..., Value] | None = getattr(
                self, f"_{'list' if isinstance(owner, ListV) else 'dict'}_{m.name}", None
            )
            if isinstance(owner, SetV):
                handler = getattr(self, f"_set_{m.name}", None)
            if handler is None:
                self.blur(owner, f"method {m.name} isn't evaluated", self.site(node))
                return self.unknown(node, f"method {m.name} isn't evaluated")
            try:
                return handler(owner, node, *args, **kwargs)
            except TypeError as e:
                if "argument" not in str(e):
                    raise
                raise PyRaise(TypeError, node, f"{m.name}: wrong arguments") from None
        if isinstance(owner, TupleV):
            if m.name in ("index", "count") and len(args) == 1:
                return getattr(self, f"_list_{m.name}")(self.list_of(owner.items), node, *args)
            return self.unknown(node, f"method {m.name} isn't evaluated")
        return self.string_method(owner, m.name, args, kwargs, node)

    # -- strings ---------------------------------------------------------------------------------------------------

    def string_method(
        self, owner: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST
    ) -> Value:
        if name == "join" and len(args) == 1 and isinstance(owner, str):
            items = self.sequence(args[0], node)
            if all(isinstance(i, (Maybe, Choice, str)) for i in items) and any(
                isinstance(i, (Maybe, Choice)) for i in items
            ):
                return self._join_conditional(owner, items, node)
            args = [self.list_of(items)]
        if name == "format":
            keys = list(kwargs)
            values = [owner, *args, *kwargs.values()]
            if any(
                isinstance(v, DictV) or (not is_scalar(v) and not isinstance(v, (Choice, TupleV, ListV)))
                for v in values
            ):
                return self.unknown(node, f"`{self.text(node)}` isn't resolved")

            def run_format(template: Any, *rest: Any) -> Any:
                if len(template) > 10_000 or any(len(d) > 3 for d in _digits(template)) or "{:{" in template:
                    raise NotPlainError
                split = len(rest) - len(keys)
                return template.format(*rest[:split], **dict(zip(keys, rest[split:], strict=False)))

            return self.map_pure(run_format, values, node)
        if (
            not isinstance(owner, str)
            or name not in _STRING
            or (kwargs and name not in ("split", "rsplit", "splitlines"))
        ):
            return self.unknown(node, f"method {name} isn't evaluated")
        keys = list(kwargs)

        def run(text: Any, *rest: Any) -> Any:
            sizes = [len(a) for a in rest if isinstance(a, (str, list, tuple))]
            if name in _SIZED and any(isinstance(a, int) and a > 10_000 for a in rest):
                raise NotPlainError
            if name in ("replace", "join") and (len(text) + 1) * (1 + sum(sizes)) > 50 * MAX_STRING:
                raise NotPlainError
            split = len(rest) - len(keys)
            return getattr(text, name)(*rest[:split], **dict(zip(keys, rest[split:], strict=False)))

        return self.map_pure(run, [owner, *args, *kwargs.values()], node)

    def _join_conditional(self, separator: str, items: list[Value], node: ast.AST) -> Value:
        parts: list[tuple[int, list[str]]] = [(ALWAYS, [])]
        for item in items:
            cond, value = (item.cond, item.value) if isinstance(item, Maybe) else (ALWAYS, item)
            alts = value.alts if isinstance(value, Choice) else [(ALWAYS, value)]
            if not all(isinstance(v, str) for _, v in alts):
                return self.unknown(node, f"`{self.text(node)}` isn't resolved")
            grown = [(self.conditions.both(c, self.conditions.negate(cond)), p) for c, p in parts]
            for c, p in parts:
                for ca, v in alts:
                    grown.append((self.conditions.both(self.conditions.both(c, cond), ca), [*p, v]))
            parts = [(c, p) for c, p in grown if c != NEVER]
            if len(parts) > 32:
                return self.unknown(node, "too many combinations of alternatives")
        return self.choose([(c, separator.join(p)) for c, p in parts], node)

    # -- lists -----------------------------------------------------------------------------------------------------

    def _list_append(self, lst: ListV, node: ast.AST, value: Value, /) -> None:
        self.touch_list(lst, len(lst.items))
        lst.items.append(value)

    def _list_extend(self, lst: ListV, node: ast.AST, values: Value, /) -> None:
        items = self.sequence(values, node)
        self.touch_list(lst, len(lst.items))
        self.tick(len(items))
        lst.items.extend(items)

    def _list_insert(self, lst: ListV, node: ast.AST, index: Value, value: Value, /) -> None:
        if not isinstance(index, int):
            self._list_append(lst, node, value)
            self.blur(lst, "the position of an insert isn't resolved", self.site(node))
            return
        size = len(lst.items)
        at = max(0, index + size) if index < 0 else min(index, size)
        if (at in (0, size) and (index == 0 or index >= size)) or self._exact(lst.items):
            self.touch_list(lst, at)
            lst.items.insert(at, value)
            return
        counts = self.counts(lst.items)
        if counts is None:
            self.touch_list(lst, at)
            lst.items.insert(at, value)
            self.blur(lst, "an insert among conditional elements", self.site(node))
            return
        out: list[Value] = []
        for i in range(size + 1):
            here = NEVER  # the gap before element i is the one the index means
            for n, before in counts[i]:
                for total, final in counts[-1]:
                    if n == (max(0, index + total) if index < 0 else min(index, total)):
                        here = self.conditions.either(here, self.conditions.both(before, final))
            previous = lst.items[i - 1] if i else None
            if isinstance(previous, Maybe):
                here = self.conditions.both(here, previous.cond)
            if here != NEVER and self.decide(here) is not False:
                out.append(self.guarded(here, value))
            out += lst.items[i : i + 1]
        self.touch_list(lst, 0)
        lst.items[:] = out

    def _list_remove(self, lst: ListV, node: ast.AST, value: Value, /) -> None:
        found, taken = NEVER, []
        for item in lst.items:
            self.tick()
            inner = item.value if isinstance(item, Maybe) else item
            same = None if isinstance(item, Opaque) else self.equal(inner, value)
            if same is None:
                if self.decide(found):
                    break
                self.blur(lst, "which element is removed isn't resolved", self.site(node))
                return
            hit = NEVER
            if same:
                there = item.cond if isinstance(item, Maybe) else ALWAYS
                hit = self.conditions.both(there, self.conditions.negate(found))
                found = self.conditions.either(found, there)
            taken.append(hit)
        self.pend(self.conditions.negate(found), PyRaise(ValueError, node, "list.remove(x): x not in list"))
        self._drop(lst, taken)

    def _drop(self, lst: ListV, taken: list[int]) -> None:
        """Take elements out, each under its condition."""
        first = next((i for i, c in enumerate(taken) if c != NEVER), None)
        if first is None:
            return
        kept: list[Value] = []
        for item, hit in zip(lst.items[first:], [*taken[first:], *[NEVER] * len(lst.items)], strict=False):
            if hit == NEVER:
                kept.append(item)
                continue
            cond = item.cond if isinstance(item, Maybe) else ALWAYS
            cond = self.conditions.both(cond, self.conditions.negate(hit))
            if self.decide(cond) is not False:
                kept.append(Maybe(cond, item.value if isinstance(item, Maybe) else item))
        self.touch_list(lst, first)
        lst.items[first:] = kept

    def _list_pop(self, lst: ListV, node: ast.AST, index: Value = -1, /) -> Value:
        if isinstance(index, int):
            if self._exact(lst.items):
                size = len(lst.items)
                if not -size <= index < size:
                    raise PyRaise(IndexError, node, "pop index out of range")
                at = index % size
                value = lst.items[at]
                self.touch_list(lst, at)
                del lst.items[at]
                return value
            taken = self.chosen(lst.items, self.wanted(index))
            if taken is not None:
                value = self.element(lst, index, node)
                self._drop(lst, self.chosen(lst.items, self.wanted(index)) or taken)
                return value
        self.blur(lst, "which element is popped isn't resolved", self.site(node))
        out = self.unknown(node, "which element is popped isn't resolved")
        out.old = [self.list_of(list(lst.items))]
        return out

    def delete_element(self, owner: Value, index: Value, node: ast.AST) -> None:
        if isinstance(owner, Choice):
            self.fork([(c, lambda v=v: self.delete_element(v, index, node)) for c, v in owner.alts])  # type: ignore[misc]
        elif isinstance(owner, ListV) and isinstance(index, int):
            self._list_pop(owner, node, index)
        elif isinstance(owner, ListV) and isinstance(index, slice):
            if self._exact(owner.items):
                self.touch_list(owner, 0)
                del owner.items[index]
                return
            taken = self.chosen(owner.items, self.wanted(index)) if index.step in (None, 1) else None
            if index == slice(None):
                self._list_clear(owner, node)
            elif taken is None:
                self.blur(owner, "which elements are deleted isn't resolved", self.site(node))
            else:
                self._drop(owner, taken)
        elif isinstance(owner, DictV):
            self._dict_pop(owner, node, index)
        elif isinstance(owner, ListV):
            self.blur(owner, "which elements are deleted isn't resolved", self.site(node))
        elif not isinstance(owner, Unknown):
            self.report(self.site(node), "a deletion that isn't resolved")

    def store_element(self, owner: Value, index: Value, value: Value, node: ast.AST) -> None:
        if isinstance(owner, Choice):
            self.fork([(c, lambda v=v: self.store_element(v, index, value, node)) for c, v in owner.alts])  # type: ignore[misc]
        elif isinstance(owner, ListV):
            if isinstance(index, slice) and (index == slice(None) or self._exact(owner.items)):
                items = self.sequence(value, node)
                self.touch_list(owner, 0)
                if index == slice(None):
                    owner.items[:] = items
                    return
                try:
                    owner.items[index] = items
                except ValueError as e:
                    raise PyRaise(ValueError, node, str(e)) from None
            elif isinstance(index, int) and self._exact(owner.items):
                if not -len(owner.items) <= index < len(owner.items):
                    raise PyRaise(IndexError, node, "list assignment index out of range")
                self.touch_list(owner, index % len(owner.items))
                owner.items[index] = value
            else:
                for item in self.sequence(value, node) if isinstance(index, slice) else [value]:
                    self._list_append(owner, node, item)
                self.blur(owner, "which elements are replaced isn't resolved", self.site(node))
        elif isinstance(owner, DictV):
            self.dict_set(owner, index, value, node)
        else:
            self.store_outside(owner, value, node)

    def store_outside(self, owner: Value, value: Value, node: ast.AST) -> None:
        """A value is stored in an object that isn't resolved."""
        raise NotImplementedError

    def _list_clear(self, lst: ListV, node: ast.AST, /) -> None:
        self.touch_list(lst, 0)
        lst.items.clear()

    def _list_reverse(self, lst: ListV, node: ast.AST, /) -> None:
        self.touch_list(lst, 0)
        lst.items.reverse()

    def _list_copy(self, lst: ListV, node: ast.AST, /) -> Value:
        return self.list_of(list(lst.items))

    def _list_sort(self, lst: ListV, node: ast.AST, /, *, key: Value = None, reverse: Value = False) -> None:
        items = self.sorted_items(lst.items, key, reverse, node)
        if items is None:
            self.blur(lst, "the sort key isn't resolved", self.site(node))
            return
        self.touch_list(lst, 0)
        lst.items[:] = items

    def sorted_items(self, items: list[Value], key: Value, reverse: Value, node: ast.AST) -> list[Value] | None:
        keyed = []
        for item in items:
            if isinstance(item, Opaque):
                return None
            inner = item.value if isinstance(item, Maybe) else item
            k = inner if key is None else self.call(key, [inner], {}, node)
            try:
                keyed.append((self.plain_data(k), item))
            except NotPlainError:
                return None
        if not isinstance(reverse, bool):
            return None
        try:
            return [item for _, item in sorted(keyed, key=lambda pair: pair[0], reverse=reverse)]
        except TypeError as e:
            raise PyRaise(TypeError, node, str(e)) from None

    def plain_data(self, value: Value) -> Any:
        from .operators import to_python

        return to_python(value)

    def _list_index(self, lst: ListV, node: ast.AST, value: Value, /) -> Value:
        opaque = any(isinstance(item, Opaque) for item in lst.items)
        for i, item in enumerate(lst.items):
            same = None if opaque or isinstance(item, Maybe) else self.equal(item, value)
            if same is None:
                return self.unknown(node, "an index isn't resolved")
            if same:
                return i
        raise PyRaise(ValueError, node, "the value isn't in the list")

    def _list_count(self, lst: ListV, node: ast.AST, value: Value, /) -> Value:
        results = [None if isinstance(i, (Maybe, Opaque)) else self.equal(i, value) for i in lst.items]
        return self.unknown(node, "a count isn't resolved") if None in results else results.count(True)

    # -- dicts -----------------------------------------------------------------------------------------------------

    def _dict_get(self, dct: DictV, node: ast.AST, key: Value, default: Value = None, /) -> Value:
        if isinstance(key, Choice):
            return self.choose([(c, self._dict_get(dct, node, k, default)) for c, k in key.alts], node)
        return self.dict_get(dct, key, default, node)

    def _dict_keys(self, dct: DictV, node: ast.AST, /) -> Value:
        return TupleV(self.keys(dct))

    def _dict_values(self, dct: DictV, node: ast.AST, /) -> Value:
        def second(pair: Value) -> Value:
            if isinstance(pair, Maybe):
                return Maybe(pair.cond, pair.value.items[1])
            return pair if isinstance(pair, Opaque) else pair.items[1]

        return TupleV([second(p) for p in self.pairs(dct, node)])

    def _dict_items(self, dct: DictV, node: ast.AST, /) -> Value:
        return TupleV(self.pairs(dct, node))

    def _dict_copy(self, dct: DictV, node: ast.AST, /) -> Value:
        return DictV(self.clock, dict(dct.entries), dct.opaque)

    def _dict_update(self, dct: DictV, node: ast.AST, other: Value = ABSENT, /, **named: Value) -> None:
        if other is not ABSENT:
            self.dict_update(dct, other, node)
        for k, v in named.items():
            self.dict_set(dct, k, v, node)

    def _dict_setdefault(self, dct: DictV, node: ast.AST, key: Value, default: Value = None, /) -> Value:
        known = self.hashable(key)
        if dct.opaque is None and known is not ABSENT and known not in dct.entries:
            self.dict_set(dct, key, default, node)
            return default
        value = (
            self.dict_get(dct, key, ABSENT if known in dct.entries else default, node) if known is not ABSENT else None
        )
        if dct.opaque is not None or known is ABSENT or self.present(dct.entries[known][1]) != ALWAYS:
            self.blur(dct, "setdefault of a key that isn't resolved", self.site(node))
            out = self.unknown(node, "setdefault of a key that isn't resolved")
            self.escape([default], "a value is stored under a key that isn't resolved", node)
            return out
        return value

    def escape(self, values: list[Value], reason: str, node: ast.AST) -> None:
        raise NotImplementedError

    def _dict_pop(self, dct: DictV, node: ast.AST, key: Value, default: Value = ABSENT, /) -> Value:
        value = self.dict_get(dct, key, default, node)
        known = self.hashable(key)
        self.touch_dict(dct)
        if known is ABSENT:
            dct.opaque = dct.opaque or Opaque("a removed key isn't resolved", self.site(node))
        else:
            dct.entries.pop(known, None)
        return value

    def _dict_clear(self, dct: DictV, node: ast.AST, /) -> None:
        self.touch_dict(dct)
        dct.entries, dct.opaque = {}, None

    # -- sets ------------------------------------------------------------------------------------------------------

    def _set_add(self, s: SetV, node: ast.AST, value: Value, /) -> None:
        self.dict_set(s, value, True, node)

    def _set_discard(self, s: SetV, node: ast.AST, value: Value, /) -> None:
        self._dict_pop(s, node, value, None)

    def _set_remove(self, s: SetV, node: ast.AST, value: Value, /) -> None:
        self._dict_pop(s, node, value)

    def _set_clear(self, s: SetV, node: ast.AST, /) -> None:
        self._dict_clear(s, node)

    def _set_copy(self, s: SetV, node: ast.AST, /) -> Value:
        return SetV(self.clock, dict(s.entries), s.opaque)

    def _set_update(self, s: SetV, node: ast.AST, /, *others: Value) -> None:
        for other in others:
            items = self.unordered(other, node)
            added = self.make_set(items, node)
            self.touch_dict(s)
            for key, (shown, value) in added.entries.items():
                if key not in s.entries or value is True:
                    s.entries[key] = (s.entries[key][0] if key in s.entries else shown, value)
                else:
                    s.opaque = s.opaque or Opaque("a conditional set element", self.site(node))
            s.opaque = s.opaque or added.opaque

    def _set_union(self, s: SetV, node: ast.AST, /, *others: Value) -> Value:
        out = self._set_copy(s, node)
        self._set_update(out, node, *others)
        return out

    def _set_difference(self, s: SetV, node: ast.AST, /, *others: Value) -> Value:
        out: Value = s
        for other in others:
            out = self.combine(ast.Sub, out, self.make_set(self.unordered(other, node), node), node)
            if isinstance(out, Unknown):
                return out
        return out if out is not s else self._set_copy(s, node)

    def _set_intersection(self, s: SetV, node: ast.AST, /, *others: Value) -> Value:
        out: Value = s
        for other in others:
            out = self.combine(ast.BitAnd, out, self.make_set(self.unordered(other, node), node), node)
            if isinstance(out, Unknown):
                return out
        return out if out is not s else self._set_copy(s, node)

    def unordered(self, value: Value, node: ast.AST) -> list[Value]:
        """Elements for a use that doesn't depend on their order."""
        return self.keys(value) if isinstance(value, DictV) else self.sequence(value, node)

    def is_iterator(self, value: Value) -> bool:
        return isinstance(value, IterV)


def _digits(text: str) -> list[str]:
    import re

    return re.findall(r"\d+", text)
