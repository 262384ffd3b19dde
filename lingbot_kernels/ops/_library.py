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

from lingbot_kernels import nvtx, reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._bind import BoundLaunch, reference_recipe, triton_recipes, triton_refusal
from lingbot_kernels.ops._declare import Launch, Signature

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
    """A declared op. Called with the requested backend (or None), then with the arguments of its schema but the last,
    which is the backend that serves.
    """

    __slots__ = (
        "_declaration", "_find", "_formula", "_kernel", "_name", "_place", "_plan", "_signature", "_table", "overload"
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        declaration: Callable[..., Launch],
        signature: Signature,
        place: Callable[..., tuple[str, torch.dtype, int, int]],
        formula: Callable[..., Any],
    ) -> None:
        self._name, self._declaration, self._signature, self._place = name, declaration, signature, place
        self._formula, self._kernel, self._plan = formula, _dispatch.OPS[name].kernel or name, self._planned
        returned = ", ".join(["Tensor"] * len(signature.returns))
        schema = f"{name}({signature.schema}, str backend) -> {'Tensor' if returned == 'Tensor' else f'({returned})'}"
        self.overload = _define(schema, self._fake)
        LIBRARY.impl(name, nvtx.ranged(name)(self.dispatched), "CompositeExplicitAutograd")
        written, varying = ([signature.names.index(x) for x in some] for some in (signature.written, signature.varying))
        self._table = _native.call_table(written, varying, KEPT_CALLS)
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
        bound = self._plan(*arguments, backend)
        _check.disjoint(self._signature.written, dict(zip(self._signature.names, arguments, strict=True)))
        if self._table is not None:
            self._table.keep(call, bound, bound.arguments, bound.slots, bound.addresses)
        return bound.run(call, bound.fill(call))

    def _planned(self, *arguments_and_backend: Any) -> BoundLaunch:
        """How a call is carried out, if its arguments are valid (but for memory shared with a written one)."""
        *listed, backend = arguments_and_backend
        arguments, signature = tuple(listed), self._signature
        launch = self._declaration(**signature.arguments(arguments))
        if backend == "reference":
            return BoundLaunch(reference_recipe(self._formula, signature), arguments, launch)
        if backend != "triton":
            return _native.plan(self._kernel, backend, signature, arguments, launch)
        why_not, launcher = triton_recipes(self._kernel, signature)
        _dispatch.demand(self._name, backend, triton_refusal(why_not, arguments, launch))
        return BoundLaunch(launcher, arguments, launch)

    def _fake(self, *arguments_and_backend: Any) -> Any:
        """Of `torch.library`: checks and outputs alone; it also runs where an argument is a meta tensor."""
        outputs = self._declaration(**self._signature.arguments(arguments_and_backend[:-1])).outputs
        made = tuple([output.new() for output in outputs])
        return made[0] if len(made) == 1 else made or None


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `lingbot_kernels::<schema>`; gives what calls it through the dispatcher."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lingbot_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.lingbot_kernels, name).default


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> RegisteredOp:
    """Define an op that returns a tensor, with the implementation's typed arguments, and return what calls it.

    The implementation serves every device: which backend runs is an argument of the op, resolved by the caller. The
    fake checks the arguments as the implementation does: it also runs where one of them is a meta tensor.
    """
    overload = _define(f"{name}({Signature(implementation).schema}) -> Tensor", fake)
    ranged = nvtx.ranged(name)(implementation)
    LIBRARY.impl(name, ranged, "CompositeExplicitAutograd")
    return RegisteredOp(overload, ranged)


def kernel_op(
    name: str,
    returns: Sequence[str] = (),
    absent: Sequence[str] = (),
    place: Callable[..., tuple[str, torch.dtype, int, int]] = lambda first, *_: _dispatch.place(first),
    formula: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Launch]], KernelOp]:
    """Decorator: the declaration of an op with a home in every backend, as `lingbot_kernels.ops._declare` has it.

    Args:
        name: of the op in all its homes.
        returns: names of the outputs that it returns.
        absent: names that the kernels know and the op has not.
        place: (device type, dtype, tokens, dim) of the arguments, by which a backend is chosen; by default the first
            one's, token-major.
        formula: the op by the declaration's arguments, in plain torch; `reference.<name>` where None.
    """

    def declare(declaration: Callable[..., Launch]) -> KernelOp:
        signature = Signature(declaration, returns, absent)
        return KernelOp(name, declaration, signature, place, formula or getattr(reference, name))

    return declare
