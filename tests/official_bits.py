"""The official eager chain in bfloat16, and how many bits of it an op keeps: for the CPU's and the GPU's tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_kernels import RingPosition, ops, reference

GRID = (29, 52)  # rows and columns of a frame
START = 5 * GRID[0] * GRID[1]
HEAD_DIM = 128


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm with the two roundings of the official model; x [B, S, D]."""
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """RoPE as a float64 complex product, rounded once.

    x [B, S, D], table cos‖sin [S, head_dim] -> [B, S, heads, head_dim].
    """
    heads = x.shape[-1] // table.shape[-1]
    pairs = torch.view_as_complex(x.unflatten(-1, (heads, -1)).double().unflatten(-1, (-1, 2)))
    turn = torch.complex(*table.double().chunk(2, dim=-1))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)


def share_apart(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the elements whose bits differ, after a look at how far they are apart.

    All but two millionths are within one step at the magnitude of their rotated pair (where a * cos and b * sin cancel,
    the result is far smaller than what was rounded), none is over two: a step of the norm may become two where the
    weight is multiplied and rounded.
    """
    apart = total = 0
    for got, want in pairs:
        magnitude = want.float().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
        difference = (got.float() - want.float()).abs()
        assert (difference <= 2.0**-6 * magnitude).all()
        assert int((difference > 2.0**-7 * magnitude).sum()) <= 2e-6 * got.numel()
        apart += int((got != want).sum())
        total += got.numel()
    return apart / total


@dataclass(frozen=True)
class Shares:
    """Shares of elements of Q and K that differ in their bits.

    Attributes:
        op: the op against the official chain, rotated by the op's own float32 table.
        whole: the op against the official chain with its float64 table.
        table: the official chain with the one table against itself with the other; none of our kernels.
    """

    op: float
    whole: float
    table: float


def measure_shares(backend: str, heads: int, tokens: int, device: str) -> Shares:
    dim, grid = heads * HEAD_DIM, (GRID[0] * GRID[1], GRID[1])
    q, k, v = torch.randn(1, tokens, 3 * dim, device=device).bfloat16().chunk(3, dim=-1)
    q_weight, k_weight = torch.randn(2, dim, device=device).bfloat16().unbind(0)
    k_cache, v_cache = torch.zeros(2, 1, tokens + 7, heads, HEAD_DIM, device=device).bfloat16().unbind(0)
    table = ops.rope_cos_sin(tokens, START, *grid, HEAD_DIM, 10000.0, device)
    wide = reference.rope_cos_sin(tokens, START, *grid, HEAD_DIM, 10000.0, device, dtype=torch.float64)
    ring = RingPosition(0, 0)
    q_out = ops.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, table, k_cache, v_cache, ring, 1e-6, backend=backend)
    got = (q_out.unflatten(-1, (heads, -1)), k_cache[:, :tokens])
    normed = (normalised(q, q_weight), normalised(k, k_weight))
    narrow_chain, wide_chain = ([rotated(x, turn) for x in normed] for turn in (table, wide))
    return Shares(
        op=share_apart(list(zip(got, narrow_chain, strict=True))),
        whole=share_apart(list(zip(got, wide_chain, strict=True))),
        table=share_apart(list(zip(narrow_chain, wide_chain, strict=True))),
    )


def assert_official_bits(shares: Shares) -> None:
    """The op's own share is at most 1e-5, and 2e-5 with what its float32 table moves: almost as much by itself, so that
    1e-5 in all leaves nothing for the rounding of a kernel's float32 sums and products. Differences come in lots, a row
    whose scale is a float32 step off, so that a share needs ten million elements and more.
    """
    assert shares.op <= 1e-5, shares
    assert 0.5e-5 <= shares.table <= 1.5e-5, shares
    assert shares.whole <= 2e-5, shares
