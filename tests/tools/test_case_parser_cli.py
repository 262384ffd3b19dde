"""The command line, run by path with no package in reach (``-I -S``): answers and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingbot_kernels.tools import diffusion_case_parser as parser

SCRIPT = Path(parser.__file__)
CONFIG = """\
from stubs import DiffusionTestCase as C, is_hip
ONE_GPU_CASES = [C("a"), C("b")]
if not is_hip():
    ONE_GPU_CASES.append(C("c"))
"""
UNRESOLVED = CONFIG + "from gone import make\nONE_GPU_CASES.append(make())\n"


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, args)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})
    assert "Traceback" not in out.stderr
    return out


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cases.py"
    path.write_text(CONFIG)
    return path


def data(out: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(out.stdout)


def test_list(config: Path) -> None:
    out = run("list", config)
    assert out.returncode == 0
    assert "1-gpu: 3 cases" in out.stdout and "c  [ONE_GPU_CASES, line 4, 300 s]  if not is_hip()" in out.stdout


def test_list_json(config: Path, tmp_path: Path) -> None:
    baselines = tmp_path / "b.json"
    baselines.write_text('{"scenarios": {"a": {"expected_e2e_ms": 30000}}}')
    answer = data(run("list", config, "--json", "--baselines", baselines))
    assert answer["suites"]["1-gpu"] == [
        {"id": "a", "list": "ONE_GPU_CASES", "line": 2, "condition": None, "est_time": 150.0},
        {"id": "b", "list": "ONE_GPU_CASES", "line": 2, "condition": None, "est_time": 300.0},
        {"id": "c", "list": "ONE_GPU_CASES", "line": 4, "condition": "not is_hip()", "est_time": 300.0},
    ]
    assert answer["unresolved"] == [] and answer["duplicates"] == []


def test_list_unresolved_and_strict(config: Path) -> None:
    config.write_text(UNRESOLVED)
    out = run("list", config, "--json")
    (u,) = data(out)["unresolved"]
    assert out.returncode == 0
    assert set(u) == {"file", "line", "column", "source", "reason"}
    assert (u["file"], u["line"], u["source"]) == (str(config), 6, "ONE_GPU_CASES.append(make())")
    assert run("list", config, "--strict").returncode == 2
    column = 22 if sys.version_info >= (3, 11) else 1  # before, a call is known by its line alone
    assert f"{config}:6:{column}" in run("list", config).stdout


def test_list_required_suite(config: Path) -> None:
    assert run("list", config, "--require", "1-gpu").returncode == 0
    out = run("list", config, "--require", "2-gpu")
    assert out.returncode == 1 and "2-gpu" in out.stderr
    assert run("list", config, "--require", "9-gpu").returncode == 64


def test_other_projects(config: Path) -> None:
    config.write_text('from x import Probe\nPROBES = [Probe(1, name="p")]\n')
    out = run("list", config, "--json", "--list", "PROBES=probes", "--case-class", "Probe", "--id-param", "name")
    assert [c["id"] for c in data(out)["suites"]["probes"]] == ["p"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["unknown"],
        ["list"],
        ["list", "{config}", "--nonsense"],
        ["list", "{config}", "--list", "no-equals"],
        ["list", "{config}", "--case-class", "not a name"],
        ["plan", "{config}"],
        ["plan", "{config}", "--suite", "none"],
        ["plan", "{config}", "--suite", "1-gpu", "--min-time", "0"],
        ["plan", "{config}", "--suite", "1-gpu", "--max-partitions", "0"],
        ["plan", "{config}", "--suite", "1-gpu", "--target-time", "9000"],
        ["plan", "{config}", "--suite", "1-gpu", "--max-time", "nan"],
        ["verify", "{config}"],
        ["diff", "{config}"],
    ],
)
def test_bad_arguments(config: Path, args: list[str]) -> None:
    out = run(*(a.format(config=config) for a in args))
    assert out.returncode == 64 and out.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "args",
    [
        ["list", "{none}"],
        ["list", "{folder}"],
        ["list", "{config}", "--baselines", "{none}"],
        ["list", "{config}", "--run-suite", "{none}"],
        ["list", "{config}", "--root", "{none}"],
        ["plan", "{none}", "--suite", "1-gpu"],
        ["verify", "{config}", "--reports", "{none}"],
        ["diff", "{config}", "{none}"],
    ],
)
def test_missing_files(config: Path, tmp_path: Path, args: list[str]) -> None:
    out = run(*(a.format(config=config, none=tmp_path / "none", folder=tmp_path) for a in args))
    assert (out.returncode == 66 and "none" in out.stderr) or str(tmp_path) in out.stderr


@pytest.mark.parametrize(
    "content",
    [b"ONE_GPU_CASES = [", b"\xff\xfe\x00", b"# coding: nope\n", b"x = 1\n" * 1_800_000],
    ids=["syntax", "bytes", "coding", "10MB"],
)
def test_unreadable_config(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    out = run("list", config, "--json")
    answer = data(out)
    assert out.returncode == 2
    assert answer["unresolved"][0]["reason"] and not any(answer["suites"].values())


def test_broken_baselines(config: Path, tmp_path: Path) -> None:
    baselines = tmp_path / "b.json"
    for text in (
        "{",
        "[]",
        '{"scenarios": 3}',
        '{"scenarios": {"a": {"expected_e2e_ms": "x"}}}',
        '{"scenarios": {"a": {"expected_e2e_ms": -1}}}',
    ):
        baselines.write_text(text)
        assert run("list", config, "--baselines", baselines).returncode == 64


def test_plan(tmp_path: Path) -> None:
    config, baselines, suite = tmp_path / "c.py", tmp_path / "b.json", tmp_path / "run_suite.py"
    config.write_text(
        f"from x import DiffusionTestCase as C\nTWO_GPU_CASES = [C(f'c{{i}}') for i in range(40)]\n{CONFIG}"
    )
    baselines.write_text(
        json.dumps({"scenarios": {f"c{i}": {"estimated_full_test_time_s": 60 + 17 * i % 300} for i in range(40)}})
    )
    suite.write_text(
        'STANDALONE_FILES = {"2-gpu": ["s.py", "t.py"]}\nSTANDALONE_FILE_EST_TIMES = {"2-gpu": {"s.py": 600}}\n'
    )
    args = ("plan", config, "--suite", "2-gpu", "--baselines", baselines, "--run-suite", suite)
    output = tmp_path / "out"
    made = data(run(*args, "--github-output", output))
    assert set(made) == {"suite", "partition_count", "partitions", "matrix"}
    parts = made["partitions"]
    assert sorted(i for p in parts for i in p["case_ids"]) == sorted(f"c{i}" for i in range(40))
    assert sorted(f for p in parts for f in p["standalone_files"]) == ["s.py", "t.py"]
    times = [p["estimated_time"] for p in parts]
    assert made["partition_count"] == len(parts) and max(times) <= 2400 and min(times) >= 1200
    assert made["matrix"] == {"include": [{"part": i} for i in range(len(parts))]}
    assert data(run(*args)) == made
    written = dict(line.split("=", 1) for line in output.read_text().splitlines())
    assert json.loads(written["matrix"]) == made["matrix"] and written["partition_count"] == str(len(parts))
    assert json.loads(written["plan"])["partitions"] == parts
    assert run(*args, "--github-output", output).returncode == 64
    assert run(*args, "--github-output", output, "--github-prefix", "two-").returncode == 0
    assert len(data(run(*args, "--max-partitions", 2))["partitions"]) == 2


def test_plan_of_an_empty_suite(config: Path) -> None:
    made = data(run("plan", config, "--suite", "2-gpu"))
    assert made == {"suite": "2-gpu", "partition_count": 0, "partitions": [], "matrix": {"include": []}}


def test_plan_says_what_is_unresolved(config: Path) -> None:
    config.write_text(UNRESOLVED)
    out = run("plan", config, "--suite", "1-gpu")
    assert out.returncode == 0 and "unresolved" in out.stderr
    assert run("plan", config, "--suite", "1-gpu", "--strict").returncode == 2


def test_verify(config: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    (reports / "deep").mkdir(parents=True)
    out = run("verify", config, "--reports", reports)
    assert out.returncode == 1 and "a b" in out.stderr
    (reports / "deep" / "r0.json").write_text('{"suite": "1-gpu", "executed_cases": ["a"]}')
    out = run("verify", config, "--reports", reports, "--json")
    assert out.returncode == 1 and data(out)["missing"] == {"1-gpu": ["b"]}
    (reports / "r1.xml").write_text(
        '<testsuites><testsuite><testcase name="test_x[b]"/><testcase name="test_x[a-b]"/>'
        '<testcase name="test_x[c]"><skipped/></testcase></testsuite></testsuites>'
    )
    out = run("verify", config, "--reports", reports)
    assert out.returncode == 0 and "not run, conditional: c" in out.stdout
    assert run("verify", config, "--reports", reports, "--suite", "none").returncode == 64


def test_verify_counts_no_other_suite_and_no_skipped_case(config: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    (reports / "r.json").write_text('{"suite": "2-gpu", "executed_cases": ["a", "b"]}')
    assert run("verify", config, "--reports", reports).returncode == 1
    (reports / "r.xml").write_text(
        '<testsuite><testcase name="t[a]"/><testcase name="t[b]"><skipped/></testcase></testsuite>'
    )
    out = run("verify", config, "--reports", reports)
    assert out.returncode == 1 and "1-gpu: b" in out.stderr
    (reports / "bad.json").write_text("{")
    (reports / "bad.xml").write_text("<a")
    assert run("verify", config, "--reports", reports).stderr.count("unreadable report") == 2


def test_verify_standalone_files(config: Path, tmp_path: Path) -> None:
    suite, reports = tmp_path / "run_suite.py", tmp_path / "reports"
    reports.mkdir()
    suite.write_text('STANDALONE_FILES = {"2-gpu": ["s.py"]}\n')
    (reports / "r.json").write_text('{"suite": "1-gpu", "executed_cases": ["a", "b"]}')
    out = run("verify", config, "--reports", reports, "--run-suite", suite)
    assert out.returncode == 1 and "standalone:s.py" in out.stderr
    (reports / "s.json").write_text(
        '{"suite": "2-gpu", "is_standalone": true, "standalone_file": "s.py", "executed_cases": []}'
    )
    assert run("verify", config, "--reports", reports, "--run-suite", suite).returncode == 0


def test_diff(config: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.py"
    new.write_text(CONFIG.replace('C("b")', 'C("n")').replace("if not is_hip():", "if is_hip():"))
    out = run("diff", config, new, "--json")
    assert out.returncode == 0
    assert data(out)["suites"]["1-gpu"] == {
        "added": ["n"],
        "removed": ["b"],
        "changed": [{"id": "c", "old": "not is_hip()", "new": "is_hip()"}],
    }
    text = run("diff", config, new).stdout
    assert "+ n" in text and "- b" in text
    new.write_text(UNRESOLVED)
    assert run("diff", config, new).returncode == 0
    assert run("diff", config, new, "--strict").returncode == 2


def test_help_and_odd_output(config: Path) -> None:
    assert run("--help").returncode == 0
    config.write_text('from x import DiffusionTestCase\nONE_GPU_CASES = [DiffusionTestCase("\\ud800\\u00e9")]\n')
    assert run("list", config, PYTHONIOENCODING="ascii").returncode == 0


def test_main_can_be_called(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main(["list", str(config), "--require", "2-gpu"]) == 1
    assert "3 cases" in capsys.readouterr().out
