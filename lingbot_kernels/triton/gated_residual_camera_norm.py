"""Gated residual addition, the camera's affine modulation, and the affine layer norm that follows them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._rows import (
    LONG_ROW,
    RowConfig,
    affine_chunk,
    launch_rows,
    layer_norm_stats,
    modulation_strides,
    moved,
    residual_row,
    round_to,
    store_chunk,
    value_config,
    why_not_rows,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def gated_residual_camera_norm_kernel(
    x_ptr,
    delta_ptr,
    gate_ptr,
    cam_scale_ptr,
    cam_shift_ptr,
    weight_ptr,
    bias_ptr,
    x_out_ptr,
    y_ptr,
    rows,
    tokens,
    eps,
    GATE_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out[b, s] = R((1 + cam_scale[b, s]) * (x[b, s] + delta[b, s] * gate[b]) + cam_shift[b, s])
    y[b, s] = layer_norm(x_out[b, s]) * weight + bias

    x, x_out (R) and delta, cam_scale, cam_shift, y (T) [B, tokens, DIM] contiguous, rows = B * tokens; weight, bias
    [DIM]; gate float32 [DIM], batches GATE_STRIDE apart (0: shared). No gate: 1; no cam_*: x_out = x + delta * gate.
    Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            offset = row.to(tl.int64) * DIM
            gate = moved(gate_ptr, row // tokens * GATE_STRIDE)
            wide = residual_row(
                x_ptr + offset, delta_ptr + offset, gate, moved(cam_scale_ptr, offset),
                moved(cam_shift_ptr, offset), x_out_ptr + offset, DIM, CHUNK, EVICT, MODIFIER,
            )  # fmt: skip
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                y = affine_chunk(wide, mean, rstd, weight_ptr, bias_ptr, j, DIM, CHUNK)
                store_chunk(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), j, DIM, CHUNK, MODIFIER)


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    if dim < LONG_ROW:
        return value_config(dim, element_sizes, streaming=False)
    return value_config(dim, element_sizes, 8)


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_rows(x.shape[-1], x=x, delta=delta)


def gated_residual_camera_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    cam_scale: torch.Tensor | None,
    cam_shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x_out: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill x_out and y [B, S, D]; x, delta, cam_scale, cam_shift (both None: no camera) alike, all contiguous.

    gate float32 [D] or [B, D] (None: 1); weight, bias [D] in delta's dtype.
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), batch * tokens)
    tensors = (x, delta, gate, cam_scale, cam_shift, weight, bias, x_out, y)
    launch_rows(gated_residual_camera_norm_kernel, config, tensors, (eps,), **modulation_strides(gate=gate))
