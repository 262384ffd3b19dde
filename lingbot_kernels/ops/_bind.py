"""From what an op's declaration says of a call to a backend's function and what it is handed.

A `Recipe` says what goes where, by names alone: it is made once an op and backend. A `BoundLaunch` follows it for the
calls of one signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.ops._declare import Addresses, Launch, Output, Signature

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STRIDES = {"batch_stride": 0, "token_stride": 1}


@dataclass
class Recipe:
    """What each argument of a backend's function is, by its position; an argument that none of these names is absent.

    Attributes:
        signature: of the call.
        size: how many arguments the function has.
        addresses: tensors are handed over as addresses (absent: 0) and, on CUDA, a stream's handle as the last
            argument; otherwise they are handed over as they are (absent: None).
        slots: (position, index in the call) of what each call fills in: tensors, lists of them, varying ints.
        constants: (position, index in the call) of the other arguments of the call.
        strides: (position, index in the call, dimension): of a tensor.
        fields: (position, name): of the launch.
        outputs: (index in the launch, position).
    """

    function: Callable[..., Any]
    signature: Signature
    size: int
    addresses: bool = False
    slots: list[tuple[int, int]] = field(default_factory=list)
    constants: list[tuple[int, int]] = field(default_factory=list)
    strides: list[tuple[int, int, int]] = field(default_factory=list)
    fields: list[tuple[int, str]] = field(default_factory=list)
    outputs: list[tuple[int, int]] = field(default_factory=list)

    def put(self, name: str, position: int) -> bool:
        """Put an argument or output there by its name; False where the op has no such name."""
        signature = self.signature
        if name in signature.names:
            index = signature.names.index(name)
            (self.slots if name in signature.differing else self.constants).append((position, index))
        elif name in signature.returns:
            self.outputs.append((signature.returns.index(name), position))
            self.outputs.sort()
        return name in signature.names or name in signature.returns or name in signature.absent


class BoundLaunch:
    """A backend's function and its arguments, for every call of one signature.

    Attributes:
        arguments: of the function; those of `slots` and the outputs are filled in at each call.
        slots: (position in `arguments`, index of the call's argument that goes there).
        addresses: as in `Recipe`.
    """

    __slots__ = ("_device", "_function", "_held", "_outputs", "_stream", "addresses", "arguments", "slots")

    def __init__(self, recipe: Recipe, call: Sequence[Any], launch: Launch) -> None:
        self.addresses, self._function, self._stream = recipe.addresses, recipe.function, recipe.size - 1
        self._held: list[Any] = []  # arrays that the function is told the address of
        handed: list[Any] = [0 if recipe.addresses else None] * recipe.size
        for position, index in recipe.constants:
            if call[index] is not None:
                handed[position] = call[index]
        for position, index, dim in recipe.strides:
            if call[index] is not None and call[index].dim() > 1:  # otherwise a vector that the batch shares
                handed[position] = call[index].stride(dim)
        self.slots = [slot for slot in recipe.slots if call[slot[1]] is not None]
        for position, name in recipe.fields:
            value = launch.fields[name]
            if isinstance(value, torch.dtype):
                handed[position] = _dtype_code(name, value)
            elif isinstance(value, list):
                self._held.append(array("q", value))
                handed[position] = self._held[-1].buffer_info()[0]
            elif isinstance(value, Addresses):
                sources = [recipe.signature.names.index(x) for x in value.names]
                self.slots += enumerate(sources, len(handed))  # the lists come after the arguments
                handed += [0] * len(sources)
                self._function = _gathering(recipe.function, position, len(sources), value.unread)
            else:
                handed[position] = value
        self.arguments = tuple(handed)
        self._outputs = []
        for which, position in recipe.outputs:
            output = launch.outputs[which]
            source = next(index for index, value in enumerate(call) if value is output.like)
            self._outputs.append((position, source, _allocator(output)))
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
            arguments[self._stream] = torch._C._cuda_getCurrentRawStream(self._device)  # type: ignore[arg-type]
        return self._function(*arguments)


def _dtype_code(name: str, dtype: torch.dtype) -> int:
    if dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: got {dtype}, must be float32, float16 or bfloat16")
    return DTYPE_CODES[dtype]


def _gathering(function: Callable[..., None], position: int, count: int, unread: int) -> Callable[..., None]:
    """`function`, followed by `count` lists of tensors, of whose addresses its argument at `position` is told."""
    before = [0] * unread

    def launch(*handed: Any) -> None:
        addresses = array("q", before + [x.data_ptr() for xs in handed[-count:] for x in xs])
        function(*handed[:position], addresses.buffer_info()[0], *handed[position + 1 : -count])

    return launch


def _allocator(output: Output) -> Callable[[Tensor], Tensor]:
    like, shape = output.like, torch.Size(output.like.shape if output.shape is None else output.shape)
    dtype, device = output.dtype or like.dtype, like.device
    if shape == like.shape and dtype == like.dtype and torch.empty_like(like).is_contiguous():
        return torch.empty_like  # the cheapest there is; it keeps the strides of what is dense but transposed
    strides = torch.empty(shape, device="meta").stride()
    return lambda _: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _by_names(function: Callable[..., Any], names: Sequence[str], signature: Signature) -> Recipe:
    """Of a Python function that takes these arguments and outputs."""
    recipe = Recipe(function, signature, len(names))
    for position, name in enumerate(names):
        if not recipe.put(name, position):
            raise TypeError(f"{name}: got a parameter of {function.__name__}, must be an argument or output of the op")
    return recipe


@functools.cache
def reference_recipe(formula: Callable[..., Any], signature: Signature) -> Recipe:
    """A plain function that takes the declaration's arguments by their names; where the op returns nothing, what the
    function returns is dropped.
    """

    def run(*values: Any) -> Any:
        returned = formula(**signature.arguments(values))
        return returned if signature.returns else None

    return _by_names(run, signature.names, signature)


@functools.cache
def triton_recipes(kernel: str, signature: Signature) -> tuple[Recipe, Recipe]:
    """`why_not` and the launcher of `lingbot_kernels.triton.<kernel>`, by the names of their positional parameters."""
    module = importlib.import_module(f"lingbot_kernels.triton.{kernel}")

    def recipe(function: Callable[..., Any]) -> Recipe:
        parameters = inspect.signature(function).parameters.values()
        return _by_names(function, [x.name for x in parameters if x.kind == x.POSITIONAL_OR_KEYWORD], signature)

    return recipe(module.why_not), recipe(getattr(module, kernel))


def triton_refusal(recipe: Recipe, call: Sequence[Any], launch: Launch) -> str | None:
    """What `why_not` says of this very call; an empty tensor stands for an output."""
    values: list[Any] = [None] * recipe.size
    for position, index in recipe.slots + recipe.constants:
        values[position] = call[index]
    for which, position in recipe.outputs:
        values[position] = launch.outputs[which].new(0)
    return recipe.function(*values)  # type: ignore[no-any-return]


@functools.cache
def core_recipe(function: Callable[..., None], signature: Signature, fields: frozenset[str]) -> Recipe:
    """A function of the compiled core, which takes its struct's fields and then a stream or a number of threads.

    csrc/bindings.cpp documents the fields, "q.ptr" for a nested one. A launch gives those in `fields`; the others have
    the name of an argument or an output, of one's `ptr` or stride, or ("ring.sink") end in an argument's name.
    """
    struct = str(function.__doc__).partition("(")[2].rpartition(", ")[0].split(", ")
    recipe = Recipe(function, signature, len(struct) + 1, addresses=True)
    if unknown := fields - set(struct):
        raise TypeError(f"{', '.join(unknown)}: got them from the declaration, must be fields of the core's struct")
    for position, path in enumerate(struct):
        head, _, leaf = path.partition(".")
        if path in fields:
            recipe.fields.append((position, path))
        elif leaf in _STRIDES and head in signature.names:
            recipe.strides.append((position, signature.names.index(head), _STRIDES[leaf]))
        elif head in signature.absent:
            continue
        elif not recipe.put(leaf if leaf not in ("", "ptr") else head, position):
            raise TypeError(f"{path}: got no value from the declaration, must have one: the core's struct has it")
    return recipe
