"""The C++ and CUDA sources as they are written, and that the tools agree on how wide a line may be."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 120
SOURCES = sorted(
    path
    for folder in ("csrc", "bench/cuda_tuning")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".cpp", ".cu", ".cuh", ".h")
)


def test_no_line_of_cpp_passes_120_columns():
    assert len(SOURCES) > 40
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > COLUMNS
    ]
    assert wide == []


def test_the_tools_agree_on_the_columns():
    said = {
        ".clang-format": r"^ColumnLimit: (\d+)$",
        ".editorconfig": r"^max_line_length = (\d+)$",
        "pyproject.toml": r"^line-length = (\d+)$",
    }
    for name, pattern in said.items():
        assert re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE) == [str(COLUMNS)], name


def test_what_other_pythons_run_exists_and_needs_neither_torch_nor_numpy():
    named = re.findall(r'^TESTS="(.*)"$', (ROOT / ".ci/other_pythons").read_text(), re.MULTILINE)[0].split()
    files = [file for name in named for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))]
    assert len(files) > len(named) and all(file.is_file() for file in files)
    heavy = re.compile(r"^(?:import|from) (torch|numpy|tests\.helpers|helpers)\b", re.MULTILINE)
    assert [file.name for file in files if heavy.search(file.read_text(encoding="utf-8"))] == []
