"""Comparison by the rule of the field: an op may err at most 1.25 times as much as the plain formulation in its
dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float32: 2.0**-20, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`got` against the float64 `exact`, allowed 1.25 times the error of `plain` (or the dtype's own rounding)."""
    assert got.shape == exact.shape
    assert torch.isfinite(got).all(), "not written, or not finite"
    allowed = max(1.25 * relative_error(plain, exact), FLOOR[got.dtype] / 8)
    error = relative_error(got, exact)
    assert error <= allowed, f"relative error {error:.3e}, allowed {allowed:.3e}"
    scale = exact.double().abs().max()
    worst = float((got.double() - exact.double()).abs().max() / scale)
    worst_plain = float((plain.double() - exact.double()).abs().max() / scale)
    assert worst <= max(2 * worst_plain, 4 * FLOOR[got.dtype]), f"worst element off by {worst:.3e} of the largest"


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance of two tensors of one dtype in representable steps."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    sign = torch.iinfo(integer).min

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integer).long()
        return torch.where(bits < 0, sign - bits, bits)

    return (ordered(a) - ordered(b)).abs()
