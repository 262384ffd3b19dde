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
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .conditions import Cube, describe
from .reading import forked, run_config
from .support import Cache
from .unknown import plain

MAX_RUNS = 6000
_EXHAUSTIVE = 6  # that few decisions are tried in all combinations
_SAMPLES = 48  # random worlds against which the result is checked
_REPAIRS = 12  # guards of one flip that are decided the other way
_MANY = 4  # so many decisions of one place are first flipped together

Item = tuple[str, str]  # suite, case id
Values = dict[str, bool]


class ExhaustedError(Exception):
    """Too many runs, or too much time."""


class World:
    """One run: its data, and the decisions that it met, with their values and places."""

    def __init__(self, data: dict[str, Any], suites: dict[str, str]) -> None:
        self.data, self.status, self.lists = data, data["status"], data["lists"]
        self.values: Values = {}
        self.places: dict[str, str] = {}
        items: dict[Item, list[str]] = {}
        for name, suite in suites.items():
            for entry in self.lists.get(name, []):
                items.setdefault((suite, entry[0]), []).append(name)
        self.items = {k: tuple(v) for k, v in items.items()}


@dataclass
class Group:
    """Decisions that belong together, by the first of them: what follows from each of its outcomes."""

    key: str
    sides: dict[bool, Node]
    items: set[Item]
    keys: set[str]


@dataclass
class Node:
    """What holds in a context: a world, and the independent groups that change it."""

    world: World
    groups: list[Group] = field(default_factory=list)

    def predict(self, values: Values) -> dict[Item, tuple[str, ...]]:
        out = dict(self.world.items)
        for g in self.groups:
            found = g.sides[values.get(g.key, self.world.values[g.key])].predict(values)
            out = {k: v for k, v in out.items() if k not in g.items} | {k: v for k, v in found.items() if k in g.items}
        return out

    def cubes(self, item: Item) -> set[Cube]:
        """Under which outcomes `item` is there."""
        for g in self.groups:
            if item in g.items:
                parts = {v: side.cubes(item) for v, side in g.sides.items()}
                if parts[False] == parts[True]:
                    return parts[True]
                return {c | {(g.key, v)} for v, cubes in parts.items() for c in cubes}
        return {frozenset()} if item in self.world.items else set()


