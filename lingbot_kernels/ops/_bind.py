"""From what an op's declaration says of a call to a backend's function and what it is handed."""

from __future__ import annotations

import functools
import importlib
import inspect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.ops._declare import Addresses, Launch, Output, Signature

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STRIDES = {"batch_stride": 0, "token_stride": 1}


@dataclass(frozen=True, slots=True)
class Argument:
    """The call's argument of this index, which each call fills in."""

    index: int


class BoundLaunch:
    """A backend's function and its arguments, for every call of one signature.

    Attributes:
        arguments: of the function, 0 where it is filled in.
        slots: (position in `arguments`, index of the call's argument that goes there).
        addresses: tensors are handed over as addresses, and a stream's handle in place of the last argument where the
            device is CUDA; otherwise they are handed over as they are.
    """

    __slots__ = ("_device", "_function", "_held", "_outputs", "addresses", "arguments", "slots")

    def __init__(
        self, function: Callable[..., Any], handed: Sequence[Any], call: tuple[Any, ...], addresses: bool = False
    ) -> None:
        """`handed` is what the function gets: constants, an array for its address, and each `Argument` and `Output`."""
        self._function, self.addresses = function, addresses
        self._held = [x for x in handed if isinstance(x, array)]
        self.arguments = tuple([_placed(x) for x in handed])
        self.slots = [(i, x.index) for i, x in enumerate(handed) if isinstance(x, Argument)]
        self._outputs = [
            (i, next(source for source, value in enumerate(call) if value is x.like), _allocator(x))
            for i, x in enumerate(handed)
            if isinstance(x, Output)
        ]
        device = next(value.device for value in call if isinstance(value, Tensor))
        self._device = device.index if device.type == "cuda" else None

    def fill(self, call: tuple[Any, ...]) -> list[Any]:
        """The function's arguments for this call, without its outputs and the stream."""
        arguments = list(self.arguments)
        for position, source in self.slots:
            value = call[source]
            arguments[position] = value.data_ptr() if self.addresses and isinstance(value, Tensor) else value
        return arguments

    def run(self, call: tuple[Any, ...], arguments: list[Any]) -> Any:
        """Allocate the outputs, launch on the tensors' device and its current stream, and return the outputs; where
        there are none, what the function returns.
        """
        outputs = []
        for position, source, allocate in self._outputs:
            output = allocate(call[source])
            arguments[position] = output.data_ptr() if self.addresses else output
            outputs.append(output)
        returned = None
        if self._device is None:
            returned = self._function(*arguments)
        elif self._device == torch._C._cuda_getDevice():
            returned = self._launch_on_stream(arguments)
        else:
            with torch.cuda.device(self._device):
                returned = self._launch_on_stream(arguments)
        if len(outputs) == 1:
            return outputs[0]
        return tuple(outputs) if outputs else returned

    def _launch_on_stream(self, arguments: list[Any]) -> Any:
        if self.addresses:
            arguments[-1] = torch._C._cuda_getCurrentRawStream(self._device)  # type: ignore[arg-type]
        return self._function(*arguments)


def _placed(x: Any) -> Any:
    return x.buffer_info()[0] if isinstance(x, array) else 0 if isinstance(x, (Argument, Output)) else x


def _allocator(output: Output) -> Callable[[Tensor], Tensor]:
    like, shape = output.like, torch.Size(output.like.shape if output.shape is None else output.shape)
    dtype, device = output.dtype or like.dtype, like.device
    if shape == like.shape and dtype == like.dtype and torch.empty_like(like).is_contiguous():
        return torch.empty_like  # the cheapest there is; it keeps the strides of what is dense but transposed
    strides = torch.empty(shape, device="meta").stride()
    return lambda _: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _standing(signature: Signature, call: tuple[Any, ...]) -> list[Any]:
    """What stands for each of the call's arguments in `BoundLaunch`: those that may differ under one signature are
    filled in, the others are constants.
    """
    return [
        Argument(i) if isinstance(value, (Tensor, list)) or name in signature.varying else value
        for i, (name, value) in enumerate(zip(signature.names, call, strict=True))
    ]


def by_name(signature: Signature, call: tuple[Any, ...], launch: Launch) -> dict[str, Any]:
    """What stands for each argument, output and absent name of the op in `BoundLaunch`."""
    named = dict.fromkeys(signature.absent)
    named.update(zip(signature.names, _standing(signature, call), strict=True))
    named.update(zip(signature.returns, launch.outputs, strict=True))
    return named


