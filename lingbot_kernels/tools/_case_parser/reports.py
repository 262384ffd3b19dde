"""Executed cases from the reports of CI jobs: JSON execution reports and JUnit XML."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STANDALONE_PREFIX = "standalone:"
_MAX_REPORT_BYTES = 64_000_000


@dataclass
class Executed:
    """Case ids that ran: by suite where the report says so, else with how often each was seen."""

    by_suite: dict[str, set[str]] = field(default_factory=dict)
    anywhere: dict[str, int] = field(default_factory=dict)
    errors: dict[str, None] = field(default_factory=dict)
    files: int = 0
    problems: list[str] = field(default_factory=list)

    def missing(self, expected: dict[str, list[str]]) -> dict[str, list[str]]:
        """Expected ids that didn't run, by suite. A run in a report without a suite counts for one suite."""
        left = dict(self.anywhere)
        out: dict[str, list[str]] = {}
        for suite, ids in expected.items():
            done = self.by_suite.get(suite, set())
            for case_id in ids:
                if case_id in done:
                    continue
                if left.get(case_id, 0) > 0:
                    left[case_id] -= 1
                else:
                    out.setdefault(suite, []).append(case_id)
        return out

    def broken(self, suites: list[str]) -> list[str]:
        """Cases that ended in an error of their set-up or teardown and have no run in any report of `suites`."""
        ran = {i for s in suites for i in self.by_suite.get(s, ())} | self.anywhere.keys()
        return [i for i in self.errors if i not in ran]

    def unexpected(self, known: dict[str, set[str]], standalone: dict[str, list[str]] | None) -> list[str]:
        """Ids that ran and that no suite has; standalone files where it is known which there are."""
        files = {STANDALONE_PREFIX + f for held in (standalone or {}).values() for f in held}
        cases = {i for ids in known.values() for i in ids}
        ran = [(i, known.get(s, set())) for s, ids in sorted(self.by_suite.items()) for i in sorted(ids)]
        ran += [(i, cases) for i in self.anywhere]
        return list(
            dict.fromkeys(
                i
                for i, there in ran
                if (
                    i not in there if not i.startswith(STANDALONE_PREFIX) else standalone is not None and i not in files
                )
            )
        )


def read_reports(folder: Path) -> Executed:
    """Read every ``*.json`` and ``*.xml`` below `folder`; an unreadable one is a problem, not an execution."""
    out = Executed()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".json", ".xml") or not path.is_file():
            continue
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
    if not isinstance(data, dict):
        raise ValueError("a report must be a JSON object with 'executed_cases'")
    if not any(key in data for key in ("executed_cases", "case_results", "standalone_file")):
        raise ValueError("a report needs 'executed_cases', 'case_results' or 'standalone_file'")
    ids: list[str] = []
    executed = data.get("executed_cases") or []
    results = data.get("case_results") or {}
    if not isinstance(executed, list) or not isinstance(results, dict):
        raise ValueError("'executed_cases' must be a list and 'case_results' an object")
    ids += [i for i in executed if isinstance(i, str)]
    ids += [i for i, status in results.items() if status not in ("skip", "skipped")]
    if isinstance(data.get("standalone_file"), str) and data.get("is_standalone", True):
        ids.append(STANDALONE_PREFIX + data["standalone_file"])
    suite = data.get("suite")
    if isinstance(suite, str):
        out.by_suite.setdefault(suite, set()).update(ids)
    else:
        for i in dict.fromkeys(ids):
            out.anywhere[i] = out.anywhere.get(i, 0) + 1


def _read_junit(root: ElementTree.Element, out: Executed) -> None:
    if root.tag not in ("testsuites", "testsuite"):
        raise ValueError(f"<{root.tag}> isn't the root of a JUnit report")
    seen: dict[str, None] = {}
    for case in root.iter("testcase"):
        name = case.get("name", "")
        if case.find("skipped") is not None or "[" not in name or not name.endswith("]"):
            continue
        if case.find("error") is not None:  # set-up or teardown failed: not a run
            out.errors[name[name.index("[") + 1 : -1]] = None
        else:
            seen[name[name.index("[") + 1 : -1]] = None
    for i in seen:
        out.anywhere[i] = out.anywhere.get(i, 0) + 1
