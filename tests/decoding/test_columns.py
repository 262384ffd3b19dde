"""Which columns a rank computes: pure arithmetic, held against a count of what each pixel depends on."""

from __future__ import annotations

import pytest

from lingbot_kernels.decoding.columns import Columns, split, stage_columns

REACHES = (6, 6, 6, 7)  # three residual blocks a stage, and the last convolution


def needed(pixels: set[int], width: int) -> list[set[int]]:
    """The columns of each stage that `pixels` depend on, one convolution at a time."""
    found = []
    for stage in reversed(range(len(REACHES))):
        for _ in range(REACHES[stage]):
            pixels = {near for x in pixels for near in (x - 1, x, x + 1) if 0 <= near < width}
        found.append(pixels)
        if stage:
            small = {near // 2 for x in pixels for near in (x - 1, x, x + 1) if 0 <= near < width}
            pixels, width = small, width // 2
    return found[::-1]


@pytest.mark.parametrize("columns", (Columns(0, 416), Columns(416, 832), Columns(400, 401), Columns(0, 832)))
def test_each_stage_reads_what_its_pixels_depend_on_and_hardly_more(columns):
    regions = stage_columns(columns, 832, REACHES)
    for region, want in zip(regions, needed(set(range(columns.low, columns.high)), 832), strict=True):
        assert region.low <= min(want) and region.high > max(want)
        assert min(want) - region.low <= 2 and region.high - 1 - max(want) <= 2


def test_the_halo_shrinks_from_stage_to_stage():
    widths = [region.width for region in stage_columns(Columns(0, 416), 832, REACHES)]
    assert widths == [66, 118, 220, 424]  # of 104, 208, 416 and 832


@pytest.mark.parametrize(("width", "ranks"), ((832, 1), (832, 2), (833, 2), (10, 3), (7, 7)))
def test_split_covers_every_column_once(width, ranks):
    parts = split(width, ranks)
    assert [x for part in parts for x in range(part.low, part.high)] == list(range(width))
    assert max(part.width for part in parts) - min(part.width for part in parts) <= 1


@pytest.mark.parametrize("ranks", (0, 9))
def test_too_many_ranks(ranks):
    with pytest.raises(ValueError, match=f"ranks: got {ranks}, must be from 1 to the frame's width 8"):
        split(8, ranks)
