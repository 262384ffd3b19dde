"""Gated residual addition, the camera's affine modulation, and the affine layer norm that follows them."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import layer_norm
from lingbot_kernels.reference.gated_residual import gated_residual_wide


def camera_norm_wide(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    cam_scale: torch.Tensor | None,
    cam_shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_out, y) of `gated_residual_camera_norm`, y not rounded yet: in the accumulation dtype of x."""
    wide = gated_residual_wide(x, delta, gate)
    if (cam_scale is None) != (cam_shift is None):
        raise ValueError("cam_scale and cam_shift must be given together, or neither")
    if cam_scale is not None and cam_shift is not None:
        wide = (1 + cam_scale.to(wide.dtype)) * wide + cam_shift.to(wide.dtype)
    x_out = wide.to(x.dtype)
    return x_out, layer_norm(x_out.to(wide.dtype), eps) * weight.to(wide.dtype) + bias.to(wide.dtype)


def gated_residual_camera_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    gate: torch.Tensor | None,
    cam_scale: torch.Tensor | None,
    cam_shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_out, y): x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift in x's dtype, rounded once;
    y = layer_norm(x_out) * weight + bias in delta's dtype, of the rounded x_out.

    x, delta, cam_scale, cam_shift [B, S, D]; gate [D] or [B, D] (None: 1); weight, bias [D]. Without a camera both
    cam_* are None and x_out = x + delta * gate.
    """
    x_out, y = camera_norm_wide(x, delta, gate, cam_scale, cam_shift, weight, bias, eps)
    return x_out, y.to(delta.dtype)
