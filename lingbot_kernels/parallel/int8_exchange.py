"""What ranks exchange where Q and K are in int8: codes, V and scales of a token's heads, as one row for each rank.

One buffer, so one collective; plain torch besides, so every device can, and a CUDA graph can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.realtime.kv_cache import Int8KeyValue

Quantized = tuple[Tensor, Tensor]  # codes int8 [B, S, heads, head_dim] and scales float32 [B, S, heads]

_WORD = torch.int32
_ALIGNED = 4  # words: attention reads Q's codes where they arrive, and wants tokens 16 bytes apart


def pack(q: Quantized | None, k: Quantized, v: Tensor, ranks: int) -> Tensor:
    """int32 [ranks, S, B, words], contiguous: slice r holds, of each token, what goes to rank r.

    That is for its heads: Q's codes, K's codes, V, Q's scales, K's scales, then padding to a multiple of 16 bytes;
    without q nothing of it.

    Args:
        q, k: of this rank's tokens, all heads.
        v: bfloat16 [B, S, D], strided views serve.
        ranks: must divide the heads.
    """
    quantized = [k] if q is None else [q, k]
    values = [codes for codes, _ in quantized] + [v.unflatten(-1, (k[0].shape[2], -1))]
    parts = values + [scale.unsqueeze(-1) for _, scale in quantized]
    rows = [part.view(_WORD).unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4).flatten(3) for part in parts]
    padding = -sum(row.shape[3] for row in rows) % _ALIGNED
    if padding:
        rows.append(rows[0].new_zeros((*rows[0].shape[:3], padding)))
    return torch.cat(rows, dim=3)


def unpack(packed: Tensor, heads: int, head_dim: int, with_q: bool) -> tuple[Quantized | None, Quantized, Tensor]:
    """(q or None, k, v bfloat16 [B, S, heads, head_dim]) as views of what arrived, int32 [S, B, words]: all the chunk's
    tokens, `heads` heads of this rank.
    """
    count = 2 if with_q else 1
    dtypes = [torch.int8] * count + [torch.bfloat16] + [torch.float32] * count
    widths = [heads * (1 if dtype.itemsize == 4 else head_dim) * dtype.itemsize // _WORD.itemsize for dtype in dtypes]
    rows = packed.transpose(0, 1)[..., : sum(widths)].split(widths, dim=-1)
    parts = [row.unflatten(-1, (heads, -1)).view(dtype) for row, dtype in zip(rows, dtypes, strict=True)]
    codes, v, scales = parts[:count], parts[count], parts[count + 1 :]
    quantized = [(code, scale.squeeze(-1)) for code, scale in zip(codes, scales, strict=True)]
    return (quantized[0] if with_q else None), quantized[-1], v


def write(ring: Int8KeyValue, slots: Tensor, k: Quantized, v: Tensor) -> None:
    """K's codes and scales and V [B, S, heads, head_dim] into the ring's slots, int64 [S]."""
    for held, new in ((ring.k, k[0]), (ring.v, v)):
        held.view(_WORD).index_copy_(1, slots, new.view(_WORD))
    ring.k_scale.index_copy_(1, slots, k[1])
