"""Layer norm without affine parameters, then scale and shift from the time embedding."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype, layer_norm, per_channel


def layer_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """layer_norm(x) * (1 + scale) + shift for x [B, S, D], shift and scale [D] or [B, D].

    One rounding, to `out_dtype` (x's by default).
    """
    accumulate = accumulation_dtype(x.dtype)
    y = layer_norm(x.to(accumulate), eps) * (1 + per_channel(scale, accumulate)) + per_channel(shift, accumulate)
    return y.to(x.dtype if out_dtype is None else out_dtype)
