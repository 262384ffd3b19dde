"""Into how many segments the keys of an attention call are cut: a pure function of its shape."""

from __future__ import annotations

import pytest

from lingbot_kernels.ops._even_segments import TILE, even_segments


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "wanted"),
    [
        (4608, 40, 27144, 1),  # 10.9 waves of 11
        (4608, 20, 27144, 2),  # 5.5 waves would take 6; halves take 11 of half the length
        (4608, 10, 27144, 1),  # 2.7 waves of 3, and halves take 6 of half the length
        (4608, 20, 27143, 1),  # no halves of an odd number
        (4736, 12, 28080, 2),
        (4608, 40, 512, 1),  # the prompt: starting and merging cost more than the last wave
        (128, 1, 27144, 2),
    ],
)
def test_cuts_where_the_last_wave_is_ill_filled(queries: int, heads: int, keys: int, wanted: int) -> None:
    assert even_segments(queries, heads, keys, 132) == wanted


@pytest.mark.parametrize("multiprocessors", [78, 114, 132, 144])
def test_never_slower_than_whole_waves(multiprocessors: int) -> None:
    for heads in range(1, 41):
        cuts = even_segments(36 * TILE, heads, 27144, multiprocessors)
        assert 27144 % cuts == 0
        waves = [-(-36 * heads * n // multiprocessors) / n for n in (1, cuts)]
        assert cuts == 1 or waves[1] < waves[0]
