"""RMSNorm over the whole row with the official rounding: cross-attention's Q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._rows import (
    RowConfig,
    as_words,
    load_chunk,
    load_row,
    pack,
    rms_scale,
    short_row_config,
    store_chunk,
    unpack,
    why_not_words,
    word_config,
)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    tokens,
    eps,
    x_batch_stride,
    X_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """y[b, s] = T(T(x[b, s] * rsqrt(mean(x[b, s]^2) + eps)) * weight)

    x [B, tokens, D], tokens X_STRIDE apart, y contiguous, weight [D], D = 2 * WORDS. Programs: (tokens / ROWS, B).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    weight = as_words(weight_ptr)
    for i in range(ROWS):
        token = tl.program_id(0) * ROWS + i
        if token < tokens:
            row = token.to(tl.int64)
            words = load_row(as_words(x_ptr + batch * x_batch_stride + row * X_STRIDE), WORDS, CHUNK, EVICT)
            scale = rms_scale(words, dtype, WORDS, CHUNK, eps)
            y = as_words(y_ptr + (batch * tokens + row) * (2 * WORDS))
            for j in tl.static_range((WORDS + CHUNK - 1) // CHUNK):
                weight_low, weight_high = unpack(load_chunk(weight, j, WORDS, CHUNK, "evict_last"), dtype)
                low, high = unpack(words[j], dtype)
                low, high = unpack(pack(low * scale, high * scale, dtype), dtype)
                store_chunk(y, pack(low * weight_low, high * weight_high, dtype), j, WORDS, CHUNK, MODIFIER)


def launch_config(dim: int, element_size: int, tokens: int) -> RowConfig:
    """Configuration for `tokens` rows (of the whole batch) of `dim` values of `element_size` bytes."""
    return short_row_config(word_config(dim, element_size), dim // 2)


def why_not(x: torch.Tensor) -> str | None:
    """Why this kernel can't serve x [B, S, D], or None."""
    return why_not_words(x.shape[-1], x=x)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, eps: float, *, config: RowConfig | None = None
) -> None:
    """Fill y [B, S, D], contiguous; x [B, S, D] with any even strides, weight [D], one dtype."""
    batch, tokens, dim = x.shape
    config = config or launch_config(dim, x.element_size(), batch * tokens)
    launch(
        rms_norm_kernel,
        (-(-tokens // config.rows), batch),
        (x, weight, y),
        (tokens,),
        (eps, x.stride(0) if batch > 1 else 0),
        {
            "X_STRIDE": x.stride(1),
            "WORDS": dim // 2,
            **config.constants,
        },
        config.num_warps,
    )
