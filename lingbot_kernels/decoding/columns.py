"""Which columns each stage computes where a frame is split by width.

A rank computes its columns and, without talking to another, the few beside them that its pixels depend on: every 3 x 3
convolution reaches one column further. The halo is cut at each stage's begin, where it shrinks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """Columns [low, high) of a stage's frames."""

    low: int
    high: int

    @property
    def width(self) -> int:
        return self.high - self.low

    def widened(self, by: int, width: int) -> Columns:
        return Columns(max(0, self.low - by), min(width, self.high + by))


def stage_columns(out: Columns, width: int, reaches: Sequence[int]) -> list[Columns]:
    """The columns that each stage reads, first stage first, for the pixels `out` of a frame `width` wide.

    Args:
        out: pixel columns that are wanted.
        width: of the whole frame; halved at each stage from the last to the first.
        reaches: how many columns each stage's convolutions reach to either side.
    """
    found = []
    for stage, reach in reversed(list(enumerate(reaches))):
        read = out.widened(reach, width)
        if stage > 0:
            # The upsampling convolution makes whole pairs of columns, and reads one small column to either side.
            read = Columns(read.low - read.low % 2, read.high + read.high % 2)
            width //= 2
            out = Columns(read.low // 2, read.high // 2).widened(1, width)
        found.append(read)
    return found[::-1]


def split(width: int, ranks: int) -> list[Columns]:
    """Pixel columns of each rank: as even as they can be; the first take one more."""
    if not 1 <= ranks <= width:
        raise ValueError(f"ranks: got {ranks}, must be from 1 to the frame's width {width}")
    least, more = divmod(width, ranks)
    starts = [rank * least + min(rank, more) for rank in range(ranks + 1)]
    return [Columns(low, high) for low, high in itertools.pairwise(starts)]
