"""From an evaluated config to its cases, with conditions, duplicates and everything that stayed unresolved."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .conditions import ALWAYS, NEVER, Cond
from .evaluator import Evaluator, parse_source, read_source
from .limits import LimitReachedError, SourceError
from .values import (
    ABSENT,
    Choice,
    DictV,
    EnumMember,
    Instance,
    ListV,
    Maybe,
    Opaque,
    Site,
    TupleV,
    Unknown,
    Value,
)

_MAX_REPEATS = 64  # an id repeated more often is a duplicate, whatever the conditions


@dataclass(frozen=True)
class Unresolved:
    """Something that could hide a case: where it is (line and column from 1), its source line, and why."""

    file: str
    line: int
    column: int
    source: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """An id declared more than once, in one suite (kept once) or in several."""

    id: str
    suites: list[str]
    lists: list[str]
    lines: list[int]


@dataclass(frozen=True)
class ParsedCase:
    """A case: `line` is of the config; `condition` is None where it always exists."""

    id: str
    list: str
    line: int
    condition: str | None


@dataclass
class ParsedConfig:
    """What a config declares. `tests`: how many tests were met whose outcome isn't known."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    suites: dict[str, list[ParsedCase]] = field(default_factory=dict)
    other_lists: dict[str, list[str]] = field(default_factory=dict)
    unresolved: list[Unresolved] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    readable: bool = True
    tests: int = 0


@dataclass
class _Entry:
    """One occurrence of a case in a list."""

    id: str
    list: str
    line: int
    cond: Cond
    obj: Instance


