"""README.md and CONTRIBUTING.md say what is so: code runs, commands run, paths exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from small_video import SMALL

from lingbot_kernels.ops import _native
from lingbot_kernels.ops._dispatch import OPS

ROOT = Path(__file__).resolve().parents[2]
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_readme_s_python_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")
    assert len(code) >= 2
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    printed = re.findall(r"print\(.*# (\(.*?\))", code[0])
    assert capsys.readouterr().out.splitlines() == printed * 4


COMMANDS = [
    line for block in blocks(README, "bash") for line in block.splitlines() if line.startswith("lingbot-kernels")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_s_commands_run(line, invoke, tmp_path):
    """On a small video, with few chunks."""
    _, *arguments = shlex.split(line)
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    if arguments[0] != "doctor":
        arguments += [*SMALL, "--chunks", "2"]
    if arguments[0] == "bench":
        arguments += ["--repeats", "1"]
    invoke(*arguments)
    for option in ("--json", "--plot", "--save-latents"):
        if option in arguments:
            assert (tmp_path / arguments[arguments.index(option) + 1]).stat().st_size > 0


def shown_output(command: str) -> str:
    """What README.md shows below a command."""
    found = re.search(rf"^```bash\n{command}.*?^```\n.*?^```\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, command
    return found[1]


def test_readme_shows_what_doctor_says(invoke):
    """Of CPU tensors and of networks: the machine's own lines, and what its compilers lack, are not compared."""
    core = _native.core()
    if core is None or not core.cuda_architectures or importlib.util.find_spec("triton") is None:
        pytest.skip("the reasons in README.md are of a build with CUDA, beside Triton")
    said, shown = (
        [line.rstrip() for line in text[text.index("cpu tensors") :].splitlines()]
        for text in (invoke("doctor").output.partition("cuda tensors")[0], shown_output("lingbot-kernels doctor"))
    )
    end = len(said) if torch.cuda.is_available() else None  # with a GPU, its tensors follow
    assert shown[:end] == said


def test_readme_shows_every_row_of_quality(invoke):
    said = invoke("quality", *SMALL, "--chunks", 2, "--quiet").output
    first_cells = [
        [re.split(r"  +|: ", line)[0] for line in text.splitlines()[1:-1]]
        for text in (said, shown_output("lingbot-kernels quality"))
    ]
    assert first_cells[0] == first_cells[1]


def test_readme_s_first_figures_are_of_committed_rows():
    """Milliseconds of chunks and steps on H100s, each the median of a row as it is rounded there."""
    rows = [json.loads(line) for path in (ROOT / "bench/results").glob("*-h100-*.jsonl") for line in path.open()]
    measured = {f"{row['p50_us'] / 1e3:.0f}" for row in rows if row.get("p50_us") and row["bench"] != "kernels"}
    figures = [
        each for a, b in re.findall(r"(\d+)(?: to (\d+))? ms", README.read_text().split("## Use")[0]) for each in (a, b)
    ]
    assert len(figures) > 10 and {figure for figure in figures if figure} <= measured


def test_readme_shows_every_command_and_make_knows_its_targets():
    shown = {tuple(word for word in shlex.split(line)[1:3] if word.isalpha()) for line in COMMANDS}
    assert {("doctor",), ("rollout",), ("bench", "caching")} <= shown
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = re.findall(r"^make (\w+)", "\n".join(blocks(README, "bash")), re.MULTILINE)
    assert wanted == ["demo", "test"] and set(wanted) <= set(targets)


@pytest.mark.parametrize("path", [README, CONTRIBUTING], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (path.parent / file).read_text(), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


def named_paths() -> list[str]:
    text = CONTRIBUTING.read_text()
    mapped = [line.split()[0] for line in blocks(CONTRIBUTING, "")[0].splitlines() if line]
    quoted = re.findall(r"`([\w./<>-]+/[\w./<>-]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*mapped, *quoted]


def test_contributing_names_paths_that_exist():
    paths = named_paths()
    assert len(paths) > 25
    missing = []
    for path in paths:
        # <op> stands for any op: some of them have a home there.
        candidates = [path.replace("<op>", op) for op in OPS] if "<op>" in path else [path]
        if not any((ROOT / candidate).exists() for candidate in candidates):
            missing.append(path)
    assert missing == []


def test_the_map_has_every_top_package():
    mapped = " ".join(named_paths())
    packages = {path.parent.name for path in (ROOT / "lingbot_kernels").glob("*/__init__.py")}
    assert {name for name in packages if f"lingbot_kernels/{name}/" not in mapped} == set()
