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


@pytest.mark.parametrize("where", ["/dev/full", "/proc/x", "none/out", "."])
def test_outputs_that_can_not_be_written_are_refused_before_the_config_is_read(tmp_path: Path, where: str) -> None:
    config = tmp_path / "c.py"
    config.write_text("ONE_GPU_CASES = [")
    out = run("plan", config, "--suite", "1-gpu", "--github-output", where)
    assert out.returncode == 66 and out.stdout == ""
    (line,) = out.stderr.splitlines()
    assert line.startswith(f"error: --github-output {where}: ")


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


FAILING = CONFIG + "raise ValueError('no GPU')\n"


@pytest.mark.parametrize(
    ("content", "options", "code"),
    [
        (CONFIG, [], 0),
        (CONFIG, ["--strict"], 0),
        ("x = 1\n", [], 1),
        ("x = 1\n", ["--strict"], 1),
        ("x = 1\n", ["--allow-empty"], 0),
        ("x = 1\n", ["--allow-empty", "--static"], 0),
        (UNRESOLVED, [], 0),
        (UNRESOLVED, ["--strict"], 2),
        (UNRESOLVED, ["--strict", "--static"], 2),
        ("ONE_GPU_CASES = [", [], 2),
        ("ONE_GPU_CASES = [", ["--allow-empty"], 2),
        (FAILING, [], 3),
        (FAILING, ["--strict"], 3),
        (FAILING, ["--allow-empty"], 3),
        (CONFIG, ["--assume", "is_hip()"], 64),
        (CONFIG, ["--assume", "is_hip()=maybe"], 64),
        (CONFIG, ["--timeout", "0"], 64),
        (CONFIG, ["--scope", "{none}"], 66),
        (CONFIG, ["--root", "{none}"], 66),
    ],
)
@pytest.mark.parametrize("command", ["list", "plan", "verify", "diff"])
def test_every_command_has_the_same_exit_codes(
    tmp_path: Path, command: str, content: str, options: list[str], code: int
) -> None:
    config, reports, output = tmp_path / "cases.py", tmp_path / "reports", tmp_path / "out"
    config.write_text(content)
    reports.mkdir()
    (reports / "r.json").write_text('{"suite": "1-gpu", "executed_cases": ["a", "b"]}')
    more: dict[str, list[object]] = {
        "list": [],
        "plan": ["--suite", "1-gpu", "--github-output", output],
        "verify": ["--reports", reports],
        "diff": [config],
    }
    out = run(command, config, *more[command], *(o.format(none=tmp_path / "none") for o in options))
    assert out.returncode == code, (out.stdout, out.stderr)
    assert output.exists() == (command == "plan" and code == 0)
    assert out.stderr.startswith("error: ") or code in (0, 2)
    if code == 2 and content.endswith("["):
        assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in out.stdout + out.stderr


def test_assume(config: Path, tmp_path: Path) -> None:
    cases = data(run("list", config, "--json", "--assume", "is_hip( )=False"))["suites"]["1-gpu"]
    assert [(c["id"], c["condition"]) for c in cases] == [("a", None), ("b", None), ("c", None)]
    out = run("list", config, "--json", "--strict", "--assume", "not is_hip()=False", "--assume", "is_npu()=True")
    assert out.returncode == 0 and [c["id"] for c in data(out)["suites"]["1-gpu"]] == ["a", "b"]
    assert "--assume is_npu()" in out.stderr
    reports = tmp_path / "reports"
    reports.mkdir()
    (reports / "r.json").write_text('{"suite": "1-gpu", "executed_cases": ["a", "b"]}')
    assert run("verify", config, "--reports", reports).returncode == 0
    out = run("verify", config, "--reports", reports, "--assume", "is_hip()=False")
    assert out.returncode == 1 and "not executed: 1-gpu: c" in out.stderr


def test_verify_lists_what_the_config_does_not_have_and_errors(config: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    executed = '{"suite": "1-gpu", "executed_cases": ["a", "b", "gone"]}'
    (reports / "r.json").write_bytes(b"\xef\xbb\xbf" + executed.encode())
    out = run("verify", config, "--reports", reports, "--json")
    assert out.returncode == 0 and data(out)["unexpected"] == ["gone"] and data(out)["errors"] == []
    assert "not in the config: gone" in run("verify", config, "--reports", reports).stdout
    (reports / "r.json").write_bytes(executed.replace('"b", ', "").encode("utf-16"))
    junit = '<?xml version="1.0"?><testsuite><testcase name="t[b]"><error/></testcase></testsuite>'
    (reports / "r.xml").write_bytes(b"\xef\xbb\xbf" + junit.encode())
    out = run("verify", config, "--reports", reports, "--json")
    assert out.returncode == 1 and data(out)["errors"] == ["b"] and data(out)["missing"] == {"1-gpu": ["b"]}
    (reports / "s.xml").write_text(junit.replace("[b]", "[c]").replace("<error/>", "<error/><failure/>"))
    (reports / "t.json").write_text('{"suite": "1-gpu", "executed_cases": ["b"]}')
    out = run("verify", config, "--reports", reports)
    assert out.returncode == 1 and "c ended in an error" in out.stderr and "not executed" not in out.stderr


def test_baselines_of_several_platforms(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "baselines"
    folder.mkdir()
    for name, seconds in (("a100", 1), ("b200", 2), ("h100", 3)):
        scenarios = {"a": {"estimated_full_test_time_s": seconds}, name: {"expected_e2e_ms": 1000}}
        (folder / f"{name}.json").write_text("\ufeff" + json.dumps({"scenarios": scenarios}), encoding="utf-8")
    cases = data(run("list", config, "--json", "--baselines", folder))["suites"]["1-gpu"]
    assert [c["est_time"] for c in cases] == [3.0, 300.0, 300.0]
    assert parser.load_baselines(folder) == {"a": 3.0, "h100": 121.0, "b200": 121.0, "a100": 121.0}


def test_help_and_odd_output(config: Path) -> None:
    assert run("--help").returncode == 0
    config.write_text('from x import DiffusionTestCase\nONE_GPU_CASES = [DiffusionTestCase("\\ud800\\u00e9")]\n')
    assert run("list", config, PYTHONIOENCODING="ascii").returncode == 0


def test_main_can_be_called(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.main(["list", str(config), "--require", "2-gpu"]) == 1
    assert "3 cases" in capsys.readouterr().out
