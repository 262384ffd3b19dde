"""RMSNorm and RoPE of Q and K, written with V into the packed buffer of one all-to-all exchange."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lingbot_kernels.triton._launch import launch
from lingbot_kernels.triton._rows import RowConfig, as_words, split_config, why_not_words, write_qkv


@triton.jit(do_not_specialize=["tokens", "batches"])
def qk_norm_rope_pack_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    out_ptr,
    tokens,
    batches,
    eps,
    q_batch_stride,
    k_batch_stride,
    v_batch_stride,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """out[r, s, b] = (rope(rms_norm(q)), rope(rms_norm(k)), v)[b, s], the heads of rank r; without q, the last two.

    out [D / (2 * GROUP), tokens, batches, parts, 2 * GROUP]: GROUP words are one rank's heads of a token. q, k, v
    [batches, tokens, D], tokens *_STRIDE apart, D = 2 * WORDS; cos_sin [tokens, 2 * PAIRS]. Programs: (parts,
    tokens / ROWS, batches).
    """
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    PARTS: tl.constexpr = 2 if q_ptr is None else 3
    batch = tl.program_id(2).to(tl.int64)
    group_stride = batches.to(tl.int64) * tokens * (PARTS * GROUP)
    for i in range(ROWS):
        token = tl.program_id(1) * ROWS + i
        if token < tokens:
            row = token.to(tl.int64)
            out = as_words(out_ptr) + (row * batches + batch) * (PARTS * GROUP)
            q_row = None
            q_weight = None
            if q_ptr is not None:
                q_row = as_words(q_ptr + batch * q_batch_stride + row * Q_STRIDE)
                q_weight = as_words(q_weight_ptr)
            write_qkv(
                q_row,
                as_words(k_ptr + batch * k_batch_stride + row * K_STRIDE),
                as_words(v_ptr + batch * v_batch_stride + row * V_STRIDE),
                q_weight,
                as_words(k_weight_ptr),
                cos_sin_ptr + row * (2 * PAIRS),
                out,
                out + (PARTS - 2) * GROUP,
                out + (PARTS - 1) * GROUP,
                eps,
                dtype,
                WORDS,
                CHUNK,
                PAIRS,
                SPLIT,
                EVICT,
                MODIFIER,
                GROUP,
                group_stride,
            )


def launch_config(dim: int, element_size: int, tokens: int) -> RowConfig:
    """Configuration for `tokens` rows (of the whole batch) of `dim` values of `element_size` bytes."""
    return split_config(dim, element_size)


def why_not(q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    return why_not_words(k.shape[-1], q=q, k=k, v=v)


def qk_norm_rope_pack(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
) -> None:
    """Fill out [ranks, S, B, parts, heads / ranks, head_dim], contiguous; parts are (q, k, v), or (k, v) without q.

    q, k, v [B, S, D] with any even strides; weights [D]; cos_sin float32 [S, head_dim].
    """
    batch, tokens, dim = k.shape
    config = config or launch_config(dim, k.element_size(), batch * tokens)
    operands = (q, k, v)
    launch(
        qk_norm_rope_pack_kernel,
        (out.shape[3] if config.split else 1, -(-tokens // config.rows), batch),
        (q, k, v, q_weight, k_weight, cos_sin, out),
        (tokens, batch),
        (
            eps,
            *(0 if x is None or batch == 1 else x.stride(0) for x in operands),
            *(0 if x is None else x.stride(1) for x in operands),
        ),
        {
            "WORDS": dim // 2,
            "GROUP": dim // 2 // out.shape[0],
            "PAIRS": cos_sin.shape[1] // 2,
            "SPLIT": config.split,
            **config.constants,
        },
        config.num_warps,
    )
