"""Residual addition with a per-channel gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl
from lingbot_kernels.triton._rows import VECTOR_BYTES, modulation_stride, round_to, why_not_rows


@triton.jit(do_not_specialize=["rows", "tokens"])
def gated_residual_kernel(
    x_ptr,
    delta_ptr,
    gate_ptr,
    x_out_ptr,
    rows,
    tokens,
    GATE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x_out[b, s] = R(x[b, s] + delta[b, s] * gate[b])

    x, x_out (R), delta (T) [B, tokens, DIM] contiguous, rows = B * tokens; gate float32 [DIM], batches GATE_STRIDE
    apart (0: shared); None: 1. Programs: rows * DIM / BLOCK: each does BLOCK values, across rows.
    """
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = (begin % DIM).to(tl.int32) + tl.arange(0, BLOCK)
    row = begin // DIM + index // DIM
    mask = row < rows
    offset = begin + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=mask, eviction_policy="evict_first").to(tl.float32)
    delta = tl.load(delta_ptr + offset, mask=mask, eviction_policy="evict_first").to(tl.float32)
    if gate_ptr is not None:
        batch = (row // tokens).to(tl.int32) if GATE_STRIDE else 0
        delta *= tl.load(gate_ptr + batch * GATE_STRIDE + index % DIM, mask=mask, eviction_policy="evict_last")
    tl.store(x_out_ptr + offset, round_to(x + delta, x_out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GatedResidualConfig:
    """`block` values a program."""

    num_warps: int
    block: int


def launch_config(element_sizes: tuple[int, ...]) -> GatedResidualConfig:
    """Two vectors of at most 16 bytes a thread."""
    return GatedResidualConfig(num_warps=4, block=2 * 128 * VECTOR_BYTES // max(element_sizes))


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(x.shape[-1], x=x, delta=delta)


def gated_residual(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    x_out: torch.Tensor,
    *,
    config: GatedResidualConfig | None = None,
) -> None:
    """Fill x_out [B, S, D]; x, delta alike, all contiguous; gate float32 [D] or [B, D] (None: 1)."""
    batch, tokens, dim = x.shape
    rows = batch * tokens
    config = config or launch_config((x.element_size(), delta.element_size()))
    gated_residual_kernel[(triton.cdiv(rows * dim, config.block),)](
        x,
        delta,
        gate,
        x_out,
        rows,
        tokens,
        GATE_STRIDE=modulation_stride(gate),
        DIM=dim,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
