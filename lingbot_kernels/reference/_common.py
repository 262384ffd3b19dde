"""What the reference ops share: the accumulation dtype, full-row layer norm, and per-channel vectors."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A modulation vector [D] or [B, D] as something that broadcasts over [B, S, D]."""
    vector = vector.to(dtype)
    return vector if vector.dim() == 1 else vector.unsqueeze(1)


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) * rsqrt(var + eps) over the last dimension, two passes, no affine, in x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
