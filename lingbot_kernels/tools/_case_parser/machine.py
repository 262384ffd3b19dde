"""State of the evaluator: journaled changes, branches under unknown conditions and their merge, reports.

A branch runs on the real objects; its changes are captured, undone, and merged with the other branches' changes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .conditions import ALWAYS, NEVER, Cond, Conditions
from .limits import MAX_ALTERNATIVES, MAX_ITEMS, MAX_STEPS, LimitReachedError
from .values import (
    ABSENT,
    Cell,
    Choice,
    DictV,
    Exit,
    Instance,
    ListV,
    Maybe,
    Module,
    Namespace,
    Opaque,
    PyRaise,
    SetV,
    Site,
    TupleV,
    Unknown,
    Value,
    same,
)


class Segment:
    """Changes since a branch began: per object, what it was before. `guard` and `pending` belong to `open`."""

    __slots__ = ("guard", "path", "pending", "saved", "start")

    def __init__(self, start: int, path: Cond, guard: Cond = ALWAYS, pending: PyRaise | None = None) -> None:
        self.start = start
        self.path = path
        self.guard = guard
        self.pending = pending
        self.saved: dict[int, tuple[Cell, Any]] = {}


State = dict[int, tuple[Cell, Any]]


class Machine:
    """Journal, path condition and reports; the evaluator's other parts build on it."""

    def __init__(self) -> None:
        self.conditions = Conditions()
        self.path: Cond = ALWAYS
        self.segments: list[Segment] = []
        self.clock = 1
        self.steps = 0
        self.max_steps = MAX_STEPS
        self.try_depth = 0
        self.module: Module = Module("", "", [], Namespace(0))
        self.reports: dict[tuple[str, int, int, str], tuple[Site, str]] = {}
        self.stopped: LimitReachedError | None = None

    # -- objects ---------------------------------------------------------------------------------------------------

    def list_of(self, items: list[Value]) -> ListV:
        if len(items) > MAX_ITEMS:
            raise LimitReachedError(f"a list of more than {MAX_ITEMS} elements")
        return ListV(self.clock, items)

    def namespace(self, values: dict[str, Value] | None = None) -> Namespace:
        return Namespace(self.clock, values)

    def site(self, node: ast.AST) -> Site:
        return Site(self.module, node)

    def unknown(self, node: ast.AST, reason: str, *, harmless: bool = False, dotted: str = "") -> Unknown:
        return Unknown(reason, self.site(node), harmless=harmless, dotted=dotted)

    def tick(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > self.max_steps and self.stopped is None:
            raise LimitReachedError(f"more than {self.max_steps} evaluation steps")

    def report(self, site: Site, reason: str) -> None:
        node = site.node
        key = (site.module.path, getattr(node, "lineno", 1), getattr(node, "col_offset", 0), reason)
        self.reports.setdefault(key, (site, reason))

    # -- journal ---------------------------------------------------------------------------------------------------

    def touch_list(self, lst: ListV, low: int) -> None:
        """To be called before elements from index `low` on change."""
        if low < len(lst.items):
            lst.version += 1
        elif len(lst.items) >= MAX_ITEMS:
            raise LimitReachedError(f"a list of more than {MAX_ITEMS} elements")
        if not self.segments:
            return
        seg = self.segments[-1]
        if lst.birth >= seg.start:
            return
        known = seg.saved.get(id(lst))
        if known is None:
            seg.saved[id(lst)] = (lst, (low, lst.items[low:]))
        else:
            old_low, tail = known[1]
            if low < old_low:
                seg.saved[id(lst)] = (lst, (low, lst.items[low:old_low] + tail))

    def touch_dict(self, dct: DictV) -> None:
        if self.segments:
            seg = self.segments[-1]
            if dct.birth < seg.start and id(dct) not in seg.saved:
                seg.saved[id(dct)] = (dct, (dict(dct.entries), dct.opaque))

    def set_var(self, ns: Namespace, name: str, value: Value) -> None:
        if self.segments:
            seg = self.segments[-1]
            if ns.birth < seg.start:
                saved = seg.saved.setdefault(id(ns), (ns, {}))[1]
                if name not in saved:
                    saved[name] = ns.vars.get(name, ABSENT)
        if value is ABSENT:
            ns.vars.pop(name, None)
        else:
            ns.vars[name] = value

    def _push(self, path: Cond, guard: Cond = ALWAYS, pending: PyRaise | None = None) -> None:
        self.clock += 1
        self.segments.append(Segment(self.clock, path, guard, pending))

    def _pop(self) -> tuple[Segment, State]:
        """Undo the last segment's changes; what they had led to is returned."""
        seg = self.segments.pop()
        state: State = {}
        for key, (obj, saved) in seg.saved.items():
            if isinstance(obj, ListV):
                low, tail = saved
                state[key] = (obj, (low, obj.items[low:]))
                del obj.items[low:]
                obj.items.extend(tail)
            elif isinstance(obj, DictV):
                state[key] = (obj, (obj.entries, obj.opaque))
                obj.entries, obj.opaque = saved
            elif isinstance(obj, Namespace):
                state[key] = (obj, {name: obj.vars.get(name, ABSENT) for name in saved})
                for name, old in saved.items():
                    if old is ABSENT:
                        obj.vars.pop(name, None)
                    else:
                        obj.vars[name] = old
        return seg, state

    # -- branches --------------------------------------------------------------------------------------------------

    def decide(self, cond: Cond) -> bool | None:
        """Whether `cond` certainly holds, or certainly doesn't, on the present path."""
        if cond == ALWAYS:
            return True
        if cond == NEVER or self.conditions.both(self.path, cond) == NEVER:
            return False
        if self.path != ALWAYS and self.conditions.implies(self.path, cond):
            return True
        return None

    def open(self, guard: Cond, pending: PyRaise | None = None) -> None:
        """From here to `close` changes count only under `guard`; otherwise `pending` was raised here."""
        self._push(self.path, guard, pending)
        self.path = self.conditions.both(self.path, guard)

    def close(self, mark: int, exits: list[Exit]) -> list[Exit]:
        """End the regions opened since there were `mark` of them; the exits taken inside get their guards."""
        while len(self.segments) > mark:
            seg, state = self._pop()
            self.path = seg.path
            otherwise = self.conditions.negate(seg.guard)
            for e in exits:
                e.cond = self.conditions.both(e.cond, seg.guard)
            if seg.pending is not None:
                exits.append(Exit(otherwise, "raise", seg.pending))
            self._merge([(seg.guard, state), (otherwise, {})])
        return exits

    def closed(self, thunk: Callable[[], Any]) -> tuple[Any, list[Exit]]:
        """Run `thunk`; what it raises, for certain or under a condition, comes back as exits."""
        mark = len(self.segments)
        result: Any = None
        exits: list[Exit] = []
        try:
            result = thunk()
        except PyRaise as e:
            exits.append(Exit(ALWAYS, "raise", e))
        except LimitReachedError as e:
            self.stopped = self.stopped or e
        return result, self.close(mark, exits)

    def pend(self, cond: Cond, error: PyRaise) -> None:
        """Under `cond` the evaluated code raises here; the present statement goes on under the opposite."""
        decided = self.decide(cond)
        if decided is False:
            return
        if decided:
            raise error
        otherwise = self.conditions.negate(cond)
        if self.try_depth == 0:  # the import would fail, so there would be no cases at all
            self.path = self.conditions.both(self.path, otherwise)
        else:
            self.open(otherwise, error)

    def may_raise(self, node: ast.AST, what: str) -> None:
        """An unresolved operation inside a try: it may raise an unknown exception."""
        if self.try_depth:
            atom = self.conditions.atom(f"`{what}` raises", f"`{what}` succeeds")
            self.pend(atom, PyRaise(None, node))

    def fork(self, branches: list[tuple[Cond, Callable[[], Any]]]) -> list[tuple[Cond, Any]]:
        """Run each branch under its condition and merge their changes; returns (condition, result) of those that ended.

        The conditions exclude each other and cover the path. A result that is a list of `Exit` gets the condition.
        """
        self.tick(5)
        outer = self.path
        undecided: list[tuple[Cond, Callable[[], Any]]] = []
        for cond, thunk in branches:
            decided = self.decide(cond)
            if decided:
                return [(ALWAYS, thunk())]
            if decided is None:
                undecided.append((cond, thunk))
        ended: list[tuple[Cond, State, Any, list[Exit]]] = []
        error: PyRaise | None = None
        learned = ALWAYS
        for cond, thunk in undecided:
            self.path = self.conditions.both(outer, cond)
            self._push(self.path)
            result, exits = self.closed(thunk)
            _, state = self._pop()
            gone = self.conditions.any_of([e.cond for e in exits])
            if exits and self.conditions.implies(self.conditions.both(outer, cond), gone):
                error = error or exits[0].value
                if self.try_depth == 0:
                    learned = self.conditions.both(learned, self.conditions.negate(cond))
                    continue
            ended.append((cond, state, result, exits))
            if self.stopped:
                break
        self.path = self.conditions.both(outer, learned)
        if not ended:
            raise error or PyRaise(None, None)
        if self.stopped:
            rest = self.conditions.negate(self.conditions.any_of([cond for cond, *_ in ended]))
            self._merge([(cond, state) for cond, state, *_ in ended] + [(rest, {})])
            raise self.stopped
        self._merge([(cond, state) for cond, state, *_ in ended])
        results: list[tuple[Cond, Any]] = []
        raises: list[tuple[Cond, PyRaise]] = []
        for cond, _, result, exits in ended:
            gone = self.conditions.any_of([e.cond for e in exits])
            raises += [(self.conditions.both(cond, e.cond), e.value) for e in exits]
            live = self.conditions.both(cond, self.conditions.negate(gone))
            if self.conditions.both(live, self.path) == NEVER:
                continue
            if isinstance(result, list) and result and isinstance(result[0], Exit):
                for e in result:
                    e.cond = self.conditions.both(e.cond, live)
            results.append((live, result))
        for cond, pending in raises:
            self.pend(cond, pending)
        return results

    def fork_value(self, branches: list[tuple[Cond, Callable[[], Value]]], node: ast.AST) -> Value:
        return self.choose(self.fork(branches), node)

    def choose(self, alts: list[tuple[Cond, Value]], node: ast.AST | None = None) -> Value:
        """One value for several alternatives: the value itself where they agree, else a `Choice`."""
        groups: list[tuple[Cond, Value]] = []
        for cond, value in alts:
            inner = value.alts if isinstance(value, Choice) else [(ALWAYS, value)]
            for inner_cond, leaf in inner:
                both = self.conditions.both(cond, inner_cond)
                if both == NEVER or (self.path != ALWAYS and self.conditions.excludes(both, self.path)):
                    continue
                for i, (other, known) in enumerate(groups):
                    if same(known, leaf):
                        groups[i] = (self.conditions.either(other, both), known)
                        break
                else:
                    groups.append((both, leaf))
                    self.tick(len(groups))
        if not groups:
            raise PyRaise(None, node)
        if len(groups) == 1:
            return groups[0][1]
        if len(groups) > MAX_ALTERNATIVES:
            site = self.site(node) if node is not None else Site(self.module, ast.Pass())
            unknown = Unknown(f"one of more than {MAX_ALTERNATIVES} alternatives", site)
            unknown.old = [value for _, value in groups]
            return unknown
        return Choice(groups)

    # -- merge -----------------------------------------------------------------------------------------------------

    def _merge(self, alts: list[tuple[Cond, State]]) -> None:
        objects: dict[int, Cell] = {}
        for _, state in alts:
            for key, (obj, _) in state.items():
                objects.setdefault(key, obj)
        for key, obj in objects.items():
            if isinstance(obj, ListV):
                self._merge_list(obj, [(c, s[key][1] if key in s else None) for c, s in alts])
            elif isinstance(obj, DictV):
                self._merge_dict(obj, [(c, s[key][1] if key in s else (obj.entries, obj.opaque)) for c, s in alts])
            elif isinstance(obj, Namespace):
                names = dict.fromkeys(n for _, s in alts if key in s for n in s[key][1])
                for name in names:
                    now = obj.vars.get(name, ABSENT)
                    value = self.choose([(c, s[key][1].get(name, now) if key in s else now) for c, s in alts])
                    self.set_var(obj, name, value)

    def _merge_list(self, lst: ListV, alts: list[tuple[Cond, tuple[int, list[Value]] | None]]) -> None:
        low = min(post[0] for _, post in alts if post is not None)
        tails = []
        for cond, post in alts:
            tail = lst.items[low:] if post is None else lst.items[low : post[0]] + post[1]
            tails.append((cond, tail))
        merged = self.merge_sequences(tails)
        self.touch_list(lst, low)
        del lst.items[low:]
        lst.items.extend(merged)

    def merge_sequences(self, alts: list[tuple[Cond, list[Value]]]) -> list[Value]:
        """Elements of several alternatives, in an order that keeps each one's; `Maybe` where not all have them."""
        out: list[tuple[int, Value]] = [(1, item) for item in alts[0][1]]
        for i, (_, items) in enumerate(alts[1:], start=1):
            out = self._align(out, items, 1 << i)
            self.tick(len(out))
        full = (1 << len(alts)) - 1
        merged: list[Value] = []
        for mask, item in out:
            if mask == full or isinstance(item, Opaque):
                merged.append(item)
                continue
            cond = self.conditions.any_of([c for i, (c, _) in enumerate(alts) if mask >> i & 1])
            value = item
            if isinstance(item, Maybe):
                cond, value = self.conditions.both(cond, item.cond), item.value
            decided = self.decide(cond)
            if decided is not False:
                merged.append(value if decided else Maybe(cond, value))
        return merged

    @staticmethod
    def _align(left: list[tuple[int, Value]], right: list[Value], bit: int) -> list[tuple[int, Value]]:
        def key(item: Value) -> Any:
            if isinstance(item, Maybe):
                return (item.cond, key(item.value))
            kind = type(item)
            return (kind, item) if kind in (str, int, bool, float, type(None)) else id(item)

        keys_left = [key(item) for _, item in left]
        keys_right = [key(item) for item in right]
        todo_left: dict[Any, int] = {}
        todo_right: dict[Any, int] = {}
        for k in keys_left:
            todo_left[k] = todo_left.get(k, 0) + 1
        for k in keys_right:
            todo_right[k] = todo_right.get(k, 0) + 1
        out: list[tuple[int, Value]] = []
        i = j = 0
        while i < len(left) or j < len(right):
            if i < len(left) and j < len(right) and keys_left[i] == keys_right[j]:
                out.append((left[i][0] | bit, left[i][1]))
                todo_left[keys_left[i]] -= 1
                todo_right[keys_right[j]] -= 1
                i, j = i + 1, j + 1
            elif j >= len(right) or (i < len(left) and not todo_right.get(keys_left[i])):
                out.append(left[i])
                todo_left[keys_left[i]] -= 1
                i += 1
            elif i >= len(left) or not todo_left.get(keys_right[j]):
                out.append((bit, right[j]))
                todo_right[keys_right[j]] -= 1
                j += 1
            else:  # the two orders cross: the element appears once for each
                out.append(left[i])
                todo_left[keys_left[i]] -= 1
                i += 1
        return out

    def _merge_dict(self, dct: DictV, alts: list[tuple[Cond, tuple[dict[Any, Any], Opaque | None]]]) -> None:
        self.touch_dict(dct)
        keys = dict.fromkeys(k for _, (entries, _) in alts for k in entries)
        merged: dict[Any, tuple[Value, Value]] = {}
        for k in keys:
            found = next(entries[k][0] for _, (entries, _) in alts if k in entries)
            value = self.choose([(c, entries[k][1] if k in entries else ABSENT) for c, (entries, _) in alts])
            if value is not ABSENT:
                merged[k] = (found, value)
        self.tick(len(merged))
        dct.entries = merged
        dct.opaque = next((o for _, (_, o) in alts if o is not None), None)
        if any([k for k in merged if k in entries] != list(entries) for _, (entries, _) in alts):
            dct.opaque = Opaque("the order of its keys depends on a condition", Site(self.module, ast.Pass()))

    # -- uncertain contents ----------------------------------------------------------------------------------------

    def blur(self, value: Value, reason: str, site: Site) -> None:
        """Note that `value` may have been changed in an unknown way."""
        if isinstance(value, ListV):
            if not any(isinstance(item, Opaque) and item.site == site for item in value.items):
                self.touch_list(value, len(value.items))
                value.version += 1
                value.items.append(Opaque(reason, site))
        elif isinstance(value, DictV):
            self.touch_dict(value)
            value.opaque = value.opaque or Opaque(reason, site)
        elif isinstance(value, Instance):
            value.taint = value.taint or Opaque(reason, site)

    def plain(self, value: Value) -> bool:
        """Whether a sequence has neither conditional nor unknown elements."""
        if isinstance(value, (ListV, TupleV)):
            return not any(type(item) is Maybe or type(item) is Opaque for item in value.items)
        if isinstance(value, DictV):
            if value.opaque is not None:
                return False
            return not any(
                isinstance(v, Choice) and any(a is ABSENT for _, a in v.alts) for _, v in value.entries.values()
            )
        return isinstance(value, (str, bytes))

    def is_set(self, value: Value) -> bool:
        return isinstance(value, SetV)
