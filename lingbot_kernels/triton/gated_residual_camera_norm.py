"""Gated residual addition, the camera's affine modulation, and the affine layer norm that follows them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._rows import (
    LONG_ROW,
    RowConfig,
    affine_chunk,
    layer_norm_stats,
    modulation_stride,
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
            gate = None
            if gate_ptr is not None:
                gate = gate_ptr + row // tokens * GATE_STRIDE
            cam_scale = None
            cam_shift = None
            if cam_scale_ptr is not None:
                cam_scale = cam_scale_ptr + offset
                cam_shift = cam_shift_ptr + offset
            wide = residual_row(
                x_ptr + offset,
                delta_ptr + offset,
                x_out_ptr + offset,
                gate,
                cam_scale,
                cam_shift,
                DIM,
                CHUNK,
                EVICT,
                MODIFIER,
            )
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
    rows = batch * tokens
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), rows)
    launch(
        gated_residual_camera_norm_kernel,
        (-(-rows // config.rows),),
        (x, delta, gate, cam_scale, cam_shift, weight, bias, x_out, y),
        (rows, tokens),
        (eps,),
        {
            "GATE_STRIDE": modulation_stride(gate),
            "DIM": dim,
            "CHUNK": config.chunk,
            "ROWS": config.rows,
            "EVICT": config.evict,
            "MODIFIER": config.modifier,
        },
        config.num_warps,
    )
