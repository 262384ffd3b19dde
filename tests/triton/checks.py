"""What the kernel checks share: the device they run on, poisoned tensors and the tolerance rule."""

from __future__ import annotations

import torch
from triton import knobs

INTERPRETED = knobs.runtime.interpret
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN: what a kernel leaves unwritten is seen."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


FLIPS = {torch.bfloat16: 1e-3, torch.float16: 1e-2}


def assert_as_good_as(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The error of `got` against the float64 `exact` is that of the plain torch formulation in the same dtype.

    Its norm may be 1.25 times as large, its largest element twice, both plus a few float32 roundings. In 16 bits all
    but a share FLIPS of the elements must have the plain formulation's very bits.
    """
    assert got.shape == exact.shape and got.dtype == plain.dtype
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
    error, allowed = (got.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.norm() <= 1.25 * allowed.norm() + 2e-7 * exact.norm()
    assert error.max() <= 2 * allowed.max() + 1e-6 * exact.abs().max()
    if got.dtype != torch.float32:
        assert (got != plain).float().mean() <= FLIPS[got.dtype]