class Explorer:
    """Finds the worlds of one config."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.suites = request, request["lists"]
        self.deadline = time.monotonic() + request["seconds"]
        self.slow = request["seconds"]
        self.cache = Cache()
        self.runs: dict[Cube, World] = {}
        self.defaults: Values = {}  # also the order in which decisions were met
        self.places: Values = {}
        self.kinds: dict[str, tuple[str, Any]] = {}
        self.merges: list[set[str]] = []
        self.guards: set[str] = set()  # those of which one outcome only ends in a world
        self.unresolved: dict[tuple[Any, ...], None] = {}
        self.stopped: dict[tuple[Any, ...], None] = {}
        self.deltas: dict[tuple[int, int], set[Item]] = {}

    def report(self, into: dict[tuple[Any, ...], None], site: Any, reason: str) -> None:
        into[tuple([*(site or (self.request["config"], 1, 1)), reason])] = None

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, values: Values) -> World:
        """The world in which `values` hold and every other decision has its default."""
        if self.named(values) not in self.runs:
            self.execute(values, [])
        return self.runs[self.named(values)]

    def named(self, values: Values) -> Cube:
        return frozenset((k, v) for k, v in values.items() if self.defaults.get(k) != v)

    def execute(self, values: Values, sweep: list[str]) -> None:
        """Run once; each of `sweep` is flipped by a fork where it is decided: nothing before runs again."""
        left = self.deadline - time.monotonic()
        if left <= 0.02 or len(self.runs) >= MAX_RUNS:
            raise ExhaustedError
        forced = {
            "forced": {**self.defaults, **values},
            "places": self.places,
            "sweep": sweep,
            "branch_seconds": self.slow,
        }
        if not self.runs:  # compiled once, here
            with contextlib.suppress(Exception):
                self.cache.compiled(self.request["config"], self.request["case_class"])
        began, first = time.monotonic(), not self.runs
        for data in forked(
            lambda: run_config({**self.request, **forced}, self.cache), left if sweep else min(left, self.slow)
        ):
            world = World(data, self.suites)
            if first:
                self.warm(data)
                self.slow = max(2.0, left / 4, 10 * (time.monotonic() - began))
            if data["prefix"]:
                data["trace"] = self.run(values).data["trace"][: data["prefix"]] + data["trace"]
            for key, kind, value, default, where, site in data["trace"]:
                self.defaults.setdefault(key, default)
                if kind:
                    self.kinds.setdefault(key, (kind, site))
                world.values[key], world.places[key] = value, where
            flipped = data["flipped"]
            context = {**values, flipped: world.values[flipped]} if flipped else values
            if self.runs.setdefault(self.named(context), world) is world and world.status in ("refused", "limit"):
                self.report(self.stopped, *data["error"])

    def warm(self, data: dict[str, Any]) -> None:
        """Load once what each run would load again."""
        self.cache.located = data["located"]
        for name in data["modules"]:
            if name.partition(".")[0] not in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3"):
                with contextlib.suppress(Exception):
                    __import__(name)
        for path in data["files"]:
            with contextlib.suppress(Exception):
                self.cache.compiled(path, self.request["case_class"])

    def complete(self, values: Values, after: str, tries: int) -> tuple[World, Values] | None:
        """A world with `values`, guards that raise decided the other way, the last one first; None: there is none.

        Only decisions met later than `after` are guards here.
        """
        given, tried, changed = dict(values), set[str](), ""
        failed: World | None = None
        while True:
            world = self.run(given)
            if world.status == "ok":
                self.loop(failed, world)
                return world, given
            if world.status in ("refused", "limit") or tries <= 0:
                return None
            site, reason = world.data["error"]
            needs = "Unknown" in reason and reason.startswith(("TypeError", "AttributeError"))
            counts = reason.startswith(("IndexError", "KeyError", "StopIteration"))
            if needs or (counts and any(self.kinds.get(k, ("",))[0] == "iter" for k in world.values)):
                self.report(
                    self.unresolved, site, f"needs a value that isn't known: {reason}"
                )  # not the config's fault
            same = failed is not None and failed.data["error"] == world.data["error"]
            if failed is not None and (same or len(world.values) <= len(failed.values)):
                del given[changed]  # that wasn't it
                world = failed
            else:
                tried.clear()
                if failed is not None and failed.places[changed]:  # what is first met there goes the same way
                    self.places[failed.places[changed]] = given[changed]
            failed, tries, met = world, tries - 1, list(world.values)
            later = met[met.index(after) + 1 :] if after in met else [] if after else met
            often = Counter(world.places.values())  # the last one first, then those of places that are met seldom
            later = [*sorted(later[:-1], key=lambda k: -often[world.places[k]]), *later[-1:]]
            changed = next((k for k in reversed(later) if k not in tried and k not in given), "")
            if not changed:
                return None
            tried.add(changed)
            given[changed] = not world.values[changed]

    def loop(self, failed: World | None, world: World) -> None:
        if failed is None or failed.status != "stuck":
            return
        if any(len(found) > len(world.lists.get(name, [])) for name, found in failed.lists.items()):
            site, reason = failed.data["error"]
            self.report(self.unresolved, site, f"a list may hold other cases: a loop whose end isn't known: {reason}")

    # -- the tree of decisions -------------------------------------------------------------------------------------

    def delta(self, a: World, b: World) -> set[Item]:
        if (id(a), id(b)) not in self.deltas:
            self.deltas[id(a), id(b)] = {k for k, _ in a.items.items() ^ b.items.items()}
        return self.deltas[id(a), id(b)]

    def solve(self, context: Values, excluded: frozenset[str], world: World) -> Node:
        """The independent groups of decisions that a context leaves open."""
        free = [k for k in world.values if k not in excluded]
        flips: dict[str, tuple[World, Values]] = {}
        linked = {k for m in self.merges for k in m}
        idle = self.idle(context, excluded, world, [k for k in free if k not in linked])
        active = [k for k in free if k not in idle]
        sweep = [k for k in active if self.named({**context, k: not world.values[k]}) not in self.runs]
        if len(sweep) > 2:
            self.execute(context, sweep)
        for k in active:
            found = self.complete({**context, k: not world.values[k]}, k, _REPAIRS)
            if found is not None:
                flips[k] = found
            else:
                self.guards.add(k)
                self.loop(self.run({**context, k: not world.values[k]}), world)
        links, first, useful = (
            [m & set(free) for m in self.merges],
            dict[Any, str](),
            [k for k in active if k in linked],
        )
        for k, (other, _) in flips.items():
            changed = self.delta(world, other)
            gained = [x for x in other.values if x not in world.values and x not in excluded]
            lost = {x for x in world.values.keys() - other.values.keys() if x in flips}
            if changed or gained or lost:
                useful += [k] if k not in linked else []
                links += [{k} | lost, *({k, first.setdefault(mark, k)} for mark in (*changed, *gained))]
        while True:
            parts = [g for g in _components(useful, links) if flips.keys() & g]
            groups = [g for g in (self.group(context, excluded, world, free, part, flips) for part in parts) if g.items]
            seen: dict[Any, Group] = {}
            pairs = [{g.key, seen.setdefault(mark, g).key} for g in groups for mark in (*g.items, *g.keys)]
            if all(len(p) == 1 for p in pairs):
                return Node(world, groups)
            links += pairs

    def idle(self, context: Values, excluded: frozenset[str], world: World, free: list[str]) -> set[str]:
        """Decisions of one place that change no list when all of them are flipped; the samples check each of them."""
        places: dict[str, list[str]] = {}
        for k in free:
            places.setdefault(world.places[k], []).append(k)
        out: set[str] = set()
        for keys in (ks for place, ks in places.items() if place and len(ks) >= _MANY):
            found = self.complete({**context, **{k: not world.values[k] for k in keys}}, keys[0], _REPAIRS)
            if found is None or self.delta(world, found[0]):
                continue
            if not self.solve(found[1], excluded | world.values.keys(), found[0]).groups:
                out |= set(keys)
        return out

    def group(self, context: Values, excluded: frozenset[str], world: World, free: list[str], members: set[str],
              flips: dict[str, tuple[World, Values]]) -> Group:  # fmt: skip
        key = next(k for k in free if k in members and k in flips)
        inner = excluded | (set(free) - members) | {key}
        value, (other, given) = world.values[key], flips[key]
        sides = {value: self.solve({**context, key: value}, inner, world), not value: self.solve(given, inner, other)}
        below = [g for side in sides.values() for g in side.groups]
        items = self.delta(world, other).union(*(g.items for g in below))
        return Group(key, sides, items, {key, *members}.union(*(g.keys for g in below)))

    def explore(self) -> Node | None:
        """The tree of decisions, checked on random worlds; None where no world exists."""
        started = self.complete({}, "", 4000)
        if started is None:
            return None
        world, context = started
        if len(world.values) <= _EXHAUSTIVE:
            self.merges.append(set(world.values))
        root = self.solve(context, frozenset(), world)
        places = {world.places[k]: k for k in world.values if k in self.guards}
        for guard in list(places.values())[:12]:  # does it only raise beside one outcome of another?
            for pair in ({guard, g.key} for g in root.groups[:8]):
                both = {k: not world.values[k] for k in pair}
                if pair not in self.merges and self.run({**context, **both}).status == "ok":
                    self.merges.append(pair)
        root = self.solve(context, frozenset(), world) if places else root
        rng = random.Random(0)
        late = self.deadline - self.request["seconds"] / 2
        for i in range(_SAMPLES):
            share = (1.0, 0.5, 0.5, 0.85, 0.5, 0.15)[i % 6] if i < 6 else rng.random()
            if i >= _SAMPLES // 6 and time.monotonic() > late:
                break
            guards = self.guards if i % 2 else ()  # most of them raise: few at a time
            shares = {k: min(share, 2 / len(guards)) if k in guards else share for k in self.defaults}
            flips = {k: not context.get(k, self.defaults[k]) for k, p in shares.items() if rng.random() < p}
            flips = {k: v for k, v in flips.items() if k in guards or k not in self.guards}
            while len(shares) > 1 and self.differs(root, context, flips):
                blamed = self.blame(root, context, flips)
                if blamed in self.merges:
                    names = ", ".join(sorted(map(plain, blamed)))
                    self.report(self.unresolved, None, f"conditions act together in a way that isn't known: {names}")
                    return root
                self.merges.append(blamed)
                root = self.solve(context, frozenset(), world)
        return root

    def differs(self, root: Node, context: Values, flips: Values) -> bool:
        world = self.run({**context, **flips})
        return world.status == "ok" and world.items != root.predict({**context, **flips})

    def blame(self, root: Node, context: Values, flips: Values) -> set[str]:
        """A smallest part of `flips` under which the tree is wrong."""
        left, size = list(flips), max(1, len(flips) // 2)
        while size:
            at = 0
            while at < len(left):
                fewer = left[:at] + left[at + size :]
                if fewer and self.differs(root, context, {k: flips[k] for k in fewer}):
                    left = fewer
                else:
                    at += size
            size //= 2
        return set(left)


def _components(keys: list[str], links: list[set[str]]) -> list[set[str]]:
    parent = {k: k for k in keys}

    def top(k: str) -> str:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    for inside in ([k for k in link if k in parent] for link in links):
        for k in inside:
            parent[top(k)] = top(inside[0])
    out: dict[str, set[str]] = {}
    for k in keys:
        out.setdefault(top(k), set()).add(k)
    return list(out.values())


# -- the answer ----------------------------------------------------------------------------------------------------


def merged(sequences: list[list[Any]]) -> list[Any]:
    """One order of all entries that keeps that of each sequence where there is one; by line where it is free."""
    out = list({e[0]: e for e in sequences[0]}.values())
    base = {e[0] for e in out}
    for sequence in sequences[1:]:
        inside, at = {e[0] for e in sequence}, 0
        for entry in sequence:
            place = next((i for i, e in enumerate(out) if e[0] == entry[0]), None)
            if place is not None:
                at = max(at, place + 1)
                continue
            while at < len(out) and out[at][0] not in inside and (out[at][1], out[at][0] in base) < (entry[1], True):
                at += 1
            out.insert(at, entry)
            at += 1
    return out


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Everything about one config: suites, lists, duplicates, what is unresolved, and whether it stopped early."""
    explorer, root = Explorer(request), None
    try:
        root = explorer.explore()
    except (ExhaustedError, RecursionError):
        reason = f"more combinations of conditions than could be tried: stopped after {len(explorer.runs)} worlds"
        explorer.report(explorer.stopped, None, reason)
    runs = list(explorer.runs.values())
    worlds = [w for w in runs if w.status == "ok"]
    if not worlds and runs:
        worlds = [max(runs, key=lambda w: (w.data["error"][0] or [0, 0])[1])]
        site, reason = worlds[0].data["error"]
        raised = f"raises {reason} while it is imported" if worlds[0].status == "raise" else reason
        if worlds[0].status in ("raise", "stuck"):
            explorer.report(explorer.stopped, site, f"{raised}; what follows isn't reached")
    suites, lists = _suites(explorer, root, worlds)
    _notes(explorer, root, worlds)
    other: dict[str, dict[str, None]] = {}
    for name, ids in (pair for w in worlds for pair in w.data["other"].items()):
        other.setdefault(name, {}).update(dict.fromkeys(ids))
    return {
        "suites": suites, "lists": lists, "other": {n: list(ids) for n, ids in other.items()},
        "duplicates": _duplicates(explorer, suites, worlds),
        "unresolved": list(explorer.unresolved), "stopped": list(explorer.stopped),
        "made": sorted({i for w in runs for i in w.data["made"]}), "tests": len(explorer.defaults), "runs": len(runs),
        "assumed": sorted({i for w in runs for i in w.data["assumed"]}),
    }  # fmt: skip


