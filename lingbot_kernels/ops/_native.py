"""The compiled core `lingbot_kernels._C`: whether it is there, what it was built with, and what it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from lingbot_kernels.ops._bind import BoundLaunch, core_recipe
from lingbot_kernels.ops._declare import Launch, Signature

_C: Any = None
try:
    _C = importlib.import_module("lingbot_kernels._C")
except ImportError as error:
    _missing = f"the compiled core is not importable ({error}); install with `pip install -e .`"
else:
    _missing = ""

# The process's own environment, which os.environ writes through to: os.environ.get takes longer than a launch's checks.
environment: Callable[[str], str | None] = os.environ.get if _C is None else _C.environment


def core() -> ModuleType | None:
    """The compiled core, or None where it was not built."""
    return _C


def why_not_cpu() -> str | None:
    return _missing or None


def why_not_cuda() -> str | None:
    if _missing:
        return _missing
    if not _C.compiled_with_cuda:
        return "the compiled core was built without CUDA (no nvcc, or LINGBOT_KERNELS_CUDA=0)"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    return None


def call_table(written: Sequence[int], varying: Sequence[int], limit: int) -> Any:
    """A `_C.CallTable` for calls with these arguments written and these ints varying; None without the compiled core.

    Releases of torch that don't export DLPack's function table (before 2.10) get a table that never finds a call.
    """
    if _C is None:
        return None
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return _C.CallTable(exchange, (torch.Tensor, torch.nn.Parameter), (torch.dtype,), written, varying, limit)


def plan(kernel: str, backend: str, signature: Signature, call: tuple[Any, ...], launch: Launch) -> BoundLaunch:
    """How the compiled core's function of this name carries out a launch with "cpu" or "cuda".

    The function raises RuntimeError with its message when it refuses or the launch fails.
    """
    function = getattr(getattr(_C, backend), kernel)
    return BoundLaunch(core_recipe(function, signature, frozenset(launch.fields)), call, launch)
