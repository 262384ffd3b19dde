"""sglang's own classes under `integrations.sglang`, its own unit tests, and the page about it, each in a process that
can import sglang; skipped where the package index has none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_spec = importlib.util.spec_from_file_location("sglang_environment", HERE / "sglang_environment.py")
environment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(environment)


@pytest.fixture(scope="session")
def sglang_path(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    try:
        return environment.folders()
    except environment.Unavailable as why:
        pytest.skip(f"sglang {environment.VERSION} can't be had: {why}")


def run(path: list[Path], *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, HERE, *path])), "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def passed(said: str) -> int:
    assert not re.search(r"\d+ (failed|error)", said)
    return int(re.findall(r"(\d+) passed", said)[-1])


def test_the_adapter(sglang_path: list[Path]) -> None:
    inside = str(HERE / "sglang_inside.py")
    assert passed(run(sglang_path, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", inside)) >= 40


def test_the_unit_tests_of_sglang_on_rings(sglang_path: list[Path]) -> None:
    """Its tests of the cache and the stage, every cache a ring: whoever calls sglang's methods finds sglang's order."""
    tests = sglang_path[0] / "sglang/multimodal_gen/test/unit/realtime/test_lingbot_causal_denoising.py"
    options = ["-q", "-p", "sglang_rings_plugin", "-p", "no:cacheprovider", "-c", os.devnull]
    said = run(sglang_path, "-m", "pytest", *options, str(tests))
    assert passed(said) >= 25 and int(re.findall(r"(\d+) caches were rings", said)[-1]) >= 2


@pytest.mark.parametrize("size", [("8", "12"), ("6", "6")], ids=["even", "uneven"])
def test_heads_shared_by_two_ranks(sglang_path: list[Path], size: tuple[str, str]) -> None:
    """Ulysses over sglang's own groups, with the same number of tokens on each rank and with one more on the first."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run(sglang_path, *launch, str(HERE / "sglang_ranks.py"), *size).count("the ranks agree") == 2


def test_the_page(sglang_path: list[Path], tmp_path: Path) -> None:
    """docs/sglang.md, block after block."""
    page = (ROOT / "docs/sglang.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert code
    program = tmp_path / "page.py"
    program.write_text("import sglang_environment\nsglang_environment.install()\n" + "\n".join(code))
    run(sglang_path, str(program))