class Collector:
    """Evaluates one config and reads its suite lists; statements can be added to it afterwards."""

    def __init__(
        self,
        list_to_suite: Mapping[str, str],
        *,
        case_class: str,
        id_param: str,
        root: Path | None = None,
    ) -> None:
        self.list_to_suite = dict(list_to_suite)
        self.evaluator = Evaluator(case_class=case_class, id_param=id_param, root=root)
        self.started = False

    def run(self, tree: ast.Module, path: Path | None, text: str) -> None:
        """Evaluate the config's module body."""
        self.evaluator.run_main(tree, path, text)
        self.started = True

    def run_more(self, statements: list[ast.stmt]) -> None:
        """Evaluate further top-level statements in the state reached so far."""
        if not self.started:
            self.run(ast.Module(body=[], type_ignores=[]), None, "")
        self.evaluator.run_statements(statements)

    # -- reading the lists -----------------------------------------------------------------------------------------

    def config(self) -> ParsedConfig:
        """The cases as they are now."""
        out = ParsedConfig(suites={suite: [] for suite in self.list_to_suite.values()})
        main = self.evaluator.main
        if main is None:
            return out
        before = dict(self.evaluator.reports)
        try:
            self._read(out, main.ns.vars)
        except (LimitReachedError, RecursionError) as e:
            self.evaluator.report(Site(main, ast.Pass()), f"the cases can't be listed: {e or 'nested too deeply'}")
        out.unresolved = self._unresolved()
        out.tests = self.evaluator.conditions.count
        self.evaluator.reports = before
        return out

    def _read(self, out: ParsedConfig, names: dict[str, Value]) -> None:
        by_list: dict[str, list[_Entry]] = {}
        for name in self.list_to_suite:
            if name in names:
                by_list[name] = self._entries(name, names[name])
        for suite in dict.fromkeys(self.list_to_suite.values()):
            lists = [n for n, s in self.list_to_suite.items() if s == suite and n in by_list]
            out.suites[suite] = self._suite(suite, [e for n in lists for e in by_list[n]], out)
        for name, value in names.items():
            if name in by_list or not self._holds_cases(value):
                continue
            reports = dict(self.evaluator.reports)  # of no suite's concern
            by_list[name] = self._entries(name, value)
            self.evaluator.reports = reports
        taken = {c.id for cases in out.suites.values() for c in cases}
        for name, entries in by_list.items():
            out.lists[name] = list(dict.fromkeys(e.id for e in entries))
            if name not in self.list_to_suite and any(e.id not in taken for e in entries):
                out.other_lists[name] = out.lists[name]
        self._across_suites(out)

    def _holds_cases(self, value: Value) -> bool:
        values = [v for _, v in value.alts] if isinstance(value, Choice) else [value]
        for v in values:
            for item in v.items if isinstance(v, (ListV, TupleV)) else ():
                inner = item.value if isinstance(item, Maybe) else item
                if isinstance(inner, Instance) and self.evaluator.is_case_class(inner.cls):
                    return True
        return False

    def _entries(self, name: str, value: Value) -> list[_Entry]:
        ev = self.evaluator
        alts = value.alts if isinstance(value, Choice) else [(ALWAYS, value)]
        sequences = [(c, [] if v is ABSENT else self._items(name, v)) for c, v in alts]
        items = sequences[0][1] if len(sequences) == 1 else ev.merge_sequences(sequences)
        out: list[_Entry] = []
        for item in items:
            self._item(name, item, ALWAYS, out)
        return out

    def _items(self, name: str, value: Value) -> list[Value]:
        ev = self.evaluator
        if isinstance(value, (ListV, TupleV)):
            return list(value.items)
        if isinstance(value, Unknown):
            ev.report(value.site, f"{name} isn't resolved: {value.reason}")
            return ev.old_items(value)
        if isinstance(value, DictV):
            self._at_end(f"{name} is a dict or set, not a list of cases")
            return [k for k in ev.keys(value) if isinstance(k, (Instance, Maybe, Opaque))]
        self._at_end(f"{name} isn't a list of cases")
        return []

    def _at_end(self, reason: str) -> None:
        ev = self.evaluator
        assert ev.main is not None
        ev.report(Site(ev.main, ast.Pass()), reason)

    def _item(self, name: str, item: Value, cond: Cond, out: list[_Entry]) -> None:
        ev = self.evaluator
        if cond == NEVER or ev.decide(cond) is False:
            return
        if isinstance(item, Maybe):
            self._item(name, item.value, ev.conditions.both(cond, item.cond), out)
        elif isinstance(item, Choice):
            for c, v in item.alts:
                self._item(name, v, ev.conditions.both(cond, c), out)
        elif isinstance(item, Opaque):
            ev.report(item.site, f"{name} may hold other cases: {item.reason}")
        elif isinstance(item, Unknown):
            ev.report(item.site, f"an element of {name} isn't resolved: {item.reason}")
            for old in ev.old_items(item):
                self._item(name, old, cond, out)
        elif isinstance(item, Instance) and ev.is_case_class(item.cls):
            self._case(name, item, cond, out)
        elif isinstance(item, Instance):
            ev.report(item.site, f"an element of {name} is a {item.cls.name}, not a {ev.case_class_name}")
        else:
            self._at_end(f"an element of {name} is a {type(item).__name__}, not a {ev.case_class_name}")

    def _case(self, name: str, case: Instance, cond: Cond, out: list[_Entry]) -> None:
        ev = self.evaluator
        if case.taint is not None and not any(s == case.taint.site for s, _ in ev.reports.values()):
            ev.report(case.taint.site, f"a case of {name} may have another id: {case.taint.reason}")
        held = case.ns.vars.get(ev.id_param, ABSENT)
        for c, value in held.alts if isinstance(held, Choice) else [(ALWAYS, held)]:
            if isinstance(value, EnumMember) and value.cls.mixin is not None:
                value = value.value
            both = ev.conditions.both(cond, c)
            if ev.decide(both) is False:
                continue
            if isinstance(value, str):
                out.append(_Entry(value, name, case.line, both, case))
            elif isinstance(value, Unknown):
                ev.report(case.site, f"the id of a case of {name} isn't resolved: {value.reason}")
            elif value is ABSENT:
                ev.report(case.site, f"a case of {name} has no {ev.id_param!r}")
            else:
                ev.report(case.site, f"the id of a case of {name} is a {type(value).__name__}, not a string")
                if isinstance(value, (int, float)):
                    out.append(_Entry(str(value), name, case.line, both, case))

    # -- suites ----------------------------------------------------------------------------------------------------

    def _suite(self, suite: str, entries: list[_Entry], out: ParsedConfig) -> list[ParsedCase]:
        conditions = self.evaluator.conditions
        kept: dict[str, _Entry] = {}
        groups: dict[str, list[_Entry]] = {}
        clash: set[str] = set()
        for e in entries:
            group = groups.setdefault(e.id, [])
            first = kept.get(e.id)
            if first is None:
                kept[e.id] = _Entry(e.id, e.list, e.line, e.cond, e.obj)
            else:
                if len(group) > _MAX_REPEATS:
                    clash.add(e.id)
                for other in group if e.id not in clash else ():
                    shared = other.obj is e.obj and other.list != e.list
                    overlap = conditions.both(conditions.both(other.cond, e.cond), self.evaluator.path)
                    if not shared and overlap != NEVER:
                        clash.add(e.id)
                first.cond = conditions.either(first.cond, e.cond)
            group.append(e)
        for case_id in kept:
            if case_id in clash:
                group = groups[case_id]
                lists = list(dict.fromkeys(e.list for e in group))
                out.duplicates.append(Duplicate(case_id, [suite], lists, [e.line for e in group]))
        return [ParsedCase(e.id, e.list, e.line, self._text(e.cond)) for e in kept.values()]

    def _text(self, cond: Cond) -> str | None:
        ev = self.evaluator
        return None if ev.decide(cond) else ev.conditions.describe(cond)

    def _across_suites(self, out: ParsedConfig) -> None:
        places: dict[str, list[tuple[str, ParsedCase]]] = {}
        for suite, cases in out.suites.items():
            for c in cases:
                places.setdefault(c.id, []).append((suite, c))
        for case_id, found in places.items():
            if len(found) > 1:
                suites = [s for s, _ in found]
                out.duplicates.append(
                    Duplicate(case_id, suites, [c.list for _, c in found], [c.line for _, c in found])
                )

    # -- reports ---------------------------------------------------------------------------------------------------

    def _unresolved(self) -> list[Unresolved]:
        out = []
        for site, reason in self.evaluator.reports.values():
            line = getattr(site.node, "lineno", 1)
            lines = site.module.lines
            source = lines[line - 1].strip()[:200] if 0 < line <= len(lines) else ""
            out.append(Unresolved(site.module.path, line, getattr(site.node, "col_offset", 0) + 1, source, reason))
        return sorted(out, key=lambda u: (u.file, u.line, u.column, u.reason))


