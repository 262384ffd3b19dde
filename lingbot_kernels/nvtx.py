"""Ranges for profilers around chunks, steps, block phases and ops: domain "lingbot_kernels", off by default.

LINGBOT_KERNELS_NVTX=1 or `enable()` turns them on. A range is then seen by NVTX readers (nsys, ncu) and by
torch.profiler alike.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

DOMAIN = "lingbot_kernels"
_Function = TypeVar("_Function", bound=Callable[..., Any])
_OFF: AbstractContextManager[Any] = contextlib.nullcontext()


def _marker() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """(push, pop) of NVTX ranges: of the `nvtx` package, which knows domains; else of torch, with the domain as a
    prefix of the name; None where there is neither.
    """
    try:
        import nvtx
    except ImportError:
        if not torch.cuda.is_available():
            return None
        return lambda name: torch.cuda.nvtx.range_push(f"{DOMAIN}:{name}"), torch.cuda.nvtx.range_pop
    return lambda name: nvtx.push_range(name, domain=DOMAIN), lambda: nvtx.pop_range(domain=DOMAIN)


class _Range:
    """One open range: an NVTX range, and within it torch.profiler's "lingbot_kernels:<name>"."""

    __slots__ = ("_marker", "_name", "_record")

    def __init__(self, name: str, marker: tuple[Callable[[str], Any], Callable[[], Any]] | None) -> None:
        self._name = name
        self._marker = marker

    def __enter__(self) -> None:
        if self._marker is not None:
            self._marker[0](self._name)
        self._record = torch.profiler.record_function(f"{DOMAIN}:{self._name}")
        self._record.__enter__()

    def __exit__(self, *error: object) -> None:
        self._record.__exit__(*error)
        if self._marker is not None:
            self._marker[1]()


_enabled = False
_active_marker: tuple[Callable[[str], Any], Callable[[], Any]] | None = None


def enable(on: bool = True) -> None:
    """Turn ranges on or off for this process. What a captured CUDA graph replays has no ranges within it."""
    global _enabled, _active_marker
    _active_marker = _marker() if on else None
    _enabled = on


def enabled() -> bool:
    return _enabled


def range(name: str) -> AbstractContextManager[Any]:
    """A context manager that marks its block as `name`; while ranges are off, one shared null context.

    torch.compile leaves ranges out of what it compiles; those of ops stay, since ops run as they are.
    """
    if not _enabled or torch.compiler.is_compiling():
        return _OFF
    return _Range(name, _active_marker)


def ranged(name: str) -> Callable[[_Function], _Function]:
    """Decorator: the whole of a function's body as a range `name`."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if not _enabled:
                return function(*args, **kwargs)
            with range(name):
                return function(*args, **kwargs)

        return marked  # type: ignore[return-value]

    return decorate


enable(os.environ.get("LINGBOT_KERNELS_NVTX", "0") == "1")
