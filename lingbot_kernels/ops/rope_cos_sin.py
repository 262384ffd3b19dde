"""cos‖sin of 3D RoPE for any run of tokens, with no position tensor and no limit on the frame index."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops._declare import Launch, Varying, Written
from lingbot_kernels.ops._library import kernel_op


def _formula(out: Tensor, token_start: int, frame_stride: int, width: int, head_dim: int, theta: float) -> None:
    reference.rope_cos_sin(out.shape[0], token_start, frame_stride, width, head_dim, theta, out.device, out=out)


@kernel_op("rope_cos_sin", place=lambda out, *_: (out.device.type, out.dtype, *out.shape), formula=_formula)
def _op(out: Written, token_start: Varying, frame_stride: int, width: int, head_dim: int, theta: float) -> Launch:
    return Launch(fields={"num_tokens": out.shape[0]})  # checked by the public function, which makes `out`


def rope_cos_sin(
    num_tokens: int,
    token_start: int,
    frame_stride: int,
    width: int,
    head_dim: int,
    theta: float,
    device: torch.device | str,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """RoPE table, float32 [num_tokens, head_dim]: cosines in the first half of a row, sines in the second, one a pair.

    Row i is token n = token_start + i of a grid of `frame_stride` tokens a frame and `width` tokens a row, at
    (t, h, w) = (n // frame_stride, n % frame_stride // width, n % width). head_dim splits into head_dim - 4 *
    (head_dim // 6), 2 * (head_dim // 6) and 2 * (head_dim // 6) channels for t, h and w; pair i of an axis of D
    channels turns by theta ** (-2i / D) a step (RoFormer, section 3.4, applied to each axis as Wan does). Angles, cos
    and sin are float64, rounded once: exact to 1 float32 ulp for any frame index.

    Args:
        out: float32 [num_tokens, head_dim] to fill and return, e.g. a CUDA graph's static buffer; allocated where None.
        backend: "cuda", "triton", "cpu", "reference" or "auto".

    Raises:
        ValueError: a size that is not positive, a negative token_start, an odd head_dim or one over 256, a wrong `out`.
        BackendUnavailable: the backend asked for by name can't serve.
    """
    device = torch.device(device)
    if num_tokens < 0 or token_start < 0:
        raise ValueError(f"num_tokens, token_start: got {num_tokens}, {token_start}, must be 0 or more")
    if frame_stride < 1 or width < 1 or frame_stride % width:
        raise ValueError(f"frame_stride, width: got {frame_stride}, {width}, must be positive, width a divisor")
    if head_dim % 2 or not 0 < head_dim <= 256:
        raise ValueError(f"head_dim: got {head_dim}, must be even and from 2 to 256")
    if not theta > 0:
        raise ValueError(f"theta: got {theta}, must be positive")
    if out is None:
        out = torch.empty(num_tokens, head_dim, dtype=torch.float32, device=device)
    elif out.shape != (num_tokens, head_dim) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"out: got {out.dtype} {list(out.shape)}, must be contiguous float32 [{num_tokens}, {head_dim}]"
        )
    elif out.device.type != device.type or (device.index is not None and out.device != device):
        raise ValueError(f"out: got device {out.device}, must be {device}")
    _op(backend, out, token_start, frame_stride, width, head_dim, float(theta))
    return out
