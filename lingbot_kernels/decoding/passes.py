"""The two passes of the decoder, by the device of what they are given: Triton's on CUDA, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference


def frame_norm_silu(
    y: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stream: Tensor | None,
    gamma: Tensor | None,
    act: Tensor | None,
    *,
    add_stream: bool,
    silu: bool,
    parities: bool,
) -> None:
    """See `lingbot_kernels.reference.frame_norm_silu`."""
    if y.is_cuda and y.dtype != torch.float64:
        from lingbot_kernels.triton import frame_norm_silu as kernel

        kernel.frame_norm_silu(y, bias, residual, stream, gamma, act, add_stream, silu, parities)
    else:
        reference.frame_norm_silu(y, bias, residual, stream, gamma, act, add_stream, silu, parities)


def frame_pixels(taps: Tensor, bias: Tensor, partial: Tensor, frame: Tensor) -> None:
    """See `lingbot_kernels.reference.frame_pixels`."""
    if taps.is_cuda and taps.dtype != torch.float64:
        from lingbot_kernels.triton import frame_pixels as kernel

        kernel.frame_pixels(taps, bias, partial, frame)
    else:
        reference.frame_pixels(taps, bias, partial, frame)
