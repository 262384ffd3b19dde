"""Builds lingbot_kernels._C with CMake: the CPU part always, csrc/cuda when nvcc is found.

LINGBOT_KERNELS_CUDA: 0 never compiles CUDA, 1 insists on it.
LINGBOT_KERNELS_CUDA_ARCHITECTURES: such as "90a" or "80;90a".
CMAKE_BUILD_PARALLEL_LEVEL: compilers at a time. The build folder under build/ is kept, so that a second build is quick.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "90a", "100a", "120")
CUDA_FOLDER = "/usr/local/cuda"


def find_nvcc() -> str | None:
    """nvcc on PATH, else in CUDA_HOME, else in /usr/local/cuda."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), CUDA_FOLDER) if home]
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=str(home / "bin")) for home in homes)]
    return next((nvcc for nvcc in candidates if nvcc), None)


def cuda_compiler() -> str | None:
    """The nvcc to build with; None for a build without CUDA."""
    wanted = os.environ.get("LINGBOT_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(
            f"LINGBOT_KERNELS_CUDA is {wanted!r}; it must be 0 (never), 1 (insist) or unset (if nvcc is found)"
        )
    if wanted == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise SystemExit(
            f"LINGBOT_KERNELS_CUDA=1, but nvcc is neither on PATH, nor in $CUDA_HOME/bin, nor in {CUDA_FOLDER}/bin"
        )
    return nvcc


def cuda_architectures(nvcc: str) -> str:
    """The architectures to compile for, "80;90a": those asked for, else the default ones this nvcc knows."""
    asked = os.environ.get("LINGBOT_KERNELS_CUDA_ARCHITECTURES", "")
    if asked:
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", asked):
            raise SystemExit(f"LINGBOT_KERNELS_CUDA_ARCHITECTURES is {asked!r}; it must look like '90a' or '80;90a'")
        return asked
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in DEFAULT_ARCHITECTURES if f"compute_{arch.rstrip('a')}" in listed]
    if len(known) < len(DEFAULT_ARCHITECTURES):
        print(f"{nvcc} is too old for some of {DEFAULT_ARCHITECTURES}: compiling for {known}", flush=True)
    return ";".join(known)


def tool(name: str) -> str:
    """A build tool next to this interpreter, or on PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"{name} was not found; pip install {name}, or install without --no-build-isolation")
    return found


class CMakeBuild(build_ext):
    """Configures and builds with CMake where setuptools would call the compiler."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        nvcc = cuda_compiler()
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build / "lib"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LINGBOT_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["LINGBOT_CUDA_ARCHITECTURES"] = cuda_architectures(nvcc)
        cmake = tool("cmake")
        print(f"lingbot_kernels._C: {'CUDA with ' + nvcc if nvcc else 'no CUDA'}, in {build}", flush=True)
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *definitions])
        parallel = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.check_call([cmake, "--build", str(build), *parallel])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "lib" / target.name, target)


if __name__ == "__main__":
    setup(ext_modules=[Extension("lingbot_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
