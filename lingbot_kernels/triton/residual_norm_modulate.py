"""Gated residual addition and the modulated layer norm that follows it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._rows import (
    FEW_ROWS,
    FEW_ROWS_WARPS,
    LONG_ROW,
    RowConfig,
    launch_rows,
    layer_norm_stats,
    modulate_store,
    modulation_strides,
    moved,
    residual_row,
    short_row_config,
    value_config,
    why_not_rows,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def residual_norm_modulate_kernel(
    x_ptr,
    delta_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_out_ptr,
    y_ptr,
    rows,
    tokens,
    eps,
    GATE_STRIDE: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out[b, s] = R(x[b, s] + delta[b, s] * gate[b]); y[b, s] = layer_norm(x_out[b, s]) * (1 + scale[b]) + shift[b]

    x, x_out (R) and delta, y (T) [B, tokens, DIM] contiguous, rows = B * tokens; gate, shift, scale float32 [DIM],
    batches *_STRIDE apart (0: shared); gate None: 1. Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            offset = row.to(tl.int64) * DIM
            batch = row // tokens
            gate = moved(gate_ptr, batch * GATE_STRIDE)
            wide = residual_row(
                x_ptr + offset, delta_ptr + offset, gate, None, None,
                x_out_ptr + offset, DIM, CHUNK, EVICT, MODIFIER,
            )  # fmt: skip
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            shift = shift_ptr + batch * SHIFT_STRIDE
            scale = scale_ptr + batch * SCALE_STRIDE
            modulate_store(y_ptr + offset, wide, mean, rstd, shift, scale, y_ptr.dtype.element_ty, DIM, CHUNK, MODIFIER)


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    if max(element_sizes) == 4 or (rows > FEW_ROWS and dim >= LONG_ROW):
        return value_config(dim, element_sizes, streaming=False)
    return short_row_config(value_config(dim, element_sizes, FEW_ROWS_WARPS if dim >= LONG_ROW else None), dim)


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(x.shape[-1], x=x, delta=delta)


def residual_norm_modulate(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    x_out: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill x_out and y [B, S, D]; x, delta alike, all contiguous.

    gate (None: 1), shift, scale float32 [D] or [B, D].
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), batch * tokens)
    tensors = (x, delta, gate, shift, scale, x_out, y)
    launch_rows(
        residual_norm_modulate_kernel,
        config,
        tensors,
        (eps,),
        **modulation_strides(gate=gate, shift=shift, scale=scale),
    )