def _suites(explorer: Explorer, root: Node | None, worlds: list[World]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    order = {k: i for i, k in enumerate(explorer.defaults)}
    texts = {k: plain(k) for k in order}
    if len(set(texts.values())) < len(texts):
        texts = {k: plain(k, full=True) for k in order}
    lost = {n: how for w in worlds for n, how in w.data["lost"]}
    everything = f"a combination of {len(order)} conditions, the first: {next(iter(texts.values()), '')}"
    lists: dict[str, list[str]] = {}
    suites: dict[str, dict[str, list[Any]]] = {s: {} for s in explorer.suites.values()}
    for name, suite in explorer.suites.items():
        found = [w.lists[name] for w in worlds if name in w.lists]
        distinct = list({json.dumps([e[:2] for e in f]): f for f in found}.values())
        for case_id, *_ in merged(distinct) if distinct else ():
            text = describe(root.cubes((suite, case_id)), texts, order) if root is not None else None
            if root is None and not all((suite, case_id) in w.items for w in worlds):
                text = everything
            line = min(e[1] for f in distinct for e in f if e[0] == case_id) if len(distinct) > 1 else _[0]
            suites[suite].setdefault(case_id, [case_id, name, line, text or lost.get(name)])
            lists.setdefault(name, []).append(case_id)
        if found:
            lists.setdefault(name, [])
    return {s: list(cases.values()) for s, cases in suites.items()}, lists


def _duplicates(explorer: Explorer, suites: dict[str, list[Any]], worlds: list[World]) -> list[Any]:
    out: dict[Item, list[Any]] = {}
    for w in worlds:
        places: dict[Item, list[list[Any]]] = {}
        for name, suite in explorer.suites.items():
            for case_id, line, number in w.lists.get(name, []):
                places.setdefault((suite, case_id), []).append([name, line, number])
        for item, p in places.items():  # one object in two lists of a suite is no duplicate
            if len(p) > 1 and any(a[2] != b[2] or a[0] == b[0] for i, a in enumerate(p[:64]) for b in p[i + 1 : 64]):
                out.setdefault(item, [item[1], [item[0]], list(dict.fromkeys(n for n, _, _ in p)), [x[1] for x in p]])
    where: dict[str, list[Any]] = {}
    for suite, cases in suites.items():
        for c in cases:
            where.setdefault(c[0], []).append((suite, c[1], c[2]))
    return [*out.values(), *([i, *map(list, zip(*found, strict=True))] for i, found in where.items() if len(found) > 1)]


def _notes(explorer: Explorer, root: Node | None, worlds: list[World]) -> None:
    for note in (n for w in worlds for n in w.data["notes"]):
        explorer.report(explorer.unresolved, note[:3], note[3])
    if root is None:
        return
    base = root.world
    for key, (kind, site) in explorer.kinds.items():
        flipped = explorer.runs.get(explorer.named({key: not base.values.get(key, explorer.defaults[key])}))
        ids = [[(n, [e[0] for e in w.lists.get(n, [])]) for n in explorer.suites] for w in (base, flipped or base)]
        names = [a for (a, x), (_, y) in zip(*ids, strict=True) if x != y]
        deciding = any(key in g.keys for g in root.groups)
        if kind == "order" and names:
            explorer.report(explorer.unresolved, site, f"the {plain(key)}, which isn't fixed, is the order of a list")
        if kind == "iter" and (deciding or names):
            what = f"changed in a loop over {plain(key).removesuffix(' has elements')}, which isn't known"
            explorer.report(explorer.unresolved, site, f"{', '.join(names) or 'a list'} may hold other cases: {what}")


def main() -> None:
    """Read a request as JSON from the standard input; write its answer."""
    sys.setrecursionlimit(20_000)
    gc.disable()  # the process is short, and a collection would copy each page that a fork shares
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
