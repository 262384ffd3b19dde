"""One small config per form, with the exact answer of ``list --json`` beside it (``NAME.py`` and ``NAME.json``)."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from lingbot_kernels.tools import diffusion_case_parser
from lingbot_kernels.tools._case_parser.results import PYTHON

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(p for p in GOLDEN.glob("*.py") if not p.name.startswith("_"))


def answer(config: Path) -> dict:
    """The part of the JSON answer that a golden file holds: suites that have cases, places relative to the folder."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        diffusion_case_parser.main(["list", str(config), "--json", "--root", str(GOLDEN)])
    data = json.loads(out.getvalue())
    data["suites"] = {
        s: [{k: c[k] for k in ("id", "list", "line", "condition")} for c in cs]
        for s, cs in data["suites"].items()
        if cs
    }
    for u in data["unresolved"]:
        u["file"] = Path(u["file"]).name
    data["stopped"] = bool(data.get("stopped"))
    return json.loads(json.dumps(data).replace(PYTHON, "Python X.Y"))


def without_places(data: dict) -> dict:
    """The answer with no more of a place than its file."""
    for u in data["unresolved"]:
        for key in ("line", "column", "source"):
            del u[key]
    return data


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_golden(config: Path) -> None:
    got, want = answer(config), json.loads(config.with_suffix(".json").read_text())
    if sys.version_info < (3, 11):  # which knows a call by the line of its statement, and a decorator by its function's
        got, want = without_places(got), without_places(want)
    assert got == want


def test_every_answer_has_its_config() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == {p.stem for p in CONFIGS}
    assert len(CONFIGS) >= 25
