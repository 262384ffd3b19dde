"""Types of option values, checked while the command line is read: before torch is loaded, and under their option."""

from __future__ import annotations

import math
import re
from typing import Any

import click

MAX_COUNT = 100_000
MAX_PIXELS = 16_384
MAX_SEED = 2**63 - 1  # torch takes it on every device


class Count(click.IntRange):
    """A number of things that a command makes, keeps or repeats; bounded, so that nothing it holds grows without end.

    The bound is far above any use: a rollout's report has some kilobytes per chunk.
    """

    def __init__(self, least: int = 1, most: int = MAX_COUNT, name: str = "count") -> None:
        super().__init__(least, most)
        self.name = name


class Pixels(Count):
    """A height or width of the video that is a whole number of tokens: 16 pixels each."""

    def __init__(self) -> None:
        super().__init__(16, MAX_PIXELS, "pixels")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        pixels = int(super().convert(value, param, ctx))
        if pixels % 16:
            self.fail(f"{pixels} must be a multiple of 16.", param, ctx)
        return pixels


class Checked(click.ParamType):
    """A text, as `check` makes a value of it, or refuses it with a ValueError."""

    def check(self, text: str) -> Any:
        return text

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.check(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class Number(Checked):
    """A finite number above `above`, from `least` and up to `most`, each with None for no bound."""

    name = "number"

    def __init__(self, *, above: float | None = None, least: float | None = None, most: float | None = None) -> None:
        self.above, self.least, self.most = above, least, most

    def check(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        too_low = (self.above is not None and number <= self.above) or (self.least is not None and number < self.least)
        if not math.isfinite(number) or too_low or (self.most is not None and number > self.most):
            bounds = (("above", self.above), ("from", self.least), ("to", self.most))
            told = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
            raise ValueError(f"{text!r} must be {' '.join(['a number', *told])}")
        return number


class Name(Checked):
    """A name from a list that only the command knows, which checks it."""

    name = "names"


class Device(Checked):
    """A device's name; whether the machine has it is for torch to say.

    Args:
        kinds: which there may be; "auto" picks.
    """

    name = "device"

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds or ("auto", "cpu", "cuda", "cuda:N")

    def check(self, text: str) -> str:
        if text not in self.kinds and not ("cuda:N" in self.kinds and re.fullmatch(r"cuda:(0|[1-9]\d{0,2})", text)):
            raise ValueError(f"{text!r} must be {', '.join(self.kinds[:-1])} or {self.kinds[-1]}")
        return text


class Host(Checked):
    """A name or address to listen on; whether the machine has it is for the system to say."""

    name = "host"

    def check(self, text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,253}", text):
            raise ValueError(f"{text!r} must be a host name or an address")
        return text


class Text(Checked):
    """Words that mean something: not empty, and of bounded length."""

    name = "text"

    def __init__(self, most: int = 100_000) -> None:
        self.most = most

    def check(self, text: str) -> str:
        if not text.strip() or len(text) > self.most:
            raise ValueError(f"has {len(text)} characters, must say something in at most {self.most}")
        return text


class Keys(Checked):
    """Keys held, as `parse_actions` reads them."""

    name = "keys"

    def check(self, text: str) -> str:
        from lingbot_kernels.models.poses import parse_actions

        parse_actions(text, limit=0)
        return text


class CameraScale(Checked):
    """clip, running, or the length that translations are divided by."""

    name = "scale"

    def check(self, text: str) -> str:
        try:
            if text not in ("clip", "running"):
                Number(above=0).check(text)
        except ValueError:
            raise ValueError(f"{text!r} must be clip, running or a positive number") from None
        return text
