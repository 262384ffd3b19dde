"""Into how many segments of keys a call of flash-attn-4 is best cut on Hopper: a pure function of its shape."""

from __future__ import annotations

import functools

import torch

TILE = 128  # queries
# Measured on an H100 with head_dim 128, bfloat16.
_KEYS_A_US = 80.0  # that a tile takes
_START_KEYS = 256  # what starting a tile costs, in keys
_MERGED_US = 128 * 2 / 3.0e6  # a head's row of 128 channels at 3.0 TB/s
_MERGE_START_US = 4.0
_WORTH = 0.96  # of the time of an uncut call, at most
_MOST = 2  # more gave nothing: with fewer tiles at a time the clock rises, for the GPU is bound by its power


def even_segments(queries: int, heads: int, keys: int, multiprocessors: int) -> int:
    """Into how many equal segments (1 or 2) flash-attn-4 on Hopper best cuts the keys of a call, head_dim 128.

    It gives each multiprocessor one tile of 128 queries of a head at a time, so a last wave that fills only part of
    the GPU costs as much as a full one: 12 heads x 37 tiles on 132 multiprocessors take 4 waves for 3.4.
    A call over segments has smaller tiles, and then its results to merge.

    Args:
        queries: of all videos together, each one's rounded up to tiles.
    """
    tiles = heads * -(-queries // TILE)

    def microseconds(segments: int) -> float:
        waves = -(-tiles * segments // multiprocessors)
        merge = _MERGE_START_US + (segments + 1) * queries * heads * _MERGED_US if segments > 1 else 0.0
        return waves * (keys / segments + _START_KEYS) / _KEYS_A_US + merge

    def fits(segments: int) -> bool:
        return keys % segments == 0 and (segments == 1 or microseconds(segments) < _WORTH * microseconds(1))

    return min(filter(fits, range(1, _MOST + 1)), key=microseconds)


@functools.cache
def hopper_multiprocessors(device: int) -> int:
    """Multiprocessors of a GPU that `even_segments` was measured on; 0 for others."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0
