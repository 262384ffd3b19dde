"""Registration with `torch.library`: each op has a schema that marks what it mutates, one implementation and a fake.

Most of what a call costs the host is checks. They depend on the signature of the arguments, so a call whose signature
was found valid before skips them: the compiled core finds it in a bounded table, looks at what differs from call to
call (addresses that must not overlap, a position that must not be negative) and fills in the launcher's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import nvtx
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._plan import BoundPlan, Plan

LIBRARY = torch.library.Library("lingbot_kernels", "DEF")
KEPT_CALLS = 256  # signatures an op keeps; a model has one or two, a server with many resolutions a few dozen
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None), int, float, str, bool, torch.dtype}


def _traced() -> bool:
    """Whether something watches what is called: compilation, tracing, a dispatch mode."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def _is_plain(arguments: Sequence[Any]) -> bool:
    """Whether neither autograd nor a tensor subclass has to see the call, be it for an item of a list."""
    grad = torch.is_grad_enabled()
    for argument in arguments:
        kind = type(argument)
        if kind is list or kind is tuple:
            if not _is_plain(argument):
                return False
        elif kind not in _PLAIN or (grad and kind in _TENSORS and argument.requires_grad):
            return False
    return True


class RegisteredOp:
    """A registered op. A plain eager call goes straight to the implementation, which saves the dispatcher's several us;
    tracing, compiling, autograd, tensor subclasses and dispatch modes see the op as `torch.library` has it.
    """

    __slots__ = ("_implementation", "overload")

    def __init__(self, overload: Callable[..., Any], implementation: Callable[..., Any]) -> None:
        self.overload = overload
        self._implementation = implementation

    def __call__(self, *arguments: Any) -> Any:
        if _traced() or not _is_plain(arguments):
            return self.overload(*arguments)
        return self._implementation(*arguments)


class KernelOp:
    """A registered op that has a home in every backend. Called with the requested backend (or None), then with the
    arguments of its schema but the last, which is the backend that serves.
    """

    __slots__ = ("_find", "_keep", "_name", "_names", "_place", "_plan", "_table", "_written", "overload")

    def __init__(
        self,
        name: str,
        overload: Any,
        plan: Callable[..., Plan],
        place: Callable[..., tuple[str, torch.dtype, int, int]],
        varying: Sequence[str],
    ) -> None:
        self.overload = overload
        self._name, self._plan, self._place = name, plan, place
        arguments = overload._schema.arguments
        self._names = tuple(argument.name for argument in arguments[:-1])  # the last is the backend
        self._written = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
        written, free = ([self._names.index(name) for name in some] for some in (self._written, varying))
        self._table = _native.call_table(written, free, KEPT_CALLS)
        self._find = self._table.find if self._table is not None else lambda call, grad: None

    def __call__(self, backend: str | None, *arguments: Any) -> Any:
        if _traced():
            return self.overload(*arguments, self._resolve(backend, arguments))
        if nvtx.enabled():
            with nvtx.range(self._name):
                return self._eager(backend, arguments)
        return self._eager(backend, arguments)

    def _eager(self, backend: str | None, arguments: tuple[Any, ...]) -> Any:
        # A backend that was asked for by name must serve, one of the surroundings need not: None tells them apart.
        call = (*arguments, _dispatch.requested_backend(), None) if backend is None else (*arguments, backend)
        found = self._find(call, torch.is_grad_enabled())
        if found is not None:
            return found[0].run(call, found[1])
        serving = self._resolve(backend, arguments)
        if not _is_plain(arguments):
            return self.overload(*arguments, serving)
        return self._checked(call, arguments, serving)

    def dispatched(self, *call: Any) -> Any:
        """The implementation that `torch.library` calls, for every device."""
        found = self._find(call, False)
        return self._checked(call, call[:-1], call[-1]) if found is None else found[0].run(call, found[1])

    def forget(self) -> None:
        """Drop every call that was found valid."""
        if self._table is not None:
            self._table.clear()

    def kept(self) -> int:
        """How many signatures are kept."""
        return 0 if self._table is None else len(self._table)

    def _resolve(self, backend: str | None, arguments: tuple[Any, ...]) -> str:
        return _dispatch.resolve(self._name, backend, *self._place(*arguments))

    def _checked(self, call: tuple[Any, ...], arguments: tuple[Any, ...], backend: str) -> Any:
        """Check the arguments, keep for calls like this one how it is carried out, and do so."""
        plan = self._plan(*arguments, backend)
        _check.disjoint(self._written, dict(zip(self._names, arguments, strict=True)))
        bound = BoundPlan(plan, self._names, arguments)
        if self._table is not None:
            self._table.keep(call, bound, bound.arguments, bound.slots, bound.addresses)
        return bound.run(call, bound.fill(call))


def _define(schema: str, fake: Callable[..., Any]) -> tuple[str, Any]:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lingbot_kernels::{name}", fake, lib=LIBRARY)
    return name, getattr(torch.ops.lingbot_kernels, name).default


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> RegisteredOp:
    """Define `lingbot_kernels::<schema>` and return what calls it.

    The implementation serves every device: which backend runs is an argument of the op, resolved by the caller. The
    fake checks the arguments as the implementation does: it also runs where one of them is a meta tensor.
    """
    name, overload = _define(schema, fake)
    ranged = nvtx.ranged(name)(implementation)
    LIBRARY.impl(name, ranged, "CompositeExplicitAutograd")
    return RegisteredOp(overload, ranged)


def register_kernel(
    schema: str,
    plan: Callable[..., Plan],
    fake: Callable[..., Any],
    place: Callable[..., tuple[str, torch.dtype, int, int]],
    varying: Sequence[str] = (),
) -> KernelOp:
    """Define `lingbot_kernels::<schema>`, whose last argument is the backend, and return what calls it.

    Args:
        plan: checks the arguments (but for memory shared with a written one) and says how the call is carried out. It
            may depend on nothing but the signature.
        fake: as in `register`.
        place: (device type, dtype, tokens, dim) of the arguments, by which a backend is chosen.
        varying: ints whose value is no part of the signature: the plan refuses negative ones and names the others.
    """
    name, overload = _define(schema, fake)
    op = KernelOp(name, overload, plan, place, varying)
    LIBRARY.impl(name, nvtx.ranged(name)(op.dispatched), "CompositeExplicitAutograd")
    return op