def parse_config(
    path: Path,
    list_to_suite: Mapping[str, str],
    *,
    case_class: str,
    id_param: str,
    root: Path | None = None,
) -> ParsedConfig:
    """Parse a config file. An unreadable one gives no cases and says why; a missing one raises `OSError`."""
    try:
        text = read_source(path)
        tree = parse_source(text, str(path))
    except SourceError as e:
        suites: dict[str, list[ParsedCase]] = {s: [] for s in list_to_suite.values()}
        return ParsedConfig(
            suites=suites,
            unresolved=[Unresolved(str(path), e.line, e.column, e.source, e.reason)],
            readable=False,
        )
    collector = Collector(list_to_suite, case_class=case_class, id_param=id_param, root=root)
    collector.run(tree, path, text)
    return collector.config()


@dataclass
class StandaloneData:
    """Standalone test files of a run-suite file and their estimates, by suite."""

    files: dict[str, list[str]] = field(default_factory=dict)
    est_times: dict[str, dict[str, float]] = field(default_factory=dict)
    unresolved: list[Unresolved] = field(default_factory=list)


def parse_standalone(path: Path, *, case_class: str, id_param: str, root: Path | None = None) -> StandaloneData:
    """``STANDALONE_FILES`` and ``STANDALONE_FILE_EST_TIMES`` of a run-suite file, imports inside the tree followed.

    Raises `OSError` for a missing file, `SourceError` for one that isn't Python.
    """
    text = read_source(path)
    tree = parse_source(text, str(path))
    collector = Collector({}, case_class=case_class, id_param=id_param, root=root)
    collector.run(tree, path, text)
    ev = collector.evaluator
    out = StandaloneData()
    names = ev.main.ns.vars if ev.main is not None else {}
    for suite, value in _dict_items(collector, names.get("STANDALONE_FILES", ABSENT), "STANDALONE_FILES"):
        known = out.files.setdefault(suite, [])
        for item in ev.sequence(value, ast.Pass()) if isinstance(value, (ListV, TupleV)) else [value]:
            item = item.value if isinstance(item, Maybe) else item
            if isinstance(item, str):
                known += [item] if item not in known else []
            else:
                collector._at_end(f"a standalone file of suite {suite} isn't resolved")
    for suite, value in _dict_items(
        collector, names.get("STANDALONE_FILE_EST_TIMES", ABSENT), "STANDALONE_FILE_EST_TIMES"
    ):
        times = out.est_times.setdefault(suite, {})
        for file, seconds in _dict_items(collector, value, f"the estimates of suite {suite}"):
            if isinstance(seconds, (int, float)):
                times[file] = float(seconds)
            else:
                collector._at_end(f"the estimate of {file} isn't resolved")
    shown = (f"stopped: {e}" for e in [ev.stopped] if e is not None)
    for reason in shown:
        collector._at_end(reason)
    relevant = ("STANDALONE", "standalone", "estimate", "stopped", "isn't reached", "star import")
    out.unresolved = [u for u in collector._unresolved() if any(word in u.reason for word in relevant)]
    return out


def _dict_items(collector: Collector, value: Value, name: str) -> list[tuple[str, Value]]:
    out: list[tuple[str, Value]] = []
    alts: list[Any] = [v for _, v in value.alts] if isinstance(value, Choice) else [value]
    for v in alts:
        if v is ABSENT:
            continue
        if not isinstance(v, DictV):
            reason = v.reason if isinstance(v, Unknown) else "it isn't a dict"
            collector._at_end(f"{name} isn't resolved: {reason}")
            continue
        if v.opaque is not None:
            collector._at_end(f"{name} may hold more: {v.opaque.reason}")
        for key, held in v.entries.values():
            leaves = [x for _, x in held.alts if x is not ABSENT] if isinstance(held, Choice) else [held]
            out += [(str(key), leaf) for leaf in leaves]
    return out


def as_json(items: list[Any]) -> list[dict[str, Any]]:
    return [asdict(i) for i in items]
