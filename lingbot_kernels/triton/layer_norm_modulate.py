"""Layer norm without affine parameters, then scale and shift from the time embedding."""

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
    load_row,
    modulate_store,
    modulation_strides,
    short_row_config,
    value_config,
    why_not_rows,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def layer_norm_modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    rows,
    tokens,
    eps,
    SHIFT_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """y[b, s] = (x[b, s] - mean) * rsqrt(var + eps) * (1 + scale[b]) + shift[b]

    x, y [B, tokens, DIM] contiguous, rows = B * tokens; shift, scale float32 [DIM], batches *_STRIDE apart (0: shared).
    Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            offset = row.to(tl.int64) * DIM
            batch = row // tokens
            x = load_row(x_ptr + offset, DIM, CHUNK, EVICT)
            wide = ()
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                wide = wide + (x[j].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            shift = shift_ptr + batch * SHIFT_STRIDE
            scale = scale_ptr + batch * SCALE_STRIDE
            modulate_store(y_ptr + offset, wide, mean, rstd, shift, scale, y_ptr.dtype.element_ty, DIM, CHUNK, MODIFIER)


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    if max(element_sizes) == 4:
        return value_config(dim, element_sizes, streaming=False)
    config = value_config(dim, element_sizes, FEW_ROWS_WARPS if rows <= FEW_ROWS and dim >= LONG_ROW else None)
    return short_row_config(config, dim)


def why_not(x: torch.Tensor, y: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(x.shape[-1], x=x, y=y)


def layer_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill y [B, S, D] from x [B, S, D], both contiguous, of any two dtypes; shift, scale float32 [D] or [B, D]."""
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), y.element_size()), batch * tokens)
    tensors = (x, shift, scale, y)
    launch_rows(layer_norm_modulate_kernel, config, tensors, (eps,), **modulation_strides(shift=shift, scale=scale))
