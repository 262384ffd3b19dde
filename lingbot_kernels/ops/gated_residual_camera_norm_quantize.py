"""`gated_residual_camera_norm` whose norm leaves as int8 codes with a scale: what comes before int8 cross-attention."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.ops._quantized import codes_of
from lingbot_kernels.ops.gated_residual_camera_norm import check_camera_norm


@kernel_op("gated_residual_camera_norm_quantize", returns=("x_out", "codes", "row_scale"))
def _op(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, signs: Tensor | None, rotate: bool,
) -> Launch:  # fmt: skip
    check_camera_norm(x, delta, gate, cam_scale, cam_shift, weight, bias)
    outputs = [Output(x), *codes_of(x, signs)]
    return Launch(outputs, {**sizes(x), "residual_dtype": x.dtype, "dtype": delta.dtype})


def gated_residual_camera_norm_quantize(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    cam_scale: Tensor | None,
    cam_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    signs: Tensor | None = None,
    rotate: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift, and `rotate_quantize` of
    y = layer_norm(x_out) * weight + bias. Returns (x_out [B, S, D], codes int8 [B, S, Dp], row_scale float32 [B, S]).

    x_out is that of `gated_residual_camera_norm`, rounded to x's dtype once, and the norm sees the rounded value. y is
    the float32 value, never rounded to delta's dtype.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what self-attention gave.
        gate: float32 [D] or [B, D] (float64 where x is); None is a gate of one.
        cam_scale, cam_shift: [B, S, D] of delta's dtype, contiguous; both None without a camera.
        weight, bias: [D], of delta's dtype.
        signs, rotate: as in `rotate_quantize`.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, delta, gate, cam_scale, cam_shift, weight, bias, eps, signs, rotate)
