"""sglang for tests on a CPU: its wheel unpacked, the few small packages that its modules import, and plain torch in the
place of its kernels for CPUs, which are a package apart. No module of sglang's own is replaced.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "0.5.23"
# What its transformer and stage import, directly or not, and the project's test environment hasn't.
NEEDS = (
    "addict", "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated-doc", "annotated-types", "anyio",
    "apache-tvm-ffi", "asttokens", "attrs", "cache-dit", "compressed-tensors", "dill", "einops", "executing", "fastapi",
    "frozenlist", "gguf", "imageio", "ipython<9", "jedi", "loguru", "matplotlib-inline", "msgspec", "multidict",
    "openai", "orjson", "parso", "partial-json-parser", "pexpect", "prompt-toolkit", "propcache", "psutil",
    "ptyprocess", "pure-eval", "pybase64", "pyzmq", "sniffio", "stack-data", "starlette", "traitlets",
    "typing-inspection", "wcwidth", "yarl", "decorator", "requests",
)  # fmt: skip
# pydantic and its core must be of one another's versions: pip finds them out.
WITH_NEEDS = ("pydantic",)
# Real ones would bring a torch of their own; they are imported and never called.
STAND_INS = ("torchvision",)


class Unavailable(Exception):
    """The package index has no sglang of this version, or can't be reached."""


def folders() -> list[Path]:
    """What PYTHONPATH needs: downloaded once, kept in the user's cache."""
    kept = hashlib.sha256(repr((VERSION, NEEDS, WITH_NEEDS, sys.version_info[:2])).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lingbot-kernels-tests" / f"sglang-{kept}"
    package, needs, done = cache / "sglang", cache / "needs", cache / "done"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be fetching
        if not done.exists():
            _fetch(cache, package, needs)
            done.touch()
    return [package, needs]


def _fetch(cache: Path, package: Path, needs: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # The wheel names Python 3.12 for its launcher; its modules are for 3.11 as well.
    fetch = ["download", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--dest", str(cache)]
    _run([*pip, *fetch, f"sglang=={VERSION}"])
    with zipfile.ZipFile(next(cache.glob("sglang-*.whl"))) as wheel:
        wheel.extractall(package)
    _run([*pip, "install", "--target", str(needs), "--no-deps", *NEEDS])
    _run([*pip, "install", "--target", str(needs), *WITH_NEEDS])


def _run(command: Sequence[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = ran.stdout + ran.stderr
        if "No matching distribution" in said or "Connection" in said or "resolve" in said:
            raise Unavailable(said.strip().splitlines()[-1])
        raise RuntimeError(f"{' '.join(command)}:\n{said}")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not there, and gives them empty modules whose names are classes or fail when called."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _StandIn(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return enum.Enum(name, ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"])
        if name[0].isupper():
            return type(name, (), {})

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name}")

        return missing


def _residual_norm(
    residual: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor,
    shift: Tensor, norm_type: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(norm(r) * (1 + scale) + shift, r) with r = residual + gate * x, in float32 but for r, which is x's dtype."""
    assert norm_type == "layer"
    total = residual.float() + x.float() * (1.0 if gate is None else gate.float())
    affine = [None if p is None else p.float() for p in (weight, bias)]
    normed = F.layer_norm(total, total.shape[-1:], affine[0], affine[1], eps)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype), total.to(x.dtype)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, norm_type: str, eps: float
) -> Tensor:
    return _residual_norm(torch.zeros_like(x), x, None, weight, bias, scale, shift, norm_type, eps)[0]


def _scale_shift(x: Tensor, scale: Tensor, shift: Tensor, constant: float) -> Tensor:
    return (x.float() * (constant + scale.float()) + shift.float()).to(x.dtype)


def install() -> None:
    """In a process that has `folders()` on its path."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_StandIns())
    sys.modules["sgl_kernel"] = types.ModuleType("sgl_kernel")
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(
        "fused_scale_residual_norm_scale_shift_cpu(Tensor residual, Tensor x, Tensor? gate, Tensor? weight, "
        "Tensor? bias, Tensor scale, Tensor shift, str norm_type, float eps) -> (Tensor, Tensor)"
    )
    library.define(
        "fused_norm_scale_shift_cpu(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, "
        "str norm_type, float eps) -> Tensor"
    )
    library.define("fused_scale_shift_cpu(Tensor x, Tensor scale, Tensor shift, float constant) -> Tensor")
    library.impl("fused_scale_residual_norm_scale_shift_cpu", _residual_norm, "CPU")
    library.impl("fused_norm_scale_shift_cpu", _norm, "CPU")
    library.impl("fused_scale_shift_cpu", _scale_shift, "CPU")
    _kept.append(library)


_kept: list[torch.library.Library] = []
