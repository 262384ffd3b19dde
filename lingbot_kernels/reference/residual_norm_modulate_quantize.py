"""Gated residual addition and the modulated layer norm that follows it, whose row leaves as int8 codes."""

from __future__ import annotations

import torch

from lingbot_kernels.reference.gated_residual import gated_residual
from lingbot_kernels.reference.layer_norm_modulate_quantize import layer_norm_modulate_quantize


def residual_norm_modulate_quantize(
    x: torch.Tensor,
    delta: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None = None,
    signs: torch.Tensor | None = None,
    rotate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_out, codes, row scale): x_out = x + delta * gate in x's dtype; codes int8 [B, S, Dp] and scale float32 [B, S]
    of y = layer_norm(x_out) * (1 + scale) + shift, y not rounded.

    The norm sees the rounded x_out. x, delta [B, S, D]; shift, scale, gate [D] or [B, D]; signs and rotate as in
    `rotate_quantize`.
    """
    x_out = gated_residual(x, delta, gate)
    return x_out, *layer_norm_modulate_quantize(x_out, shift, scale, eps, signs, rotate)
