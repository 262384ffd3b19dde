"""What stands between two convolutions of the video decoder, on the pixels of one frame."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Written
from lingbot_kernels.ops._library import kernel_op


def _place(y: Tensor, bias: Tensor, *_: object) -> tuple[str, torch.dtype, int, int]:
    pixels, channels = (y.shape[0] * y.shape[1], bias.shape[0]) if y.dim() == 3 and bias.dim() == 1 else (0, 0)
    return y.device.type, y.dtype, pixels, channels


def _check_frame(name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """x must be [H, W, C] of `shape`, of one of `dtypes`, on like's device, with unit channel stride."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {list(x.shape)}, must be {list(shape)}")
    if x.dtype not in dtypes or x.device != like.device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: got {_check.describe(x)}, must be {wanted} on {like.device}")
    if x.stride(2) != 1 and shape[2] > 1:
        raise ValueError(f"{name}: got inner stride {x.stride(2)}, must be 1")


def _check_vector(name: str, v: Tensor, channels: int, like: Tensor) -> None:
    """v must be contiguous [channels] in float32, or float64 where `like` is."""
    if v.shape != (channels,):
        raise ValueError(f"{name}: got shape {list(v.shape)}, must be [{channels}]")
    wanted = torch.promote_types(like.dtype, torch.float32)
    if v.dtype != wanted or v.device != like.device:
        raise TypeError(f"{name}: got {_check.describe(v)}, must be {wanted} on {like.device}")
    _check.contiguous(name, v)


@kernel_op("frame_norm_silu", place=_place)
def _op(
    y: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stream: Written | None,
    gamma: Tensor | None,
    act: Written | None,
    add_stream: bool,
    silu: bool,
    parities: bool,
) -> Launch:
    if y.dim() != 3:
        raise ValueError(f"y: got {_check.describe(y)}, must be [H, W, C]")
    if y.dtype not in _check.FLOATS:
        raise TypeError(f"y: got {y.dtype}, must be one of bfloat16, float16, float32, float64")
    if y.stride(2) != 1 and y.shape[2] > 1:
        raise ValueError(f"y: got inner stride {y.stride(2)}, must be 1")
    height, width, channels = y.shape
    if parities:
        if channels % 4 or height < 1 or width < 1:
            raise ValueError(f"y: got shape {list(y.shape)}, must be [H / 2 + 1, W / 2 + 1, 4 * C] with parities")
        height, width, channels = 2 * (height - 1), 2 * (width - 1), channels // 4
    shape = (height, width, channels)
    _check_vector("bias", bias, channels, y)
    if gamma is not None:
        _check_vector("gamma", gamma, channels, y)
    if residual is not None:
        _check_frame("residual", residual, shape, (y.dtype,), y)
    if stream is None and act is None:
        raise ValueError("stream, act: got neither, must be given one to write")
    if add_stream and stream is None:
        raise ValueError("add_stream: got True, must be False without a stream")
    if stream is not None:
        _check_frame("stream", stream, shape, (y.dtype, torch.promote_types(y.dtype, torch.float32)), y)
        _check.own_memory("stream", stream, "pixel")
    if act is not None:
        _check_frame("act", act, shape, (y.dtype,), y)
        _check.own_memory("act", act, "pixel")
    return Launch()


def frame_norm_silu(
    y: Tensor,
    bias: Tensor,
    *,
    act: Tensor | None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    stream: Tensor | None = None,
    add_stream: bool = False,
    silu: bool = True,
    parities: bool = False,
    backend: str | None = None,
) -> None:
    """v = y + bias + residual + stream; stream <- v; act <- SiLU(v / max(||v||, 1e-12) * sqrt(C) * gamma).

    The norm is over the channels of a pixel. All in float32, rounded once for each tensor that is written.

    Args:
        y: [H, W, C], bfloat16, float16 or float32 (float64 by the reference): what a convolution gave, without its
            bias; rows and pixels by any strides, unit channel stride, as of all frames here.
        bias: float32 [C].
        act: [H, W, C] of y's dtype, written: where the next convolution reads, such as a slot of a ring; or None.
        gamma: float32 [C]; None leaves the norm out.
        residual: [H, W, C] of y's dtype, added; or None.
        stream: [H, W, C] of y's dtype or float32, written; or None.
        add_stream: add what `stream` held.
        silu: whether SiLU is applied to `act`.
        parities: y is [H / 2 + 1, W / 2 + 1, 4 * C], straight from a convolution that made the four pixels of each two
            by two: pixel (2i + a, 2j + b) is group 2a + b at (i + a, j + b).

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(backend, y, bias, residual, stream, gamma, act, add_stream, silu, parities)
