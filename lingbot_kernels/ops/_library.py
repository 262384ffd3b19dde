"""Registration with `torch.library`: each op has a schema that marks what it mutates, one implementation and a fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import nvtx

LIBRARY = torch.library.Library("lingbot_kernels", "DEF")
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None), int, float, str, bool, list, tuple, torch.dtype}


class RegisteredOp:
    """A registered op. A plain eager call goes straight to the implementation, which saves the dispatcher's several us;
    tracing, compiling, autograd, tensor subclasses and dispatch modes see the op as `torch.library` has it.
    """

    __slots__ = ("_implementation", "overload")

    def __init__(self, overload: Callable[..., Any], implementation: Callable[..., Any]) -> None:
        self.overload = overload
        self._implementation = implementation

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.overload(*arguments)
        grad = torch.is_grad_enabled()
        for argument in arguments:
            kind = type(argument)
            if kind not in _PLAIN or (grad and kind in _TENSORS and argument.requires_grad):
                return self.overload(*arguments)
        return self._implementation(*arguments)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> RegisteredOp:
    """Define `lingbot_kernels::<schema>` and return what calls it.

    The implementation serves every device: which backend runs is an argument of the op, resolved by the caller. The
    fake checks the arguments as the implementation does: it also runs where one of them is a meta tensor.
    """
    name = schema.split("(", 1)[0]
    ranged = nvtx.ranged(name)(implementation)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, ranged, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lingbot_kernels::{name}", fake, lib=LIBRARY)
    return RegisteredOp(getattr(torch.ops.lingbot_kernels, name).default, ranged)
