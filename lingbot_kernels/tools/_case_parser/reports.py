"""Executed cases from the reports of CI jobs: JSON execution reports and JUnit XML."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STANDALONE_PREFIX = "standalone:"
_MAX_REPORT_BYTES = 64_000_000


@dataclass
class Executed:
    """Case ids that ran: by suite where the report says so, else how often each was seen; and those in error."""

    by_suite: dict[str, set[str]] = field(default_factory=dict)
    anywhere: Counter[str] = field(default_factory=Counter)
    errors: dict[str, None] = field(default_factory=dict)
    files: int = 0
    problems: list[str] = field(default_factory=list)

    def missing(self, expected: dict[str, list[str]]) -> dict[str, list[str]]:
        """Expected ids that didn't run, by suite. A run in a report without a suite counts for one suite."""
        left, out = Counter(self.anywhere), dict[str, list[str]]()
        for suite, ids in expected.items():
            for case_id in (i for i in ids if i not in self.by_suite.get(suite, ())):
                if left[case_id] > 0:
                    left[case_id] -= 1
                else:
                    out.setdefault(suite, []).append(case_id)
        return out

    def broken(self) -> list[str]:
        """Cases that ended in an error of their set-up or teardown and have no run."""
        ran = set(self.anywhere).union(*self.by_suite.values())
        return [i for i in self.errors if i not in ran]

    def unexpected(self, known: dict[str, set[str]]) -> list[str]:
        """Ids that ran and that their suite, or no suite, has."""
        ran = [(i, known.get(s, set())) for s, ids in sorted(self.by_suite.items()) for i in sorted(ids)]
        ran += [(i, set().union(*known.values())) for i in self.anywhere]
        return list(dict.fromkeys(i for i, there in ran if i not in there))


def read_reports(folder: Path) -> Executed:
    """Read every ``*.json`` and ``*.xml`` below `folder`; an unreadable one is a problem, not an execution."""
    out = Executed()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".json", ".xml") and p.is_file()):
        try:
            if path.stat().st_size > _MAX_REPORT_BYTES:
                raise ValueError(f"larger than {_MAX_REPORT_BYTES:,} bytes")
            if path.suffix.lower() == ".json":
                _read_json(json.loads(path.read_bytes()), out)
            else:
                _read_junit(ElementTree.parse(path).getroot(), out)
            out.files += 1
        except (OSError, ValueError, ElementTree.ParseError, RecursionError) as e:
            out.problems.append(f"{path}: {e}")
    return out


def _read_json(data: Any, out: Executed) -> None:
    names = ("executed_cases", "case_results", "standalone_file")
    if not isinstance(data, dict) or not any(key in data for key in names):
        raise ValueError(f"a report must be a JSON object with {', '.join(map(repr, names))}")
    executed, results = data.get("executed_cases") or [], data.get("case_results") or {}
    if not isinstance(executed, list) or not isinstance(results, dict):
        raise ValueError("'executed_cases' must be a list and 'case_results' an object")
    ids = [i for i in executed if isinstance(i, str)]
    ids += [i for i, status in results.items() if status not in ("skip", "skipped")]
    if isinstance(data.get("standalone_file"), str) and data.get("is_standalone", True):
        ids.append(STANDALONE_PREFIX + data["standalone_file"])
    if isinstance(data.get("suite"), str):
        out.by_suite.setdefault(data["suite"], set()).update(ids)
    else:
        out.anywhere.update(set(ids))


def _read_junit(root: ElementTree.Element, out: Executed) -> None:
    if root.tag not in ("testsuites", "testsuite"):
        raise ValueError(f"<{root.tag}> isn't the root of a JUnit report")
    seen: dict[str, None] = {}
    for case in root.iter("testcase"):
        _, bracket, rest = case.get("name", "").partition("[")
        if bracket and rest.endswith("]") and case.find("skipped") is None:  # an error is no run
            (seen if case.find("error") is None else out.errors)[rest[:-1]] = None
    out.anywhere.update(seen.keys())
