"""No module imports upwards: the floors of the house, and every import of the package held against them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lingbot_kernels"
NAME = PACKAGE.name

# From the ground up. A room is a module or a folder of the package; it may import its own floor and those below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "_C", "files", "nvtx", "plain", "ring", "scalars", "tools"),
    ("config",),
    ("reference",),
    ("ops", "triton"),
    ("quantization",),
    ("realtime",),
    ("parallel",),
    ("models", "decoding", "components"),
    ("stages",),
    ("integrations", "pipeline"),
    ("benchmarks", "play"),
    ("commands",),
    ("cli", "demo"),
    ("__init__", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms of the ground floor stand by themselves: of the package they import nothing but their own.
ALONE = FLOORS[0]

# What lives between chunks launches no kernel: it knows nothing of the ops below it.
APART = {"realtime": ("ops", "triton")}


def room_of(module: str) -> str:
    """The room of a module's dotted name; `lingbot_kernels` itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, root: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports of the package: wherever the statement stands, for types alone,
    relatively, or by name through `import_module`.
    """
    folder = (root.name, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            # `from lingbot_kernels import ops` names a room by an alias, or what the package hands on.
            found = [f"{base}.{alias.name}" for alias in node.names] if base == root.name else [base]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in found:
            if name.split(".")[0] == root.name:
                yield node.lineno, name


def rooms(root: Path = PACKAGE) -> set[str]:
    folders = {path.parent.name for path in root.glob("*/*.py")}
    return folders | {path.stem for path in root.glob("*.py")}


def upward(root: Path = PACKAGE) -> list[str]:
    """Every import that leads to a higher floor, out of a room that stands by itself, or to no room at all."""
    found = []
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        for line, name in imports(path, root):
            there = room_of(name)
            where = f"{path.relative_to(root)}:{line} imports {name}"
            if there not in FLOOR:
                found.append(f"{where}, which is in no room of the table")
            elif FLOOR[there] > FLOOR[here]:
                found.append(f"{where}: floor {FLOOR[there]} from floor {FLOOR[here]}")
            elif here in ALONE and there != here:
                found.append(f"{where}: {here} stands by itself")
            elif there in APART.get(here, ()):
                found.append(f"{where}: {here} keeps apart from {there}")
    return found


def test_every_room_has_a_floor():
    assert rooms() <= set(FLOOR), "name the new room in FLOORS, where it belongs"
    assert len(FLOOR) == sum(map(len, FLOORS))


def test_no_module_imports_upwards():
    assert upward() == []


UPWARDS = (
    ("ops/a.py", "from lingbot_kernels.models import camera", "floor"),
    ("ops/a.py", "import lingbot_kernels.models.camera as c", "floor"),
    ("ops/a.py", "def f():\n    from lingbot_kernels.benchmarks.rows import Row", "floor"),
    (
        "ops/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lingbot_kernels import stages",
        "floor",
    ),
    ("ops/a.py", "from ..models import camera", "floor"),
    ("ops/a.py", "import importlib\nm = importlib.import_module('lingbot_kernels.models')", "floor"),
    ("ops/a.py", "from lingbot_kernels import LingBotConfig", "no room"),
    ("benchmarks/a.py", "from lingbot_kernels.commands._click import blame", "floor"),
    ("realtime/a.py", "from lingbot_kernels.ops import RingPosition", "apart"),
    ("tools/a.py", "from lingbot_kernels.nvtx import enable", "by itself"),
)


@pytest.mark.parametrize(("where", "source", "reason"), UPWARDS)
def test_an_upward_import_is_found_wherever_it_stands(where, source, reason, tmp_path):
    path = tmp_path / NAME / where
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = upward(tmp_path / NAME)
    assert found.startswith(where) and reason in found


def test_imports_downwards_and_beside_are_fine(tmp_path):
    path = tmp_path / NAME / "ops" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\nfrom lingbot_kernels import triton\nfrom lingbot_kernels.ring import slot\n"
        "from . import _check\nfrom lingbot_kernels.ops._check import f\n"
    )
    assert upward(tmp_path / NAME) == []


def test_click_stays_with_the_commands():
    """What measures can be called from a program: options are the commands' affair."""
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "click" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "click")
    }
    assert users == {"commands", "cli.py"}
