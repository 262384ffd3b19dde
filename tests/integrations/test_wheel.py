"""The sdist of a checkout builds into a wheel that works in an empty environment, on the torch that is there."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "lingbot_kernels" / "_version.py").read_text().split('"')[-2]


def check(command: list[str], cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the files git knows of, without what builds left behind."""
    for module in ("setuptools", "pybind11"):
        pytest.importorskip(module)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("sdist")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    check([sys.executable, "-c", code], folder / "checkout", LINGBOT_KERNELS_CUDA="0")
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, by the build tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    check(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)],
        folder / "source" / f"lingbot_kernels-{VERSION}", LINGBOT_KERNELS_CUDA="0", CMAKE_BUILD_PARALLEL_LEVEL="2",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    check([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    check([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], folder, PYTHONPATH="")
    return python


@pytest.mark.slow
def test_the_sdist_has_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert names >= sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "lingbot_kernels/_C.pyi"}


@pytest.mark.slow
def test_the_wheel_says_what_it_needs(wheel):
    assert VERSION in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
    needs = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist")]
    assert "torch>=2.9" in needs and any(line.startswith("triton>=3.4;") for line in needs)
    assert {"diffusers", "docs", "triton", "fa4", "plot"} <= set(metadata.get_all("Provides-Extra"))
    assert {f"lingbot_kernels/{name}" for name in ("py.typed", "_C.pyi", "_version.py")} <= set(names)
    assert any(name.startswith("lingbot_kernels/_C.") and name.endswith((".so", ".pyd")) for name in names)
    assert not any(name.split("/")[0] in ("tests", "docs", "examples", "bench", "csrc") for name in names)


@pytest.mark.slow
def test_without_torch_the_package_imports_and_its_core_loads(environment, tmp_path):
    code = (
        "import lingbot_kernels; from lingbot_kernels import _C; "
        "print(lingbot_kernels.__file__, _C.cpu_isa, _C.version, _C.compiled_with_cuda)"
    )
    file, isa, version, with_cuda = check([str(environment), "-c", code], tmp_path, PYTHONPATH="").split()
    assert Path(file).is_relative_to(environment.parents[1]) and isa and (version, with_cuda) == (VERSION, "False")


@pytest.mark.slow
def test_with_torch_it_rolls_out(environment, tmp_path):
    site = check([str(environment), "-c", "import site; print(site.getsitepackages()[0])"], tmp_path, PYTHONPATH="")
    pth = Path(site.strip()) / "dependencies.pth"
    pth.write_text(sysconfig.get_path("purelib") + "\n")
    try:
        check(
            [str(environment.parent / "lingbot-kernels"), "rollout", "--chunks", "1", "--height", "32", "--width", "32",
             "--device", "cpu", "--json", "r.json"],
            tmp_path, PYTHONPATH="",
        )  # fmt: skip
        where = check(
            [str(environment), "-c", "import lingbot_kernels as l; print(l.__file__)"], tmp_path, PYTHONPATH=""
        )
    finally:
        pth.unlink()
    assert Path(where.strip()).is_relative_to(environment.parents[1])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["environment"]["core"] and report["summary"]["backends"]["rms_norm"] == "cpu"
