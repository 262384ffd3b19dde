"""What the readers of parts share: packages of an extra, and files of pickled or mapped weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.components.folders import BadPart

_PACKAGES = {"av": "av", "PIL": "pillow"}


def require(module: str) -> Any:
    """Import a module of the extra `pipeline`.

    Raises:
        ImportError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module, module.split(".")[0])
        raise ImportError(
            f"the pipeline needs {package}, which can't be imported ({error}): pip install 'lingbot-kernels[pipeline]'"
        ) from error


def read_pickled(part: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, mapped from it; a pickle may hold nothing but tensors.

    Raises:
        BadPart: naming the part, the file and what is wrong.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise whatever the damage leads to
        raise BadPart(f"{part}: {path}: can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise BadPart(f"{part}: {path}: holds {type(stored).__name__}, must hold a dict of tensors")
    return stored
