"""Types of option values, checked while the command line is read: before torch is loaded, and under their option."""

from __future__ import annotations

import math
import re
from typing import Any

import click

MAX_COUNT = 100_000
MAX_PIXELS = 16_384


class Count(click.IntRange):
    """A number of things that a command makes, keeps or repeats; bounded, so that nothing it holds grows without end.

    The bound is far above any use: a rollout's report has some kilobytes per chunk.
    """

    name = "count"

    def __init__(self, least: int = 1, most: int = MAX_COUNT) -> None:
        super().__init__(least, most)


class Pixels(click.IntRange):
    """A height or width of the video that is a whole number of tokens: 16 pixels each."""

    name = "pixels"

    def __init__(self) -> None:
        super().__init__(16, MAX_PIXELS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        pixels = int(super().convert(value, param, ctx))
        if pixels % 16:
            self.fail(f"{pixels} must be a multiple of 16.", param, ctx)
        return pixels


class Seed(click.IntRange):
    """What torch takes for a seed on every device."""

    name = "integer"

    def __init__(self) -> None:
        super().__init__(0, 2**63 - 1)


class Number(click.ParamType):
    """A finite number above `above` and up to `most`, both with None for no bound."""

    name = "number"

    def __init__(self, *, above: float | None = None, least: float | None = None, most: float | None = None) -> None:
        self.above, self.least, self.most = above, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        too_low = (self.above is not None and number <= self.above) or (self.least is not None and number < self.least)
        if not math.isfinite(number) or too_low or (self.most is not None and number > self.most):
            self.fail(f"{value!r} must be {self.described()}.", param, ctx)
        return number

    def described(self) -> str:
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("above", self.above), ("from", self.least), ("to", self.most))
            if bound is not None
        ]
        return " ".join(["a number", *bounds])


class Name(click.ParamType):
    """A name from a list that only the command knows, which checks it."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


class Device(click.ParamType):
    """A device's name; whether the machine has it is for torch to say.

    Args:
        kinds: which there may be; "auto" picks.
    """

    name = "device"

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds or ("auto", "cpu", "cuda", "cuda:N")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.kinds and not ("cuda:N" in self.kinds and re.fullmatch(r"cuda:(0|[1-9]\d{0,2})", value)):
            self.fail(f"{value!r} must be {', '.join(self.kinds[:-1])} or {self.kinds[-1]}.", param, ctx)
        return str(value)


class Text(click.ParamType):
    """Words that mean something: not empty, and of bounded length."""

    name = "text"

    def __init__(self, most: int = 100_000) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.strip() or len(value) > self.most:
            self.fail(f"has {len(value)} characters, must say something in at most {self.most}.", param, ctx)
        return str(value)


class Keys(click.ParamType):
    """Keys held, as `parse_actions` reads them."""

    name = "keys"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from lingbot_kernels.models.poses import parse_actions

        try:
            parse_actions(value, limit=0)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        return str(value)


class CameraScale(click.ParamType):
    """clip, running, or the length that translations are divided by."""

    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("clip", "running"):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not (math.isfinite(number) and number > 0):
                self.fail(f"{value!r} must be clip, running or a positive number.", param, ctx)
        return str(value)
