"""Which outcomes of the unknown tests decide which cases: flips each decision, and combines those that belong together.

Runs in the child interpreter; each run of the config is a forked process (`reading`). The answer is JSON data.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from .conditions import Cube, describe
from .reading import forked, run_config
from .support import Cache

MAX_RUNS = 6000
_EXHAUSTIVE = 6  # that few decisions are tried in all combinations
_SAMPLES = 48
_REPAIRS = 12
_MANY = 4  # so many decisions of one place are first flipped together

Item = tuple[str, str]  # suite, case id


class ExhaustedError(Exception):
    """Too many runs, or too much time."""


@dataclass
class World:
    """One run."""

    data: dict[str, Any]
    values: dict[str, bool] = field(default_factory=dict)
    met: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    items: dict[Item, tuple[str, ...]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return str(self.data["status"])


@dataclass
class Group:
    """Decisions that belong together, by the first of them: what follows from each outcome."""

    key: str
    sides: dict[bool, Node]
    items: set[Item]
    keys: set[str]


@dataclass
class Node:
    """What holds in a context: a world, and the independent groups that change it."""

    world: World
    groups: list[Group] = field(default_factory=list)

    def predict(self, values: dict[str, bool]) -> dict[Item, tuple[str, ...]]:
        out = dict(self.world.items)
        for g in self.groups:
            side = g.sides.get(values.get(g.key, self.world.values[g.key])) or next(iter(g.sides.values()))
            found = side.predict(values)
            for item in g.items:
                if item in found:
                    out[item] = found[item]
                else:
                    out.pop(item, None)
        return out

    def cubes(self, item: Item) -> set[Cube]:
        """Under which outcomes `item` is there."""
        for g in self.groups:
            if item in g.items:
                parts = {v: side.cubes(item) for v, side in g.sides.items()}
                if len(parts) == 1 or parts[False] == parts[True]:
                    return next(iter(parts.values()))
                return {c | {(g.key, v)} for v, cubes in parts.items() for c in cubes}
        return {frozenset()} if item in self.world.items else set()

    def varied(self) -> set[Item]:
        return {i for g in self.groups for i in g.items}

    def decisions(self) -> set[str]:
        return {k for g in self.groups for k in g.keys}


class Explorer:
    """Finds the worlds of one config."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.suites: dict[str, str] = request["lists"]
        self.deadline = time.monotonic() + request["seconds"]
        self.cache = Cache()
        self.runs: dict[frozenset[tuple[str, bool]], World] = {}
        self.defaults: dict[str, bool] = {}
        self.texts: dict[str, str] = {}
        self.kinds: dict[str, tuple[str, Any]] = {}
        self.order: dict[str, int] = {}
        self.places: dict[str, bool] = {}
        self.merges: list[set[str]] = []
        self.unresolved: dict[tuple[Any, ...], None] = {}
        self.stopped: dict[tuple[Any, ...], None] = {}
        self.deltas: dict[tuple[int, int], set[Item]] = {}
        self.slow = request["seconds"]
        self.guards: set[str] = set()  # those of which one outcome only ends in a world

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, values: dict[str, bool]) -> World:
        """The world in which `values` hold and every other decision has its default."""
        name = self._name(values)
        if name not in self.runs:
            self._execute(values, [])
        return self.runs[name]

    def _name(self, values: dict[str, bool]) -> frozenset[tuple[str, bool]]:
        return frozenset((k, v) for k, v in values.items() if self.defaults.get(k) != v)

    def sweep(self, context: dict[str, bool], keys: list[str]) -> None:
        """Flip each of `keys` alone, by a fork at the point where it is decided: nothing before it runs again."""
        missing = [k for k in keys if self._name({**context, k: not self.defaults[k]}) not in self.runs]
        if len(missing) > 2:
            self._execute(context, missing)

    def _execute(self, values: dict[str, bool], sweep: list[str]) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0.02 or len(self.runs) >= MAX_RUNS:
            raise ExhaustedError
        request = {**self.request, "forced": {**self.defaults, **values}, "places": self.places, "sweep": sweep}
        request["branch_seconds"] = self.slow
        began = time.monotonic()
        first = not self.runs
        limit = left if sweep else min(left, self.slow)
        for data in forked(lambda: run_config(request, self.cache), limit):
            world = World(data)
            if first:
                self._warm(world)
                self.slow = max(1.0, 10 * (time.monotonic() - began))
            before = world.data.pop("prefix", 0)
            if before:
                data["trace"] = self.runs[self._name(values)].data["trace"][:before] + data["trace"]
            for key, text, kind, value, default, where, site in data["trace"]:
                self.defaults.setdefault(key, default)
                self.texts.setdefault(key, text)
                self.order.setdefault(key, len(self.order))
                if kind in ("iter", "order"):
                    self.kinds.setdefault(key, (kind, site))
                world.values[key] = value
                world.places[key] = where
                world.met.append(key)
            self._items(world)
            flipped = data["flipped"]
            context = {**values, flipped: world.values[flipped]} if flipped else values
            if self.runs.setdefault(self._name(context), world) is world and world.status in ("refused", "limit"):
                self._stop(world)

    def _warm(self, world: World) -> None:
        """Load once what each run would load again: the standard modules and the compiled files."""
        for name in world.data["modules"]:
            if name.partition(".")[0] not in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3"):
                try:
                    __import__(name)
                except Exception:
                    sys.modules.pop(name, None)
        self.cache.located = world.data["located"]
        for path in world.data["files"]:
            with contextlib.suppress(SyntaxError, ValueError, OSError):
                self.cache.compiled(path, self.request["case_class"])

    def _items(self, world: World) -> None:
        found: dict[Item, list[str]] = {}
        for name, suite in self.suites.items():
            for case_id, _, _ in world.data["lists"].get(name, []):
                found.setdefault((suite, case_id), []).append(name)
        world.items = {k: tuple(v) for k, v in found.items()}

    def report(self, site: Any, reason: str) -> None:
        name = (*(site or (self.request["config"], 1, 1)), reason)
        self.unresolved[name] = None

    def stop(self, site: Any, reason: str) -> None:
        name = (*(site or (self.request["config"], 1, 1)), reason)
        self.stopped[name] = None

    def _stop(self, world: World) -> None:
        site, reason = world.data["error"]
        self.stop(site, reason)

    def ordered(self, world: World) -> list[Any]:
        return [world.data["lists"].get(name) and [e[0] for e in world.data["lists"][name]] for name in self.suites]

    # -- finding a world -------------------------------------------------------------------------------------------

    def complete(self, values: dict[str, bool], after: str, tries: int) -> tuple[World, dict[str, bool]] | None:
        """A world with `values`, guards that raise decided the other way, the last one first; None: there is none.

        Only decisions met later than `after` are guards here.
        """
        given = dict(values)
        tried: set[str] = set()
        failed: World | None = None
        changed = ""
        while True:
            world = self.run(given)
            if world.status == "ok":
                if failed is not None and failed.status == "stuck":
                    self._lost_in_loop(failed, world)
                return world, given
            if world.status in ("refused", "limit") or tries <= 0:
                return None
            self._artefact(world)
            if failed is not None and failed.data["error"] == world.data["error"]:
                del given[changed]  # that wasn't it
            elif failed is not None:
                tried.clear()
            failed, tries = world, tries - 1
            later = world.met[world.met.index(after) + 1 :] if after in world.met else [] if after else world.met
            last = [k for k in reversed(later) if k not in tried and k not in given]
            if not last:
                return None
            changed = last[0]
            given[changed] = not world.values[changed]
            if world.places[changed]:
                self.places[world.places[changed]] = given[changed]
            tried.add(changed)

    def _lost_in_loop(self, failed: World, world: World) -> None:
        if set(failed.items) - set(world.items):
            site, reason = failed.data["error"]
            self.report(site, f"a list may hold other cases: a loop whose end isn't known: {reason}")

    def _artefact(self, world: World) -> None:
        """A value that isn't known, where Python needs one that is: no outcome of the config's own."""
        site, reason = world.data["error"]
        if world.status == "raise" and "Unknown" in reason and site is not None:
            self.report(site, f"needs a value that isn't known: {reason}")

    # -- the tree of decisions -------------------------------------------------------------------------------------

    def delta(self, a: World, b: World) -> set[Item]:
        name = (id(a), id(b))
        if name not in self.deltas:
            keys = a.items.keys() | b.items.keys()
            self.deltas[name] = {k for k in keys if a.items.get(k) != b.items.get(k)}
        return self.deltas[name]

    def solve(self, context: dict[str, bool], excluded: frozenset[str], world: World) -> Node:
        """The independent groups of decisions that a context leaves open."""
        free = [k for k in world.met if k not in excluded]
        flips: dict[str, tuple[World, dict[str, bool]]] = {}
        idle = self._idle(context, excluded, world, free)
        self.sweep(context, [k for k in free if k not in idle])
        for k in free:
            if k in idle:
                continue
            found = self.complete({**context, k: not world.values[k]}, k, _REPAIRS)
            if found is not None:
                flips[k] = found
            else:
                self.guards.add(k)
                failed = self.run({**context, k: not world.values[k]})
                if failed.status == "stuck":
                    self._lost_in_loop(failed, world)
        linked = {k for m in self.merges for k in m}
        met = set(world.met)
        links: list[set[str]] = [m & set(free) for m in self.merges]
        by_item: dict[Any, str] = {}
        useful = []
        for k, (other, _) in flips.items():
            changed = self.delta(world, other)
            gained = [x for x in other.met if x not in met and x not in excluded]
            lost = {x for x in met.difference(other.met) if x in flips}
            if not (changed or gained or lost or k in linked):
                continue
            useful.append(k)
            links.append({k} | lost)
            for mark in (*changed, *gained):
                links.append({k, by_item.setdefault(mark, k)})
        useful += [k for k in free if k in linked and k not in flips]
        while True:
            groups = [g for g in _components(useful, links) if flips.keys() & set(g)]
            solved = [self._group(context, excluded, world, free, g, flips) for g in groups]
            kept = [g for g in solved if g.items]
            again = False
            seen: dict[Any, Group] = {}
            for g in kept:
                for mark in (*g.items, *g.keys):
                    first = seen.setdefault(mark, g)
                    if first is not g:
                        links.append({first.key, g.key})
                        again = True
            if not again:
                return Node(world, kept)

    def _idle(self, context: dict[str, bool], excluded: frozenset[str], world: World, free: list[str]) -> set[str]:
        """Decisions of one place that change no list when all of them are flipped; the samples check each of them."""
        linked = {k for m in self.merges for k in m}
        places: dict[str, list[str]] = {}
        for k in free:
            if world.places[k] and k not in linked:
                places.setdefault(world.places[k], []).append(k)
        out: set[str] = set()
        for keys in places.values():
            if len(keys) < _MANY:
                continue
            found = self.complete({**context, **{k: not world.values[k] for k in keys}}, keys[0], _REPAIRS)
            if found is None or self.delta(world, found[0]):
                continue
            if not self.solve(found[1], excluded | set(free), found[0]).groups:
                out |= set(keys)
        return out

    def _group(
        self,
        context: dict[str, bool],
        excluded: frozenset[str],
        world: World,
        free: list[str],
        members: list[str],
        flips: dict[str, tuple[World, dict[str, bool]]],
    ) -> Group:
        key = next(k for k in free if k in members and k in flips)
        inner = excluded | (set(free) - set(members)) | {key}
        value = world.values[key]
        other, given = flips[key]
        sides = {
            value: self.solve({**context, key: value}, inner, world),
            (not value): self.solve(given, inner, other),
        }
        items = {i for side in sides.values() for i in side.varied()} | self.delta(world, other)
        keys = {key, *members} | {k for side in sides.values() for k in side.decisions()}
        return Group(key, sides, items, keys)

    # -- checks ----------------------------------------------------------------------------------------------------

    def explore(self) -> Node | None:
        """The tree of decisions, checked on random worlds; None where no world exists."""
        started = self.complete({}, "", 4000)
        if started is None:
            return None
        world, context = started
        if len(world.met) <= _EXHAUSTIVE:
            self.merges.append(set(world.met))
        root = self.solve(context, frozenset(), world)
        if self._partners(root, context):
            root = self.solve(context, frozenset(), world)
        rng = random.Random(0)
        for attempt in range(_SAMPLES):
            keys = [k for k in self.order if k not in self.guards]
            share = (0.5, 0.5, 0.5, 0.85, 0.15)[attempt % 5] if attempt else 1.0
            flips = {k: not context.get(k, self.defaults[k]) for k in keys if rng.random() < share}
            if len(keys) < 2 or not self._differs(root, context, flips):
                continue
            while True:
                blamed = self._blame(root, context, flips)
                if blamed in self.merges:
                    self.unresolved[(self.request["config"], 1, 1, "conditions act together in a way that isn't known: "
                                     + ", ".join(self.texts[k] for k in sorted(blamed)))] = None  # fmt: skip
                    return root
                self.merges.append(blamed)
                root = self.solve(context, frozenset(), world)
                if not self._differs(root, context, flips):
                    break
        return root

    def _partners(self, root: Node, context: dict[str, bool]) -> bool:
        """Link each guard with a deciding test under whose other outcome it doesn't raise."""
        places = {root.world.places[k]: k for k in root.world.met if k in self.guards}
        found = False
        for guard in list(places.values())[:12]:
            for g in root.groups[:8]:
                both = {k: not root.world.values[k] for k in (guard, g.key)}
                if {guard, g.key} not in self.merges and self.run({**context, **both}).status == "ok":
                    self.merges.append({guard, g.key})
                    found = True
        return found

    def _differs(self, root: Node, context: dict[str, bool], flips: dict[str, bool]) -> bool:
        world = self.run({**context, **flips})
        return world.status == "ok" and world.items != root.predict({**context, **flips})

    def _blame(self, root: Node, context: dict[str, bool], flips: dict[str, bool]) -> set[str]:
        """A smallest part of `flips` under which the tree is wrong."""
        left = list(flips)
        size = max(1, len(left) // 2)
        while size:
            at = 0
            while at < len(left):
                fewer = left[:at] + left[at + size :]
                if fewer and self._differs(root, context, {k: flips[k] for k in fewer}):
                    left = fewer
                else:
                    at += size
            size //= 2
        return set(left)


def _components(keys: list[str], links: list[set[str]]) -> list[list[str]]:
    parent = {k: k for k in keys}

    def find(k: str) -> str:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for link in links:
        inside = [k for k in link if k in parent]
        for k in inside[1:]:
            parent[find(k)] = find(inside[0])
    out: dict[str, list[str]] = {}
    for k in keys:
        out.setdefault(find(k), []).append(k)
    return list(out.values())


# -- the answer ----------------------------------------------------------------------------------------------------


def merged(sequences: list[list[list[Any]]]) -> list[list[Any]]:
    """One order of all entries that keeps the order of each sequence where there is one; by line where it is free."""
    out = list({e[0]: e for e in sequences[0]}.values())
    base = {e[0] for e in out}
    for sequence in sequences[1:]:
        place = {e[0]: i for i, e in enumerate(out)}
        inside = {e[0] for e in sequence}
        at = 0
        for entry in sequence:
            if entry[0] in place:
                at = max(at, next(i for i, e in enumerate(out) if e[0] == entry[0]) + 1)
                continue
            while (
                at < len(out)
                and out[at][0] not in inside
                and (out[at][1] < entry[1] or (out[at][1] == entry[1] and out[at][0] not in base))
            ):
                at += 1
            out.insert(at, entry)
            place[entry[0]] = at
            at += 1
    return out


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Everything about one config: suites, lists, duplicates, what is unresolved, and whether it stopped early."""
    explorer = Explorer(request)
    root, exhausted = None, False
    try:
        root = explorer.explore()
    except (ExhaustedError, RecursionError):
        exhausted = True
    worlds = [w for w in explorer.runs.values() if w.status == "ok"]
    runs = list(explorer.runs.values())
    if exhausted:
        if worlds:
            reason = f"the conditions have more combinations than could be tried: stopped after {len(runs)} worlds"
        else:
            reason = f"stopped after {len(runs)} worlds, none of which comes to an end"
        explorer.stop(None, reason)
    if not worlds and runs:
        last = max((w for w in runs), key=lambda w: (w.data["error"][0] or [0, 0])[1])
        if last.status in ("raise", "stuck"):
            site, reason = last.data["error"]
            what = f"raises {reason} while it is imported" if last.status == "raise" else reason
            explorer.stop(site, f"{what}; what follows isn't reached")
        worlds = [last]
    return _Answer(explorer, root, worlds).build()


class _Answer:
    def __init__(self, explorer: Explorer, root: Node | None, worlds: list[World]) -> None:
        self.explorer, self.root, self.worlds = explorer, root, worlds
        shown: dict[str, str] = {}
        for key, text in explorer.texts.items():
            if shown.setdefault(text, key) != key:
                explorer.texts[key] = key
        self.lost = {tuple(e) for w in worlds for e in w.data["lost"]}

    def build(self) -> dict[str, Any]:
        explorer = self.explorer
        suites: dict[str, list[Any]] = {s: [] for s in explorer.suites.values()}
        lists: dict[str, list[str]] = {}
        for suite in suites:
            names = [n for n, s in explorer.suites.items() if s == suite]
            entries: dict[str, list[Any]] = {}
            for name in names:
                found = [w.data["lists"][name] for w in self.worlds if name in w.data["lists"]]
                if found:
                    distinct = list({json.dumps([e[:2] for e in f]): f for f in found}.values())
                    both = merged(distinct)
                    lists[name] = list(dict.fromkeys(e[0] for e in both))
                    first: dict[str, int] = {}
                    for e in (e for f in distinct for e in f):
                        first[e[0]] = min(e[1], first.get(e[0], e[1]))
                    for e in both:
                        entries.setdefault(e[0], [e[0], name, first[e[0]]])
            suites[suite] = [[*e, self.condition(suite, e[0], e[1])] for e in entries.values()]
        other: dict[str, list[str]] = {}
        for w in self.worlds:
            for name, ids in w.data["other"].items():
                known = other.setdefault(name, [])
                known += [i for i in dict.fromkeys(ids) if i not in known]
        self.notes()
        return {
            "suites": suites,
            "lists": lists | other,
            "other": other,
            "duplicates": self.duplicates(suites),
            "unresolved": list(explorer.unresolved),
            "stopped": list(explorer.stopped),
            "made": sorted({i for w in explorer.runs.values() for i in w.data["made"]}),
            "assumed": sorted({i for w in explorer.runs.values() for i in w.data["assumed"]}),
            "tests": len(explorer.order),
            "runs": len(explorer.runs),
        }

    def condition(self, suite: str, case_id: str, name: str) -> str | None:
        explorer, item = self.explorer, (suite, case_id)
        kept = next((how for n, how in self.lost if n == name), None)
        if self.root is not None and item in self.root.varied() | self.root.world.items.keys():
            text = describe(self.root.cubes(item), explorer.texts, explorer.order)
            return kept if text is None else text
        if all(item in w.items for w in self.worlds):
            return kept
        keys = [k for k in explorer.order]
        return f"a combination of {len(keys)} conditions, the first: {explorer.texts[keys[0]]}" if keys else kept

    def duplicates(self, suites: dict[str, list[Any]]) -> list[Any]:
        out: dict[tuple[str, str], list[Any]] = {}
        for w in self.worlds:
            for suite in suites:
                seen: dict[str, list[tuple[str, int, int]]] = {}
                for name, s in self.explorer.suites.items():
                    for case_id, line, ref in w.data["lists"].get(name, []) if s == suite else ():
                        seen.setdefault(case_id, []).append((name, line, ref))
                for case_id, places in seen.items():
                    clash = any(
                        a[2] != b[2] or a[0] == b[0] for i, a in enumerate(places[:64]) for b in places[i + 1 : 64]
                    )
                    if clash and (suite, case_id) not in out:
                        names = list(dict.fromkeys(p[0] for p in places))
                        out[suite, case_id] = [case_id, [suite], names, [p[1] for p in places]]
        where: dict[str, list[tuple[str, Any]]] = {}
        for suite, cases in suites.items():
            for c in cases:
                where.setdefault(c[0], []).append((suite, c))
        across = [
            [i, [s for s, _ in found], [c[1] for _, c in found], [c[2] for _, c in found]]
            for i, found in where.items()
            if len(found) > 1
        ]
        return [*out.values(), *across]

    def notes(self) -> None:
        explorer = self.explorer
        for w in self.worlds:
            for note in w.data["notes"]:
                explorer.report(note[:3], note[3])
        if self.root is None:
            return
        base = self.root.world
        deciding = self.root.decisions()
        for key, (kind, site) in explorer.kinds.items():
            flipped = explorer.runs.get(frozenset({(key, not explorer.defaults[key])}))
            changed = flipped is not None and explorer.ordered(flipped) != explorer.ordered(base)
            if kind == "order" and changed:
                explorer.report(site, "the order of a set, which isn't fixed, is the order of a list")
            if kind == "iter" and (key in deciding or changed):
                what = explorer.texts[key].removesuffix(" has elements")
                names = self.changed(base, flipped) or ["a list"]
                reason = f"changed in a loop over {what}, which isn't known"
                explorer.report(site, f"{', '.join(names)} may hold other cases: {reason}")

    def changed(self, base: World, flipped: World | None) -> list[str]:
        if flipped is None:
            return []
        lists, other = base.data["lists"], flipped.data["lists"]
        return [n for n in self.explorer.suites if lists.get(n, []) != other.get(n, [])]


def main() -> None:
    """Read a request as JSON from the standard input; write its answer."""
    sys.setrecursionlimit(20_000)
    gc.disable()  # the process is short, and a collection would copy each page that a fork shares
    data = answer(json.loads(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(json.dumps(data).encode())
    sys.stdout.flush()
