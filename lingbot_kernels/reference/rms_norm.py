"""RMSNorm over the whole row with the official rounding."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """T(T(x * rsqrt(mean(x^2) + eps)) * weight) for x [..., D] and weight [D] of dtype T: two roundings."""
    wide = x.to(accumulation_dtype(x.dtype))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed * weight
