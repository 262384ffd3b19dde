"""How an op is declared: a function with the op's typed arguments, which checks them and says what a launch needs.

    @kernel_op("rms_norm", returns=("y",))
    def _op(x: Tensor, weight: Tensor, eps: float) -> Launch:
        _check.tokens("x", x)
        _check.weight("weight", weight, x.shape[2], x)
        return Launch([Output(x)], {**sizes(x), "dtype": x.dtype})

All else follows. Its signature gives the schema; its checks and outputs give the fake; arguments and outputs go by
their names to the fields of the compiled core's struct, to the Triton launcher and to the reference.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lingbot_kernels.ring import RingPosition

Written = Annotated[Tensor, "written"]  # a tensor that the op writes
Varying = Annotated[int, "varying"]  # an int from 0 on that differs from call to call under one signature

_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}
_RING: dict[str, Any] = {"chunk_start": Varying, "cursor": Tensor | None, "sink": int}  # what a RingPosition is made of


@dataclass(frozen=True)
class Output:
    """A contiguous tensor that a call allocates: on the device of `like`, an argument, with its shape and dtype
    where none is given.
    """

    like: Tensor
    shape: Sequence[int] | None = None
    dtype: torch.dtype | None = None

    def new(self, *shape: int) -> Tensor:
        """Such a tensor, or an empty one of another shape that stands for it."""
        wanted = shape or (self.like.shape if self.shape is None else self.shape)
        return self.like.new_empty(wanted, dtype=self.like.dtype if self.dtype is None else self.dtype)


@dataclass(frozen=True)
class Addresses:
    """A field that points to addresses in host memory: so many that are not read, then those of the tensors in the
    arguments `names`, one list after the other. A struct has one such field at most.
    """

    names: tuple[str, ...]
    unread: int = 0


@dataclass(frozen=True)
class Launch:
    """What a valid call needs. It may depend on nothing but the signature of the arguments: shapes, strides, dtypes,
    devices, alignment, and numbers that are not `Varying`. Later calls of that signature run by it unchecked.

    Attributes:
        outputs: what a call returns, in the order of the declaration's `returns`.
        fields: fields of the compiled core's struct (csrc/params.h), nested ones as "q_out.token_stride", that have no
            value by their names: neither an argument's or output's, nor (batch_stride, token_stride) an argument's
            strides. A dtype is handed over as its code, a sequence of ints as an array in host memory.
    """

    outputs: Sequence[Output] = ()
    fields: Mapping[str, int | torch.dtype | Sequence[int] | Addresses] = field(default_factory=dict)


def sizes(x: Tensor) -> dict[str, Any]:
    """The fields batch, tokens and dim of token-major x [B, S, D]."""
    return dict(zip(("batch", "tokens", "dim"), x.shape, strict=True))


class Signature:
    """The arguments of a declared op as `torch.library` has them: a RingPosition is three of them, the rest are one.

    Attributes:
        names: of the arguments, in order.
        written, varying: those names that are so annotated.
        differing: names of what may be another object in a call of the same signature: tensors, lists of them, varying
            ints.
        returns: names of what the op returns and a launch allocates.
        absent: names that the kernels know and the op has not: nothing is handed over for them.
        schema: of the arguments, as torch.library writes it.
    """

    def __init__(self, function: Callable[..., Any], returns: Sequence[str] = (), absent: Sequence[str] = ()) -> None:
        hints = get_type_hints(function, include_extras=True)
        parameters = [(name, hints[name]) for name in inspect.signature(function).parameters]
        flat = [x for name, hint in parameters for x in (_RING.items() if hint is RingPosition else [(name, hint)])]
        self.names = tuple(name for name, _ in flat)
        self.written = [name for name, hint in flat if _is(hint, "written")]
        self.varying = [name for name, hint in flat if _is(hint, "varying")]
        self.differing = [name for name, hint in flat if name in self.varying or _holds_tensors(hint)]
        self.schema = ", ".join(f"{self._type(name, hint)} {name}" for name, hint in flat)
        self.returns, self.absent = tuple(returns), tuple(absent)
        self._ring = next((name for name, hint in parameters if hint is RingPosition), None)

    def arguments(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The function's arguments by name, from the values of `names`."""
        values = dict(zip(self.names, flat, strict=True))
        if self._ring is not None:
            values[self._ring] = RingPosition(*(values.pop(name) for name in ("chunk_start", "sink", "cursor")))
        return values

    def _type(self, name: str, hint: Any) -> str:
        """The schema's type of an annotation."""
        inner = [x for x in get_args(hint) if x is not type(None)]
        if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1:
            return f"{self._type(name, inner[0])}?"
        if get_origin(hint) is Annotated:
            letter = chr(ord("a") + self.written.index(name)) if name in self.written else None
            return f"{_TYPES[inner[0]]}({letter}!)" if letter else _TYPES[inner[0]]
        if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Sequence):
            return f"{self._type(name, inner[0])}[]"
        return _TYPES[hint]


def _is(hint: Any, mark: str) -> bool:
    """Whether an annotation, or one within it, carries this mark."""
    return mark in getattr(hint, "__metadata__", ()) or any(_is(inner, mark) for inner in get_args(hint))


def _holds_tensors(hint: Any) -> bool:
    return hint is Tensor or any(_holds_tensors(inner) for inner in get_args(hint))
