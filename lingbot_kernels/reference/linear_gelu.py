"""A linear layer with GELU(tanh) in its epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lingbot_kernels.reference._common import accumulation_dtype


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """gelu_tanh(x weight^T + bias) for x [..., K], weight [N, K], bias [N]; one rounding to x's dtype, at the end."""
    accumulate = accumulation_dtype(x.dtype)
    wide = F.linear(x.to(accumulate), weight.to(accumulate), None if bias is None else bias.to(accumulate))
    return F.gelu(wide, approximate="tanh").to(x.dtype)
