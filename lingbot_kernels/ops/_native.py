"""The compiled core `lingbot_kernels._C`: whether it is there, what it was built with, and how tensors are handed to
it.
"""

from __future__ import annotations

import importlib
import os
from array import array
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from lingbot_kernels.ops._plan import Output, Plan

_C: Any = None
try:
    _C = importlib.import_module("lingbot_kernels._C")
except ImportError as error:
    _missing = f"the compiled core is not importable ({error}); install with `pip install -e .`"
else:
    _missing = ""

# The process's own environment, which os.environ writes through to: os.environ.get takes longer than a launch's checks.
environment: Callable[[str], str | None] = os.environ.get if _C is None else _C.environment

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def plan(op: str, backend: str, arguments: tuple[Any, ...], outputs: tuple[Output, ...] = ()) -> Plan:
    """The plan of op's launcher in the compiled core, which takes the fields of its parameter struct.

    The launcher raises RuntimeError with its message when it refuses or the launch fails.
    """
    return Plan(getattr(getattr(_C, backend), op), (*arguments, 0), outputs, addresses=True)


def plan_with_arrays(op: str, backend: str, arguments: tuple[Any, ...], lists: tuple[Any, ...]) -> Plan:
    """`plan` for a launcher that reads arrays in host memory while it runs.

    An `array` among the arguments is handed over by its address. So is one array of all the addresses in `lists`, which
    stand next to each other among the arguments: names of lists of tensors, or lists of addresses.
    """
    function = getattr(getattr(_C, backend), op)
    start = arguments.index(lists[0])
    stop = start + len(lists)

    def launch(*fields: Any) -> None:
        addresses = array("q", [x if isinstance(x, int) else x.data_ptr() for xs in fields[start:stop] for x in xs])
        after = (x.buffer_info()[0] if isinstance(x, array) else x for x in fields[stop:])
        function(*fields[:start], addresses.buffer_info()[0], *after)

    return Plan(launch, (*arguments, 0), addresses=True)


def rows(name: str, tensor: torch.Tensor | None) -> tuple[str, int, int]:
    """Pointer, batch stride and token stride of a [B, S, D] operand; zeros where it is absent."""
    return (name, 0, 0) if tensor is None else (name, tensor.stride(0), tensor.stride(1))


def vector(name: str, tensor: torch.Tensor | None) -> tuple[str, int]:
    """Pointer and batch stride of a float32 [D] or [B, D] modulation vector."""
    return (name, tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0)
