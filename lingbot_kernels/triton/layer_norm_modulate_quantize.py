"""Layer norm and modulation, the row leaving as int8 codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._quantize import padded_width, quantize_store, quantizing_config, why_not_quantized
from lingbot_kernels.triton._rows import (
    LONG_ROW,
    RowConfig,
    launch_rows,
    layer_norm_stats,
    load_row,
    modulated_row,
    modulation_strides,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def layer_norm_modulate_quantize_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    codes_ptr,
    row_scale_ptr,
    rows,
    tokens,
    eps,
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
    """codes[b, s], row_scale[b, s] = quantise(hadamard(y[b, s] * signs)), y as in `layer_norm_modulate_kernel`

    x [B, tokens, DIM], codes [B, tokens, PADDED], row_scale [B, tokens], contiguous, rows = B * tokens; shift, scale
    float32 [DIM], batches *_STRIDE apart (0: shared); signs [PADDED] or None. Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            at = row.to(tl.int64)
            x = load_row(x_ptr + at * DIM, DIM, CHUNK, EVICT)
            wide = ()
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                wide = wide + (x[j].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            shift = shift_ptr + row // tokens * SHIFT_STRIDE
            scale = scale_ptr + row // tokens * SCALE_STRIDE
            y = modulated_row(wide, mean, rstd, shift, scale, DIM, CHUNK)
            quantize_store(
                codes_ptr + at * PADDED, row_scale_ptr + at, y, signs_ptr, ROTATE, DIM, PADDED, CHUNK, MODIFIER
            )


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    return quantizing_config(dim, 4 if LONG_ROW <= dim <= 2 * LONG_ROW else None)


def why_not(x: torch.Tensor) -> str | None:
    """Why this kernel can't serve this tensor, or None."""
    return why_not_quantized(x.shape[-1], x=x)


def layer_norm_modulate_quantize(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    signs: torch.Tensor | None,
    rotate: bool,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill codes int8 [B, S, Dp] and row_scale float32 [B, S] from x [B, S, D], all contiguous.

    shift, scale float32 [D] or [B, D]; signs int8 [Dp] or None.
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(),), batch * tokens)
    tensors = (x, shift, scale, signs, codes, row_scale)
    launch_rows(
        layer_norm_modulate_quantize_kernel,
        config,
        tensors,
        (eps,),
        **modulation_strides(shift=shift, scale=scale),
        ROTATE=rotate,
        PADDED=padded_width(dim),
    )
