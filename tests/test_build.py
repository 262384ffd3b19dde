"""The build: what setup.py decides, what the compiled core says of itself, and what goes into wheel and sdist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lingbot_kernels

ROOT = Path(__file__).resolve().parents[1]
VERSION = (ROOT / "lingbot_kernels" / "_version.py").read_text().split('"')[-2]


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a machine where no nvcc can be found."""
    spec = importlib.util.spec_from_file_location("lingbot_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("LINGBOT_KERNELS_CUDA", "LINGBOT_KERNELS_CUDA_ARCHITECTURES", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(module, "CUDA_FOLDER", str(tmp_path / "usr-local-cuda"))
    return module


def make_nvcc(folder: Path, known: str = "80 90 100 120") -> str:
    """An nvcc that only lists architectures."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in known.split()))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return str(nvcc)


def test_nvcc_on_path_then_cuda_home_then_usr_local(
    setup_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup_module.cuda_compiler() is None
    default = make_nvcc(tmp_path / "usr-local-cuda" / "bin")
    assert setup_module.cuda_compiler() == default
    home = make_nvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_module.cuda_compiler() == home
    on_path = make_nvcc(tmp_path / "empty")
    assert setup_module.cuda_compiler() == on_path
    monkeypatch.setenv("LINGBOT_KERNELS_CUDA", "1")
    assert setup_module.cuda_compiler() == on_path
    monkeypatch.setenv("LINGBOT_KERNELS_CUDA", "0")
    assert setup_module.cuda_compiler() is None


def test_cuda_insisted_on_without_nvcc(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGBOT_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="LINGBOT_KERNELS_CUDA=1, but nvcc is neither on PATH, nor in"):
        setup_module.cuda_compiler()
    monkeypatch.setenv("LINGBOT_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes'; it must be 0"):
        setup_module.cuda_compiler()


def test_architectures(setup_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_module.cuda_architectures(make_nvcc(tmp_path / "new")) == "80;90a;100a;120"
    assert setup_module.cuda_architectures(make_nvcc(tmp_path / "old", known="75 80 89 90")) == "80;90a"
    for asked in ("90a", "80;100f;120"):
        monkeypatch.setenv("LINGBOT_KERNELS_CUDA_ARCHITECTURES", asked)
        assert setup_module.cuda_architectures("not run") == asked
    monkeypatch.setenv("LINGBOT_KERNELS_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(SystemExit, match="'sm_90'; it must look like '90a'"):
        setup_module.cuda_architectures("not run")


def test_the_core_tells_its_version_and_backends() -> None:
    _C = pytest.importorskip("lingbot_kernels._C")
    assert _C.version == VERSION
    assert _C.cpu_isa in _C.cpu.isas and _C.cpu.isas[-1] == "generic"
    assert _C.compiled_with_cuda == hasattr(_C, "cuda") == bool(_C.cuda_architectures)
    assert re.fullmatch(r"(\d+[af]?(;\d+[af]?)*)?", _C.cuda_architectures)


def test_the_stub_names_the_arguments_of_the_core() -> None:
    _C = pytest.importorskip("lingbot_kernels._C")
    tree = ast.parse((ROOT / "lingbot_kernels" / "_C.pyi").read_text())
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}

    def stub_of(name: str) -> dict[str, list[str]]:
        functions = [f for f in classes[name] if isinstance(f, ast.FunctionDef) and f.name != "set_isa"]
        return {f.name: [arg.arg for arg in f.args.posonlyargs[1:-1]] for f in functions}

    both, alone = stub_of("_Ops"), stub_of("_Cpu")
    backends = [(_C.cpu, "threads", {**both, **alone})]
    if _C.compiled_with_cuda:
        backends.append((_C.cuda, "stream", both))
    for backend, last, stub in backends:
        compiled = {}
        for name, function in vars(backend).items():
            if name.startswith("_") or not callable(function) or name == "set_isa":
                continue
            *arguments, last_argument = function.__doc__.removeprefix(f"{name}(").removesuffix(")").split(", ")
            compiled[name] = [argument.replace(".", "_") for argument in arguments]
            assert last_argument == last
        assert compiled == stub


def test_the_stub_is_what_the_program_writes() -> None:
    pytest.importorskip("lingbot_kernels._C")
    make_stub = runpy.run_path(str(ROOT / "csrc" / "make_stub.py"))
    assert make_stub["stub"]() == (ROOT / "lingbot_kernels" / "_C.pyi").read_text(), "run python csrc/make_stub.py"


def test_every_op_has_its_file_for_the_cpu() -> None:
    _C = pytest.importorskip("lingbot_kernels._C")
    ops = {name for name, f in vars(_C.cpu).items() if callable(f) and not name.startswith("_")} - {"set_isa"}
    shared = {"parallel", "dispatch"}
    assert {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} == ops | shared


def test_loads_without_a_driver_or_torch() -> None:
    pytest.importorskip("lingbot_kernels._C")
    code = "import sys; from lingbot_kernels import _C; assert 'torch' not in sys.modules; print(_C.version)"
    env = {**os.environ, "LD_LIBRARY_PATH": "", "PYTHONPATH": str(Path(lingbot_kernels.__path__[0]).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == VERSION


def test_links_no_cuda_library() -> None:
    _C = pytest.importorskip("lingbot_kernels._C")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads ELF files with ldd")
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked and "libcudart" not in linked and "torch" not in linked
