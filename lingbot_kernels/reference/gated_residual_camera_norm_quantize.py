"""Gated residual addition, the camera's modulation and the affine layer norm, whose row leaves as int8 codes."""

from __future__ import annotations

import torch

from lingbot_kernels.reference.gated_residual_camera_norm import camera_norm_wide
from lingbot_kernels.reference.rotate_quantize import quantize_rows


def gated_residual_camera_norm_quantize(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    cam_scale: torch.Tensor | None,
    cam_shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    signs: torch.Tensor | None = None,
    rotate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_out, codes, row scale): x_out as `gated_residual_camera_norm` has it; codes int8 [B, S, Dp] and scale float32
    [B, S] of y = layer_norm(x_out) * weight + bias, y not rounded.

    Arguments as in `gated_residual_camera_norm`; signs and rotate as in `rotate_quantize`.
    """
    x_out, y = camera_norm_wide(x, delta, gate, cam_scale, cam_shift, weight, bias, eps)
    return x_out, *quantize_rows(y, signs, rotate)
