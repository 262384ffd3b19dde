"""The documentation builds without a warning, its code runs, and its messages are the library's."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lingbot_kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_generated" not in path.parts and "_build" not in path.parts)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# A page that needs a process of its own runs elsewhere: sglang.md in tests/integrations/test_sglang.py.
WITH_CODE = [path for path in PAGES if blocks(path, "python") and path.name != "sglang.md"]


def test_pages_with_code_are_found():
    assert {"concepts.md", "numerics.md", "own_dit.md", "diffusers.md", "scaling_out.md", "pipeline.md"} <= {
        p.name for p in WITH_CODE
    }
    languages = {name for path in PAGES for name in re.findall(r"^```(\S+)$", path.read_text(), re.MULTILINE)}
    assert languages <= {"python", "bash", "{toctree}", "{eval-rst}"}  # nothing that looks like code goes unrun


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.name)
def test_python_blocks_run_one_after_another(path, tmp_path, monkeypatch):
    if path.name in ("diffusers.md", "pipeline.md"):
        pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, object] = {"__name__": path.stem}
    try:
        for block in blocks(path, "python"):
            exec(compile(block, str(path), "exec"), names)
    finally:
        torch.set_num_threads(threads)


LINES = sorted({line for path in PAGES for block in blocks(path, "bash") for line in block.splitlines() if line})


@pytest.mark.parametrize("line", LINES)
def test_bash_lines_name_what_exists(line, tmp_path, monkeypatch):
    """`lingbot-kernels profile` runs, on a small video; of the others, files, targets, extras and options exist."""
    words = shlex.split(line, comments=True)
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        extras = re.findall(r"\[(\w+)\]", words[-1])
        assert all(re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)
    elif words[0] == "torchrun":
        if "lingbot_kernels" in words:
            command = main.get_command(None, words[words.index("lingbot_kernels") + 1])  # type: ignore[arg-type]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words[words.index("lingbot_kernels") :] if word.startswith("--")} <= known
    elif words[0] == "lingbot-kernels" and words[1] == "profile":
        monkeypatch.chdir(tmp_path)
        if "--plot" in words:
            pytest.importorskip("matplotlib")
        small = ["--height", "32", "--width", "32"] if words[2] == "rollout" else ["--case", "s192-d512"]
        done = CliRunner().invoke(main, [*words[1:], *small, "--device", "cpu"])
        assert done.exit_code == 0, done.output
    elif words[0].startswith("python"):
        assert any((ROOT / word).is_file() for word in words[1:]), line
    else:
        assert words[0] == "lingbot-kernels" and words[1] in main.list_commands(None), line  # type: ignore[arg-type]


def test_it_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo", "diffusers"):
        pytest.importorskip(name, reason="needs lingbot-kernels[docs]")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    ops = (tmp_path / "html" / "api" / "ops.html").read_text()
    assert "lingbot_kernels.ops.qk_norm_rope_kv_write" in ops and "RMSNorm" in ops
    assert "accelerate" in (tmp_path / "html" / "api" / "integrations.html").read_text()


def text_of(node: ast.expr) -> str:
    """A message with … for what isn't constant."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def messages() -> set[str]:
    found = set()
    package = ROOT / "lingbot_kernels"
    for pattern in ("ring.py", "ops/*.py", "realtime/*.py", "parallel/*.py", "integrations/*.py", "stages/*.py"):
        for path in package.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    found.add(text_of(node.exc.args[0]))
    return found - {"…"}


# "name: got this, must be that" (or "is this, must lie there") says by itself what is wrong and what would be right.
PLAIN = re.compile(r"^[\w., …]+(: got | is ).*\b(must|which must)\b")


def explained() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_messages_that_are_explained_are_raised():
    raised = messages()
    assert len(explained()) > 25
    stale = [row for row in explained() if not any(message.startswith(row.rstrip("… ")) for message in raised)]
    assert stale == []


def test_messages_that_do_not_say_it_all_are_explained():
    rows = [row.rstrip("… ") for row in explained()]
    unexplained = [m for m in messages() if not PLAIN.match(m) and not any(m.startswith(row) for row in rows)]
    assert sorted(unexplained) == ["the reference serves everything"]  # an assertion of the dispatch itself


def test_links_between_pages_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target and "_generated" not in target:
                assert (path.parent / target).exists(), (path.name, target)


@pytest.fixture
def measured():
    spec = importlib.util.spec_from_file_location("measured", DOCS / "measured.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_rows_become_a_table_of_the_latest(measured, tmp_path):
    results, target = tmp_path / "results", tmp_path / "docs" / "_generated"
    results.mkdir()
    target.parent.mkdir()
    row = dict(
        bench="kernels", gpu="NVIDIA H100", driver="1", torch="2", case="s4-d8", op="rms_norm", backend="cuda",
        gate="green", p20_us=1.0, p50_us=2.0, p80_us=3.0, ceiling_us=1.6, ratio=1.25, tbps=2.5, commit="abc",
    )  # fmt: skip
    slow = row | {"op": "step", "bench": "model", "p50_us": 335_000.0, "tbps": None, "gate": "red"}
    lines = [row | {"commit": "old"}, slow, row]
    (results / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results / "a.png").write_bytes(b"")
    measured.write(results, target)
    page = (target / "measured.md").read_text()
    assert "| s4-d8 | rms_norm | cuda | 1.0 us | 2.0 us | 3.0 us | 1.6 us | 1.250 | 2.50 | green | abc |" in page
    assert "335.00 ms" in page and "| red |" in page and "old" not in page
    assert "![a](../../results/a.png)" in page and "There is no row yet" not in page


def test_the_concept_page_shows_green_rows_alone(measured, tmp_path):
    row = dict(
        bench="kernels", gpu="H", case="s4524-d5120", op="qk_norm_rope_kv_write", backend="cuda", gate="green",
        p50_us=96.2, ratio=1.03,
    )  # fmt: skip
    step = row | {"bench": "model", "op": "denoise_step", "case": "14b", "backend": "ours", "p50_us": 330_230.0}
    red = step | {"op": "chunk", "gate": "red", "p50_us": 1.0}
    absent = row | {"backend": "peer", "gate": "not installed", "p50_us": None}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (row, step, red, absent)))
    text = measured.headline(tmp_path)
    assert "| qk_norm_rope_kv_write | cuda | 96.2 us | 1.03 |" in text
    assert "| 14b | denoise step | ours | 330.23 ms |" in text
    assert "peer" not in text and "chunk |" not in text


def test_without_rows_the_page_says_so(measured, tmp_path):
    assert "There is no row yet." in measured.headline(tmp_path)
    assert "There is no row yet." in measured.page(tmp_path, tmp_path / "x" / "measured.md")
