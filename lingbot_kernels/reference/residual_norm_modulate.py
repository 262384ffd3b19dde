"""Gated residual addition and the modulated layer norm that follows it."""

from __future__ import annotations

import torch

from lingbot_kernels.reference.gated_residual import gated_residual
from lingbot_kernels.reference.layer_norm_modulate import layer_norm_modulate


def residual_norm_modulate(
    x: torch.Tensor,
    delta: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_out, y): x_out = x + delta * gate in x's dtype, y = layer_norm(x_out) * (1 + scale) + shift in delta's.

    The norm sees the rounded x_out. x, delta [B, S, D]; shift, scale, gate [D] or [B, D].
    """
    x_out = gated_residual(x, delta, gate)
    return x_out, layer_norm_modulate(x_out, shift, scale, eps, out_dtype=delta.dtype)
