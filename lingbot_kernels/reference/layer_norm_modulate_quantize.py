"""Layer norm and modulation, the row leaving as int8 codes."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype
from lingbot_kernels.reference.layer_norm_modulate import layer_norm_modulate
from lingbot_kernels.reference.rotate_quantize import quantize_rows


def layer_norm_modulate_quantize(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None = None,
    rotate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [B, S, Dp], row scale float32 [B, S]) of y = layer_norm(x) * (1 + scale) + shift, y not rounded.

    x [B, S, D], shift and scale [D] or [B, D]; signs and rotate as in `rotate_quantize`.
    """
    y = layer_norm_modulate(x, shift, scale, eps, out_dtype=accumulation_dtype(x.dtype))
    return quantize_rows(y, signs, rotate)
