"""The random signs that channels get before they are rotated: fixed by a seed, on every machine and release alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lingbot_kernels.reference.rotate_quantize import padded_width

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of SplitMix64 (Steele, Lea and Flood 2014)


def _mixed(state: int) -> int:
    """SplitMix64's output for a state."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


@functools.lru_cache(maxsize=32)
def _signs(width: int, seed: int) -> Tensor:
    words = [_mixed((seed + (i + 1) * _STEP) & _MASK) for i in range(-(-width // 64))]
    signs = [1 - 2 * (word >> bit & 1) for word in words for bit in range(64)]
    return torch.tensor(signs[:width], dtype=torch.int8, device="cpu")


def random_signs(width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """int8 [Kp] of +1 and -1, Kp being `width` filled up to whole blocks of the rotation; bits of SplitMix64.

    Not torch's generator: a checkpoint says nothing but the seed, and must be read by every later release.
    """
    return _signs(padded_width(width), seed).to(device, copy=True)
