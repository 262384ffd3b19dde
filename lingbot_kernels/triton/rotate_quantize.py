"""Rows as int8 codes with a scale each, after random signs and a Hadamard rotation of their channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._quantize import padded_width, quantize_store, quantizing_config, why_not_quantized
from lingbot_kernels.triton._rows import RowConfig, load_row, value_config

LONGEST_WIDE = 8192  # values of a row up to which a thread holds whole 16-byte vectors of it


@triton.jit(do_not_specialize=["tokens"])
def rotate_quantize_kernel(
    x_ptr,
    signs_ptr,
    codes_ptr,
    row_scale_ptr,
    tokens,
    x_batch_stride,
    X_STRIDE: tl.constexpr,
    ROTATE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """codes[b, s], row_scale[b, s] = quantise(hadamard(x[b, s] * signs)); without ROTATE no hadamard, None: no signs

    x [B, tokens, DIM], tokens X_STRIDE apart; codes [B, tokens, PADDED] and row_scale [B, tokens] contiguous, signs
    [PADDED]. Programs: (tokens / ROWS, B).
    """
    batch = tl.program_id(1).to(tl.int64)
    for i in range(ROWS):
        token = tl.program_id(0) * ROWS + i
        if token < tokens:
            x = load_row(x_ptr + batch * x_batch_stride + token.to(tl.int64) * X_STRIDE, DIM, CHUNK, EVICT)
            wide = ()
            for j in tl.static_range((DIM + CHUNK - 1) // CHUNK):
                wide = wide + (x[j].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
            row = batch * tokens + token
            quantize_store(
                codes_ptr + row * PADDED, row_scale_ptr + row, wide, signs_ptr, ROTATE, DIM, PADDED, CHUNK, MODIFIER
            )


def launch_config(dim: int, element_size: int, rows: int) -> RowConfig:
    """Configuration for `rows` rows of `dim` values of this element size."""
    return quantizing_config(dim) if dim > LONGEST_WIDE else value_config(dim, (element_size,), streaming=False)


def why_not(x: torch.Tensor) -> str | None:
    """Why this kernel can't serve this tensor, or None."""
    return why_not_quantized(x.shape[-1], x=x)


def rotate_quantize(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    rotate: bool,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill codes int8 [B, S, Kp] and row_scale float32 [B, S], contiguous, from x [B, S, K], inner stride 1.

    signs int8 [Kp] or None; Kp: K filled up to a multiple of 128.
    """
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, x.element_size(), batch * tokens)
    launch(
        rotate_quantize_kernel,
        (-(-tokens // config.rows), batch),
        (x, signs, codes, row_scale),
        (tokens,),
        (x.stride(0),),
        {
            "X_STRIDE": x.stride(1),
            "ROTATE": rotate,
            "DIM": dim,
            "PADDED": padded_width(dim),
            **config.constants,
        },
        config.num_warps,
    )
