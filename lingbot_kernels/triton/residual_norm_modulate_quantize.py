"""Gated residual addition and the modulated layer norm that follows it, whose row leaves as int8 codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._quantize import padded_width, quantize_store, quantizing_config, why_not_quantized
from lingbot_kernels.triton._rows import (
    RowConfig,
    launch_rows,
    layer_norm_stats,
    modulated_row,
    modulation_strides,
    moved,
    residual_row,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def residual_norm_modulate_quantize_kernel(
    x_ptr,
    delta_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    x_out_ptr,
    codes_ptr,
    row_scale_ptr,
    rows,
    tokens,
    eps,
    GATE_STRIDE: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ROTATE: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out[b, s] and y[b, s] as in `residual_norm_modulate_kernel`; codes, row_scale = quantise(hadamard(y * signs))

    x, x_out (R) and delta [B, tokens, DIM], codes [B, tokens, PADDED], row_scale [B, tokens], contiguous, rows = B *
    tokens; gate, shift, scale float32 [DIM], batches *_STRIDE apart (0: shared); gate None: 1; signs [PADDED] or None.
    Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            at = row.to(tl.int64)
            offset = at * DIM
            batch = row // tokens
            gate = moved(gate_ptr, batch * GATE_STRIDE)
            wide = residual_row(
                x_ptr + offset, delta_ptr + offset, gate, None, None,
                x_out_ptr + offset, DIM, CHUNK, EVICT, MODIFIER,
            )  # fmt: skip
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            shift = shift_ptr + batch * SHIFT_STRIDE
            scale = scale_ptr + batch * SCALE_STRIDE
            y = modulated_row(wide, mean, rstd, shift, scale, DIM, CHUNK)
            quantize_store(
                codes_ptr + at * PADDED, row_scale_ptr + at, y, signs_ptr, ROTATE, DIM, PADDED, CHUNK, MODIFIER
            )


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    return quantizing_config(dim)


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_quantized(x.shape[-1], x=x, delta=delta)


def residual_norm_modulate_quantize(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    signs: torch.Tensor | None,
    rotate: bool,
    x_out: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill x_out [B, S, D], codes int8 [B, S, Dp] and row_scale float32 [B, S]; x, delta alike, all contiguous.

    gate (None: 1), shift, scale float32 [D] or [B, D]; signs int8 [Dp] or None.
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), batch * tokens)
    tensors = (x, delta, gate, shift, scale, signs, x_out, codes, row_scale)
    launch_rows(
        residual_norm_modulate_quantize_kernel,
        config,
        tensors,
        (eps,),
        **modulation_strides(gate=gate, shift=shift, scale=scale),
        ROTATE=rotate,
        PADDED=padded_width(dim),
    )