def bind_reference(formula: Callable[..., Any], signature: Signature, call: tuple[Any, ...]) -> BoundLaunch:
    """A plain function that takes the declaration's arguments by their names; where the op returns nothing, what the
    function returns is dropped.
    """

    def run(*values: Any) -> Any:
        returned = formula(**signature.arguments(values))
        return returned if signature.returns else None

    return BoundLaunch(run, _standing(signature, call), call)


@functools.cache
def triton_functions(kernel: str) -> tuple[tuple[Callable[..., Any], tuple[str, ...]], ...]:
    """`why_not` and the launcher of `lingbot_kernels.triton.<kernel>`, each with what it takes by position."""
    module = importlib.import_module(f"lingbot_kernels.triton.{kernel}")
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(
        (function, tuple(name for name, x in inspect.signature(function).parameters.items() if x.kind == positional))
        for function in (module.why_not, getattr(module, kernel))
    )


def triton_refusal(kernel: str, signature: Signature, call: tuple[Any, ...], launch: Launch) -> str | None:
    """Why the kernel can't serve this very call, or None. An empty tensor stands for an output."""
    why_not, names = triton_functions(kernel)[0]
    named = by_name(signature, call, launch)
    values = [named[name] for name in names]
    return why_not(
        *[call[x.index] if isinstance(x, Argument) else x.new(0) if isinstance(x, Output) else x for x in values]
    )


def bind_triton(kernel: str, signature: Signature, call: tuple[Any, ...], launch: Launch) -> BoundLaunch:
    """A Triton launcher, which gets arguments and outputs by the names of its parameters."""
    function, names = triton_functions(kernel)[1]
    named = by_name(signature, call, launch)
    return BoundLaunch(function, [named[name] for name in names], call)


@functools.cache
def struct_fields(function: Callable[..., None]) -> dict[str, tuple[str, str]]:
    """The fields of a core function's struct in their order, as csrc/bindings.cpp documents them, each with the first
    and the last part of its name: {"k_cache.ptr": ("k_cache", "ptr"), "eps": ("eps", "eps"), ...}.
    """
    names = str(function.__doc__).partition("(")[2].rpartition(", ")[0].split(", ")
    return {name: (name.partition(".")[0], name.rpartition(".")[2]) for name in names}


def bind_core(
    function: Callable[..., None], signature: Signature, call: tuple[Any, ...], launch: Launch
) -> BoundLaunch:
    """A function of the compiled core, which takes its struct's fields and then a stream or a number of threads.

    It raises RuntimeError with its message when it refuses or the launch fails.
    """
    named, fields, struct = by_name(signature, call, launch), launch.fields, struct_fields(function)
    if unknown := fields.keys() - struct.keys():
        raise TypeError(f"{', '.join(unknown)}: got them from the declaration, must be fields of the core's struct")
    handed = []
    for path, (head, leaf) in struct.items():
        if path in fields:
            value = _constant(path, fields[path])
        elif head in named:
            value = named[head] if leaf in (head, "ptr") else _stride(named[head], call, leaf)
        elif leaf in named:  # "ring.sink" is the sink
            value = named[leaf]
        else:
            raise TypeError(f"{path}: got no value from the declaration, must have one: the core's struct has it")
        handed.append(0 if value is None else value)
    position = next((i for i, value in enumerate(handed) if isinstance(value, Addresses)), None)
    if position is not None:
        lists: Any = handed[position]
        function = _gathering(function, position, lists)
        handed = [*(named[name] for name in lists.names), *handed]
    return BoundLaunch(function, (*handed, 0), call, addresses=True)


def _constant(path: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        if value not in DTYPE_CODES:
            raise TypeError(f"{path}: got {value}, must be float32, float16 or bfloat16")
        return DTYPE_CODES[value]
    return array("q", value) if isinstance(value, (list, tuple)) else value


def _gathering(function: Callable[..., None], position: int, lists: Addresses) -> Callable[..., None]:
    """`function` with lists of tensors before its arguments, of whose addresses the argument at `position` is told."""
    count, unread = len(lists.names), [0] * lists.unread

    def launch(*handed: Any) -> None:
        addresses = array("q", unread + [x.data_ptr() for xs in handed[:count] for x in xs])
        fields = handed[count:]
        function(*fields[:position], addresses.buffer_info()[0], *fields[position + 1 :])

    return launch


def _stride(operand: Argument | None, call: tuple[Any, ...], leaf: str) -> int:
    """Of a [B, tokens, ...] tensor; 0 where it is absent, or of a vector that the batch shares."""
    tensor = None if operand is None else call[operand.index]
    return 0 if tensor is None or tensor.dim() == 1 else tensor.stride(_STRIDES[leaf])
