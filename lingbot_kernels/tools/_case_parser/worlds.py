"""Which outcomes of the unknown tests decide which cases.

Each decision is flipped alone. A list's case depends on no decision until a world shows that it does; then a search
finds the decision, and the case's condition is read off all outcomes of those that it depends on. Runs in the child
interpreter; each run of the config is a forked process (`reading`). The answer is JSON data.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from .conditions import Cube, describe
from .modules import located
from .reading import forked, run_config
from .rewrite import compiled
from .unknown import plain

MAX_RUNS, MAX_LEAVES = 6000, 1000  # worlds of a config, of a case's condition
_FEW, _EXHAUSTIVE = 12, 100  # of that few decisions, so many worlds are all tried
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
        self.data, self.status, self.lists, self.error = data, data["status"], data["lists"], data["error"]
        self.values: Values = {}
        self.places: dict[str, str] = {}
        self.items: dict[Item, tuple[str, ...]] = {}  # with the lists that have it
        for name, suite in suites.items():
            for case_id, *_ in self.lists.get(name, []):
                self.items[suite, case_id] = (*self.items.get((suite, case_id), ()), name)


class Explorer:
    """Finds the worlds of one config."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.suites = request, request["lists"]
        self.deadline = time.monotonic() + request["seconds"]
        self.slow = request["seconds"]  # the most that one run takes
        self.runs: dict[Cube, World] = {}
        self.unchecked: list[Cube] = []
        self.defaults: Values = {}  # also the order in which decisions were met
        self.places: Values = {}
        self.kinds: dict[str, tuple[str, Any]] = {}
        self.visited: set[str] = set()
        self.guards: dict[str, str] = {}  # of which one outcome only ends in a world, with their places
        self.needs: defaultdict[Item, set[str]] = defaultdict(set)  # the decisions on which a case depends
        self.blockers: defaultdict[str, set[str]] = defaultdict(set)  # those on which it depends whether one is met
        self.unresolved: dict[tuple[Any, ...], None] = {}
        self.stopped: dict[tuple[Any, ...], None] = {}

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
        left, first, began = self.deadline - time.monotonic(), not self.runs, time.monotonic()
        if left <= 0.02 or len(self.runs) >= MAX_RUNS:
            raise ExhaustedError
        request = {**self.request, "forced": {**self.defaults, **values}, "places": self.places, "sweep": sweep}
        request["branch_seconds"] = self.slow
        self.compile([self.request["config"]])
        for data in forked(lambda: run_config(request), left if sweep else min(left, self.slow)):
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
            if self.runs.setdefault(self.named(context), world) is world:
                self.unchecked.append(self.named(context))
                if world.status in ("refused", "limit"):
                    self.report(self.stopped, *world.error)

    def compile(self, files: Iterable[str]) -> None:
        for path in files:
            with contextlib.suppress(Exception):  # which the run meets as well, and reports
                compiled(path, self.request["case_class"])

    def warm(self, data: dict[str, Any]) -> None:
        """Load once what each run would load again."""
        located.update(data["located"])
        self.compile(data["files"])
        for name in data["modules"]:
            if name.partition(".")[0] not in ("antigravity", "this", "idlelib", "turtledemo", "lib2to3"):
                with contextlib.suppress(Exception):
                    __import__(name)

    def complete(self, values: Values, after: str, tries: int) -> tuple[World, Values] | None:
        """A world with `values`, guards that raise decided the other way, the last one first; None: there is none.

        Only decisions met later than `after` are guards here.
        """
        given, tried, changed = dict(values), set[str](), ""
        failed: World | None = None
        while True:
            world = self.run(given)
            if world.status == "ok":
                self.report_loop(failed, world)
                return world, given
            if world.status in ("refused", "limit") or tries <= 0:
                return None
            site, reason = world.error
            needs = "Unknown" in reason and reason.startswith(("TypeError", "AttributeError"))
            counts = reason.startswith(("IndexError", "KeyError", "StopIteration"))
            if needs or (counts and any(self.kinds.get(k, ("",))[0] == "iter" for k in world.values)):
                self.report(self.unresolved, site, f"needs a value that isn't known: {reason}")
            if failed is not None and (failed.error == world.error or len(world.values) <= len(failed.values)):
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

    def report_loop(self, failed: World | None, world: World) -> None:
        if failed is None or failed.status != "stuck":
            return
        if any(len(found) > len(world.lists.get(name, [])) for name, found in failed.lists.items()):
            site, reason = failed.error
            self.report(self.unresolved, site, f"a list may hold other cases: a loop whose end isn't known: {reason}")

    # -- what decides a case ---------------------------------------------------------------------------------------

    def explore(self) -> bool:
        """Find what each case depends on, and check it on random worlds; False where no world exists."""
        started = self.complete({}, "", 4000)
        if started is None:
            return False
        world, guards = started
        self.defaults.update(guards)  # the first world is that of the defaults
        self.runs, self.unchecked = {frozenset(): world}, []
        todo: list[tuple[Values, World]] = [({}, world)]
        for context, met in todo:
            todo += self.visit(context, met)
        self.check()
        late = self.deadline - self.request["seconds"] / 2
        for i, flips in enumerate(self.trials()):
            if i < _SAMPLES // 6 or time.monotonic() < late:
                self.run(flips)
        self.check()
        return True

    def visit(self, context: Values, world: World) -> Iterator[tuple[Values, World]]:
        """Flip each decision that is first met in a world; gives the worlds that meet others."""
        fresh = [k for k in world.values if k not in self.visited]
        self.visited.update(fresh)
        self.blockers.update((k, set(context)) for k in fresh)
        idle = self.idle(context, world, fresh)
        flips = {k: {**context, k: not world.values[k]} for k in fresh if k not in idle}
        if sum(self.named(values) not in self.runs for values in flips.values()) > 2:
            self.execute(context, list(flips))
        for k, values in flips.items():
            found = self.complete(values, k, _REPAIRS)
            if found is None:
                self.guards[k] = world.places[k]
                self.report_loop(self.run(values), world)
                continue
            for lost in world.values.keys() - found[0].values.keys() - idle:
                self.blockers[lost].add(k)
            yield found[1], found[0]

    def idle(self, context: Values, world: World, keys: Iterable[str]) -> set[str]:
        """Decisions of one place that change no list when all of them are flipped; the trials check each of them."""
        places: defaultdict[str, list[str]] = defaultdict(list)
        for k in keys:
            places[world.places[k]].append(k)
        out: set[str] = set()
        for same in [ks for place, ks in places.items() if place and len(ks) >= _MANY][::-1]:
            found = self.complete({**context, **{k: not world.values[k] for k in same}}, same[0], _REPAIRS)
            if found is None or found[0].items != world.items or world.values.keys() - found[0].values.keys() - out:
                continue
            gained = found[0].values.keys() - world.values.keys()
            if self.idle(found[1], found[0], [k for k in found[0].values if k in gained]) == gained:
                out |= {*same, *gained}
                self.visited |= gained
        return out

    def trials(self) -> Iterator[Values]:
        """Worlds on which the result is checked: all of them where they are few, and random ones."""
        todo: list[tuple[Values, set[str]]] = [({}, set())] if len(self.defaults) <= _FEW else []
        for flips, decided in todo:
            yield flips
            for k, value in self.run(flips).values.items():
                if k not in decided and len(todo) < _EXHAUSTIVE:
                    decided = decided | {k}
                    todo.append(({**flips, k: not value}, decided))
        deciding = [k for k in self.defaults if any(k in needs for needs in self.needs.values())]
        for guard in list({place: k for k, place in self.guards.items()}.values())[:12]:
            for k in deciding[:8]:  # does it only raise beside one outcome of another?
                yield {guard: not self.defaults[guard], k: not self.defaults[k]}
        rng = random.Random(0)
        for i in range(_SAMPLES):
            share = (1.0, 0.5, 0.5, 0.85, 0.5, 0.15)[i] if i < 6 else rng.random()
            rare = min(share, 2 / max(len(self.guards), 1)) if i % 2 else 0  # most guards raise: few at a time
            yield {k: not v for k, v in self.defaults.items() if rng.random() < (rare if k in self.guards else share)}

    def check(self) -> None:
        """Have each case depend on what it takes to foretell it in every world."""
        while self.unchecked:
            self.unchecked.sort(key=len, reverse=True)  # those with few flips first
            flips = dict(self.unchecked.pop())
            world, base = self.run(flips), self.run({})
            flips = {k: v for k, v in flips.items() if k in world.values}  # the others say nothing
            self.runs.setdefault(self.named(flips), world)
            changed = {item for item, _ in world.items.items() ^ base.items.items()}
            concerned = {item for item, needs in self.needs.items() if needs & flips.keys()}
            for item in sorted(changed | concerned) if world.status == "ok" else ():
                while self.at(item, self.known(item, flips)) != world.items.get(item):
                    self.needs[item] |= self.cause(item, flips)

    def cause(self, item: Item, flips: Values) -> set[str]:
        """A decision that makes a difference between what is foretold and what is."""
        low = self.known(item, flips)
        path = [k for k in self.defaults if k in flips and k not in low]
        start, first, last = self.at(item, low), 0, len(path)
        while last - first > 1:
            middle = (first + last) // 2
            same = self.at(item, {**low, **{k: flips[k] for k in path[:middle]}}) == start
            first, last = (middle, last) if same else (first, middle)
        return {path[first]} | self.blockers[path[first]]

    def known(self, item: Item, flips: Values) -> Values:
        return {k: v for k, v in flips.items() if k in self.needs.get(item, ())}

    def at(self, item: Item, values: Values) -> Any:
        """The lists that have a case in a world; None: none of them, False: it is no world."""
        world = self.run(values)
        return world.items.get(item) if world.status == "ok" else False

    def cubes(self, item: Item, flips: Values, decided: set[str], leaves: Iterator[int]) -> set[Cube] | None:
        """Under which outcomes a case is there; None where there is no world."""
        world, needs = self.run(flips), self.needs.get(item, set())
        key = next((k for k in world.values if k in needs and k not in decided), None)
        if key is None:
            if next(leaves) > MAX_LEAVES:
                raise ExhaustedError
            return None if world.status != "ok" else {frozenset()} if item in world.items else set()
        value = world.values[key]
        same = self.cubes(item, flips, decided | {key}, leaves)
        other = self.cubes(item, {**flips, key: not value}, decided | {key}, leaves)
        if same is None or other is None or same == other:
            return other if same is None else same
        return {c | {(key, v)} for v, cubes in ((value, same), (not value, other)) for c in cubes}

    def condition(self, item: Item, texts: dict[str, str], worlds: list[World]) -> str | None:
        """The text of a case's condition; None where it is always there."""
        needs = [k for k in texts if k in self.needs.get(item, ())]
        try:
            cubes = self.cubes(item, {}, set(), itertools.count())
            text = describe(cubes or set(), texts, {k: i for i, k in enumerate(texts)})
            if text is not None or all(item in w.items for w in worlds):
                return text
        except (ExhaustedError, RecursionError):
            self.exhausted()
        return f"a combination of {len(needs or texts)} conditions, the first: {texts[[*needs, *texts][0]]}"

    def exhausted(self) -> None:
        """Report it before what the last runs ran into, which follows from it."""
        earlier, self.stopped = self.stopped, {}
        if not any("combinations" in reason for *_, reason in earlier):
            reason = f"more combinations of conditions than could be tried: stopped after {len(self.runs)} worlds"
            self.report(self.stopped, None, reason)
        self.stopped |= earlier


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
    explorer = Explorer(request)
    try:
        explorer.explore()
    except (ExhaustedError, RecursionError):
        explorer.exhausted()
    runs = list(explorer.runs.values())
    worlds = [w for w in runs if w.status == "ok"]
    if not worlds and runs:
        worlds = [max(runs, key=lambda w: (w.error[0] or [0, 0])[1])]
        site, reason = worlds[0].error
        raised = f"raises {reason} while it is imported" if worlds[0].status == "raise" else reason
        if worlds[0].status in ("raise", "stuck"):
            explorer.report(explorer.stopped, site, f"{raised}; what follows isn't reached")
    suites, lists = _suites(explorer, worlds)
    _notes(explorer, worlds)
    other: dict[str, dict[str, None]] = {}
    for name, ids in (pair for w in worlds for pair in w.data["other"].items()):
        other.setdefault(name, {}).update(dict.fromkeys(ids))
    return {
        "suites": suites, "lists": lists, "other": {n: list(ids) for n, ids in other.items()},
        "duplicates": _duplicates(explorer, suites, worlds),
        "unresolved": list(explorer.unresolved), "stopped": list(explorer.stopped),
        "made": sorted({i for w in runs for i in w.data["made"]}), "tests": len(explorer.defaults), "worlds": len(runs),
        "assumed": sorted({i for w in runs for i in w.data["assumed"]}),
    }  # fmt: skip


