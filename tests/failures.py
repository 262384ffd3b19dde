"""Failures put into a call at any step: what the tests of sessions that survive them share."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import lingbot_kernels

ERRORS = (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError)
STRIDE = int(os.environ.get("LINGBOT_KERNELS_TEST_STRIDE", "13"))  # of the events that are interrupted; 1: every one
_PACKAGE = os.path.dirname(lingbot_kernels.__file__) + os.sep


class Interrupt:
    """While it is active, raises at event `at` of the package's functions: as one is called, or has returned.

    Not when the call that is tested is over and all that is left is to hand out its result.
    """

    HANDING_OUT = ("attempt", "denoise_chunk", "marked", "_causal_forward")

    def __init__(self, at: int, error: type[BaseException], tested: Any = None) -> None:
        self.at, self.error, self.seen, self.tested = at, error, 0, getattr(tested, "__code__", None)

    def __call__(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE) or event not in ("call", "return"):
            return
        if event == "return" and (code.co_name in self.HANDING_OUT or code is self.tested):
            return
        self.seen += 1
        if self.seen > self.at:
            sys.setprofile(None)
            raise self.error(f"injected at the {event} of {code.co_name}")

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)


class OutOfMemory(TorchFunctionMode):
    """The torch function with this index finds no memory; those that only tell of a tensor need none."""

    TELL = ("__get__", "_set_grad_enabled", "data_ptr", "dim", "is_contiguous", "is_inference", "untyped_storage")

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, itertools.count()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ not in self.TELL and next(self.calls) == self.at:
            raise torch.OutOfMemoryError("injected")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def failing(
    owner: Any, name: str, nth: int, after: bool = False, error: type[BaseException] = RuntimeError, here: bool = True
) -> Iterator[None]:
    """The nth call of `owner.name` raises, before it has done anything or when it has done everything."""
    original, calls = getattr(owner, name), itertools.count()

    def patched(*args: Any, **kwargs: Any) -> Any:
        hit = here and next(calls) == nth
        if hit and not after:
            raise error("injected")
        result = original(*args, **kwargs)
        if hit:
            raise error("injected")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, patched)
        yield
