"""How a checked call is carried out: the launcher, what it is handed and what is allocated for it.

A plan depends on the signature of a call's arguments alone (shapes, strides, dtypes, devices, alignment, numbers), so
that one plan serves every call of that signature; what differs between them is in the plan by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """A contiguous tensor that a call allocates: on the device of the argument `like`, with its shape and dtype where
    none is given.
    """

    name: str
    like: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Plan:
    """A launcher and its arguments: a str is the name of an op's argument or of an output, all else is a constant.

    Attributes:
        outputs: what a call returns; where there is none it returns what the launcher does.
        addresses: tensors are handed over as addresses (absent: 0), and a stream's handle in place of the last
            argument where the device is CUDA; otherwise as they are.
    """

    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: tuple[Output, ...] = ()
    addresses: bool = False


class BoundPlan:
    """A plan with its names resolved to positions, for calls with the arguments `names`."""

    __slots__ = ("_addresses", "_device", "_launcher", "_outputs", "arguments", "slots")

    def __init__(self, plan: Plan, names: tuple[str, ...], call: tuple[Any, ...]) -> None:
        position = {name: i for i, name in enumerate(plan.arguments) if isinstance(name, str)}
        self.arguments = tuple(0 if isinstance(value, str) else value for value in plan.arguments)
        self.slots = [
            (i, names.index(name))
            for i, name in enumerate(plan.arguments)
            if name in names and not (plan.addresses and call[names.index(name)] is None)
        ]
        outputs = []
        for output in plan.outputs:
            source = names.index(output.like)
            outputs.append((position[output.name], source, _allocator(output, call[source])))
        self._outputs = tuple(outputs)
        self._launcher = plan.launcher
        self._addresses = plan.addresses
        device = next(value.device for value in call if isinstance(value, Tensor))
        self._device = device.index if device.type == "cuda" else None

    @property
    def addresses(self) -> bool:
        return self._addresses

    def fill(self, call: tuple[Any, ...]) -> list[Any]:
        """The launcher's arguments for this call, without its outputs and the stream."""
        arguments = list(self.arguments)
        for position, source in self.slots:
            value = call[source]
            arguments[position] = value.data_ptr() if self._addresses and isinstance(value, Tensor) else value
        return arguments

    def run(self, call: tuple[Any, ...], arguments: list[Any]) -> Any:
        """Allocate the outputs, launch on the tensors' device and its current stream, and return the outputs."""
        outputs = []
        for position, source, allocate in self._outputs:
            output = allocate(call[source])
            arguments[position] = output.data_ptr() if self._addresses else output
            outputs.append(output)
        returned = None
        if self._device is None:
            returned = self._launcher(*arguments)
        elif self._device == torch._C._cuda_getDevice():
            returned = self._launch_on_stream(arguments)
        else:
            with torch.cuda.device(self._device):
                returned = self._launch_on_stream(arguments)
        if len(outputs) == 1:
            return outputs[0]
        return tuple(outputs) if outputs else returned

    def _launch_on_stream(self, arguments: list[Any]) -> Any:
        if self._addresses:
            arguments[-1] = torch._C._cuda_getCurrentRawStream(self._device)  # type: ignore[arg-type]
        return self._launcher(*arguments)


def _allocator(output: Output, like: Tensor) -> Callable[[Tensor], Tensor]:
    shape, dtype, device = output.shape or like.shape, output.dtype or like.dtype, like.device
    if shape == like.shape and dtype == like.dtype and torch.empty_like(like).is_contiguous():
        return torch.empty_like  # the cheapest there is; it keeps the strides of what is dense but transposed
    strides = torch.empty(shape, device="meta").stride()
    return lambda _: torch.empty_strided(shape, strides, dtype=dtype, device=device)