def _suites(explorer: Explorer, worlds: list[World]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    texts = {k: plain(k) for k in explorer.defaults}
    if len(set(texts.values())) < len(texts):
        texts = {k: plain(k, full=True) for k in texts}
    lost = {n: how for w in worlds for n, how in w.data["lost"]}
    lists: dict[str, list[str]] = {}
    suites: dict[str, dict[str, list[Any]]] = {s: {} for s in explorer.suites.values()}
    for name, suite in explorer.suites.items():
        found = [w.lists[name] for w in worlds if name in w.lists]
        distinct = list({json.dumps([e[:2] for e in f]): f for f in found}.values())
        for case_id, *_ in merged(distinct) if distinct else ():
            text = explorer.condition((suite, case_id), texts, worlds) if worlds[0].status == "ok" else None
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


def _notes(explorer: Explorer, worlds: list[World]) -> None:
    for note in (n for w in worlds for n in w.data["notes"]):
        explorer.report(explorer.unresolved, note[:3], note[3])
    base = explorer.runs.get(frozenset(), worlds[0])
    for key, (kind, site) in explorer.kinds.items():
        flipped = explorer.runs.get(frozenset({(key, not explorer.defaults[key])}), base)
        ids = [[(n, [e[0] for e in w.lists.get(n, [])]) for n in explorer.suites] for w in (base, flipped)]
        names = [a for (a, x), (_, y) in zip(*ids, strict=True) if x != y]
        if kind == "order" and names:
            explorer.report(explorer.unresolved, site, f"the {plain(key)}, which isn't fixed, is the order of a list")
        if kind == "iter" and (names or any(key in needs for needs in explorer.needs.values())):
            what = f"changed in a loop over {plain(key).removesuffix(' has elements')}, which isn't known"
            explorer.report(explorer.unresolved, site, f"{', '.join(names) or 'a list'} may hold other cases: {what}")


def main() -> None:
    """Read a request as JSON from the standard input; write its answer."""
    sys.setrecursionlimit(20_000)
    gc.disable()  # the process is short, and a collection would copy each page that a fork shares
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
