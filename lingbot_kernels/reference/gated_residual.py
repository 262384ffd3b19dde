"""Residual addition with a per-channel gate."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype, per_channel


def gated_residual_wide(x: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """x + delta * gate, not rounded yet: in the accumulation dtype of x."""
    accumulate = accumulation_dtype(x.dtype)
    update = delta.to(accumulate)
    return x.to(accumulate) + (update if gate is None else update * per_channel(gate, accumulate))


def gated_residual(x: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """x + delta * gate for x, delta [B, S, D] and gate [D] or [B, D] (None: 1); one rounding to x's dtype."""
    return gated_residual_wide(x, delta, gate).to(x.dtype)
