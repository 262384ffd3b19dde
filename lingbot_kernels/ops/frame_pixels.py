"""The last step of the video decoder: three temporal taps summed to the pixels of a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Written
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops.frame_norm_silu import _check_vector, _place


@kernel_op("frame_pixels", place=_place)
def _op(taps: Tensor, bias: Tensor, partial: Written, frame: Written) -> Launch:
    if taps.dim() != 3 or bias.dim() != 1 or taps.shape[2] < 3 * bias.shape[0]:
        raise ValueError(f"taps: got {_check.describe(taps)}, must be [H, W, 3 * C or more] with bias [C]")
    if taps.dtype not in _check.FLOATS:
        raise TypeError(f"taps: got {taps.dtype}, must be one of bfloat16, float16, float32, float64")
    if taps.stride(2) != 1:
        raise ValueError(f"taps: got inner stride {taps.stride(2)}, must be 1")
    height, width = taps.shape[:2]
    channels = bias.shape[0]
    _check_vector("bias", bias, channels, taps)
    if partial.shape != (2, height, width, channels) or frame.shape != (height, width, channels):
        raise ValueError(
            f"partial, frame: got shapes {list(partial.shape)} and {list(frame.shape)}, must be "
            f"{[2, height, width, channels]} and {[height, width, channels]}"
        )
    if partial.dtype != bias.dtype or partial.device != taps.device:
        raise TypeError(f"partial: got {_check.describe(partial)}, must be {bias.dtype} on {taps.device}")
    if frame.dtype not in (torch.uint8, torch.float32, torch.float64) or frame.device != taps.device:
        raise TypeError(f"frame: got {_check.describe(frame)}, must be uint8, float32 or float64 on {taps.device}")
    _check.contiguous("partial", partial)
    _check.contiguous("frame", frame)
    return Launch()


def frame_pixels(taps: Tensor, bias: Tensor, partial: Tensor, frame: Tensor, *, backend: str | None = None) -> None:
    """frame <- clamp(taps[2C:3C] + partial[0] + bias, -1, 1); partial[0] <- taps[C:2C] + partial[1];
    partial[1] <- taps[0:C].

    Args:
        taps: [H, W, 3 * C or more]: the last convolution's temporal taps, the oldest first, by row and pixel strides.
        bias: float32 [C] (float64 where taps is).
        partial: [2, H, W, C] of bias's dtype, written: partial sums of this frame and the next one.
        frame: [H, W, C], written; a float dtype, or uint8: then floor(127.5 * pixel + 128).

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(backend, taps, bias, partial, frame)
