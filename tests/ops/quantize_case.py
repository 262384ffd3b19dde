"""What the tests of the ops that give int8 codes share."""

from __future__ import annotations

import torch
from helpers import same_bits
from torch import Tensor

from ops.norm_case import Refusals

FORMS = ((False, False), (False, True), (True, False), (True, True))  # signs, rotation
SHAPES = ((2, 5, 48), (1, 1, 128), (3, 2, 54), (2, 3, 200), (1, 7, 1536), (1, 2, 5120))


def random_signs(dim: int, given: bool = True) -> Tensor | None:
    if not given:
        return None
    generator = torch.Generator().manual_seed(dim)
    return (2 * torch.randint(0, 2, (-(-dim // 128) * 128,), generator=generator) - 1).to(torch.int8)


def assert_close_codes(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Codes at most one step from the float64 ones, in at most one of a thousand, or two in all: half a padded block
    of zeros makes a block's values equal in pairs. Scales to float32's rounding.
    """
    assert got[0].dtype == torch.int8 and got[1].dtype == torch.float32
    assert got[0].shape == exact[0].shape and got[1].shape == exact[1].shape
    apart = (got[0].int() - exact[0].int()).abs()
    assert apart.max() <= 1, f"codes are {int(apart.max())} steps apart"
    assert apart.count_nonzero() <= 1e-3 * apart.numel() + 2
    torch.testing.assert_close(got[1], exact[1], rtol=2e-5, atol=0)


def assert_same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Bit for bit, NaN scales where the others are."""
    assert got[0].dtype == expected[0].dtype == torch.int8 and torch.equal(got[0], expected[0])
    assert torch.equal(got[1].isnan(), expected[1].isnan())
    assert same_bits(got[1].nan_to_num(), expected[1].nan_to_num())


def signs_refusals() -> Refusals:
    """What every quantising op refuses of the signs of x [2, 5, 48]."""
    return {
        "signs shape": (
            lambda a: {"signs": random_signs(48)[:48].clone()}, ValueError,
            r"signs: got shape \[48\], must be \[128\], x's 48 channels in whole blocks of 128",
        ),
        "signs dtype": (
            lambda a: {"signs": random_signs(48).float()}, TypeError, "signs: got torch.float32 .*must be torch.int8",
        ),
        "signs meta": (lambda a: {"signs": random_signs(48).to("meta")}, TypeError, "signs: got .*on meta"),
        "signs stride": (lambda a: {"signs": random_signs(256)[::2]}, ValueError, r"signs: got stride \(2,\)"),
    }  # fmt: skip
