"""Residual addition with a per-channel gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._rows import (
    RowConfig,
    gated_sum,
    launch_rows,
    load_row,
    modulation_strides,
    moved,
    round_to,
    store_chunk,
    value_config,
    why_not_rows,
)


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
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out[b, s] = R(x[b, s] + delta[b, s] * gate[b])

    x, x_out (R), delta (T) [B, tokens, DIM] contiguous, rows = B * tokens; gate float32 [DIM], batches GATE_STRIDE
    apart (0: shared); None: 1. Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            offset = row.to(tl.int64) * DIM
            gate = moved(gate_ptr, row // tokens * GATE_STRIDE)
            x = load_row(x_ptr + offset, DIM, CHUNK, EVICT)
            delta = load_row(delta_ptr + offset, DIM, CHUNK, EVICT)
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                x_out = round_to(gated_sum(x[j], delta[j], gate, j, DIM, CHUNK), x_out_ptr.dtype.element_ty)
                store_chunk(x_out_ptr + offset, x_out, j, DIM, CHUNK, MODIFIER)


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    return value_config(dim, element_sizes, streaming=False)


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(x.shape[-1], x=x, delta=delta)


def gated_residual(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    x_out: torch.Tensor,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill x_out [B, S, D]; x, delta alike, all contiguous; gate float32 [D] or [B, D] (None: 1)."""
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), batch * tokens)
    launch_rows(gated_residual_kernel, config, (x, delta, gate, x_out), (), **modulation_strides(gate=gate))
