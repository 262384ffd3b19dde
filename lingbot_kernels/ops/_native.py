"""The compiled core `lingbot_kernels._C`: whether it is there, what it was built with, and how tensors are handed to
it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

_C: Any = None
try:
    _C = importlib.import_module("lingbot_kernels._C")
except ImportError as error:
    _missing = f"the compiled core is not importable ({error}); install with `pip install -e .`"
else:
    _missing = ""

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


def launch(backend: str, op: str, device: torch.device, *args: Any) -> None:
    """Call op's launcher with the fields of its parameter struct, on the current stream or with the default thread
    count.

    Raises RuntimeError with the launcher's message when it refuses or the launch fails.
    """
    if backend == "cpu":
        getattr(_C.cpu, op)(*args, 0)
    elif device.index == torch._C._cuda_getDevice():
        getattr(_C.cuda, op)(*args, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            getattr(_C.cuda, op)(*args, torch._C._cuda_getCurrentRawStream(device.index))


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Pointer, batch stride and token stride of a [B, S, D] operand; zeros where it is absent."""
    if tensor is None:
        return (0, 0, 0)
    return (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def vector(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Pointer and batch stride of a float32 [D] or [B, D] modulation vector."""
    if tensor is None:
        return (0, 0)
    return (tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0)
