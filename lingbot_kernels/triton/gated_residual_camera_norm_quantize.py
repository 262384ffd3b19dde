"""Gated residual addition, the camera's modulation and the affine layer norm, whose row leaves as int8 codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._quantize import padded_width, quantize_store, quantizing_config, why_not_quantized
from lingbot_kernels.triton._rows import (
    LONG_ROW,
    RowConfig,
    affine_chunk,
    launch_rows,
    layer_norm_stats,
    modulation_strides,
    moved,
    residual_row,
    value_config,
)


@triton.jit(do_not_specialize=["rows", "tokens"])
def gated_residual_camera_norm_quantize_kernel(
    x_ptr,
    delta_ptr,
    gate_ptr,
    cam_scale_ptr,
    cam_shift_ptr,
    weight_ptr,
    bias_ptr,
    signs_ptr,
    x_out_ptr,
    codes_ptr,
    row_scale_ptr,
    rows,
    tokens,
    eps,
    GATE_STRIDE: tl.constexpr,
    ROTATE: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out, y as in `gated_residual_camera_norm_kernel`; codes, row_scale = quantise(hadamard(y[b, s] * signs))

    x, x_out (R) and delta, cam_scale, cam_shift [B, tokens, DIM], codes [B, tokens, PADDED], row_scale [B, tokens],
    contiguous, rows = B * tokens; weight, bias [DIM]; gate float32 [DIM], batches GATE_STRIDE apart (0: shared); signs
    [PADDED] or None. No gate: 1; no cam_*: x_out = x + delta * gate. Programs: rows / ROWS.
    """
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            at = row.to(tl.int64)
            offset = at * DIM
            gate = moved(gate_ptr, row // tokens * GATE_STRIDE)
            wide = residual_row(
                x_ptr + offset, delta_ptr + offset, gate, moved(cam_scale_ptr, offset),
                moved(cam_shift_ptr, offset), x_out_ptr + offset, DIM, CHUNK, EVICT, MODIFIER,
            )  # fmt: skip
            mean, rstd = layer_norm_stats(wide, DIM, CHUNK, eps)
            y = ()
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                y = y + (affine_chunk(wide, mean, rstd, weight_ptr, bias_ptr, j, DIM, CHUNK),)  # type: ignore[assignment]  # noqa: RUF005
            quantize_store(
                codes_ptr + at * PADDED, row_scale_ptr + at, y, signs_ptr, ROTATE, DIM, PADDED, CHUNK, MODIFIER
            )


def launch_config(dim: int, element_sizes: tuple[int, ...], rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values in tensors of these element sizes."""
    if dim < LONG_ROW:
        return quantizing_config(dim)
    return value_config(dim, element_sizes, 8, streaming=False)


def why_not(x: torch.Tensor, delta: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_quantized(x.shape[-1], x=x, delta=delta)


def gated_residual_camera_norm_quantize(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    cam_scale: torch.Tensor | None,
    cam_shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    signs: torch.Tensor | None,
    rotate: bool,
    x_out: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill x_out [B, S, D], codes int8 [B, S, Dp] and row_scale float32 [B, S]; x, delta, cam_scale, cam_shift (both
    None: no camera) alike, all contiguous.

    gate float32 [D] or [B, D] (None: 1); weight, bias [D] in delta's dtype; signs int8 [Dp] or None.
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, (x.element_size(), delta.element_size()), batch * tokens)
    tensors = (x, delta, gate, cam_scale, cam_shift, weight, bias, signs, x_out, codes, row_scale)
    launch_rows(
        gated_residual_camera_norm_quantize_kernel,
        config,
        tensors,
        (eps,),
        **modulation_strides(gate=gate),
        ROTATE=rotate,
        PADDED=padded_width(dim),
    )
