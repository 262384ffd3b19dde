"""Numbers that people pass: exact numpy scalars are taken, what only looks like a number is refused under its name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def as_real(name: str, value: Any, *, where: str = "a finite number") -> int | float:
    """`value` as a Python number, exactly: an int, a float or a numpy scalar of any precision.

    Raises:
        TypeError: a bool, a tensor, an array, a string or anything else that is no number.
        ValueError: NaN or infinite.
    """
    number = _as_number(name, value, where)
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, must be {where}")
    return number


def as_reals(name: str, values: Any) -> tuple[int | float, ...]:
    """A sequence of numbers, a numpy vector among them, as Python numbers, exactly. Their range is left to the caller.

    Raises:
        TypeError: a tensor (reading it would wait for the device), a string, a single number, an item that is none.
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)) or hasattr(values, "data_ptr"):
        hint = "; call .tolist()" if hasattr(values, "data_ptr") else ""
        raise TypeError(f"{name}: got {_described(values)}, must be a sequence of numbers{hint}")
    return tuple(_as_number(name, value, "a finite number") for value in values)


def _as_number(name: str, value: Any, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_described(value)}, must be {where}")
    return value if type(value) is int else float(value)


def as_count(name: str, value: Any, least: int) -> int:
    """`value` as a Python int of `least` or more; numpy integers are taken.

    Raises:
        ValueError: a bool, a float, a tensor or anything else that is no integer, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: got {_described(value)}, must be an int of {least} or more")
    return int(value)


def as_counts(name: str, values: Any, least: int, form: str) -> tuple[int, ...]:
    """A sequence of as many ints of `least` or more as `form` has, such as "(H, W)".

    Raises:
        TypeError: no sequence, or one of another length.
        ValueError: an item that `as_count` refuses.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != form.count(",") + 1:
        shown = values if isinstance(values, (list, tuple)) and len(values) < 9 else _described(values)
        raise TypeError(f"{name}: got {shown}, must be {form}")
    return tuple(as_count(name, value, least) for value in values)


def _described(value: Any) -> str:
    """The value where it is a plain one, else its type."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain and len(repr(value)) < 60 else type(value).__name__
