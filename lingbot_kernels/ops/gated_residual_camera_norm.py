"""Gate, residual, camera modulation and the affine layer norm before cross-attention, in one pass."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op


def check_camera_norm(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor,
) -> None:  # fmt: skip
    """What this op and its quantising form refuse."""
    _check.residual("x", x, "delta", delta)
    if gate is not None:
        _check.modulation("gate", gate, x)
    if (cam_scale is None) != (cam_shift is None):
        raise ValueError("cam_scale, cam_shift: got one of them, must be both or neither")
    for name, camera in (("cam_scale", cam_scale), ("cam_shift", cam_shift)):
        if camera is not None:
            _check.tokens(name, camera, delta)
            _check.contiguous(name, camera)
    for name, vector in (("weight", weight), ("bias", bias)):
        _check.weight(name, vector, x.shape[2], delta)


@kernel_op("gated_residual_camera_norm", returns=("x_out", "y"))
def _op(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float,
) -> Launch:  # fmt: skip
    check_camera_norm(x, delta, gate, cam_scale, cam_shift, weight, bias)
    return Launch([Output(x), Output(delta)], {**sizes(x), "residual_dtype": x.dtype, "dtype": delta.dtype})


def gated_residual_camera_norm(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    cam_scale: Tensor | None,
    cam_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift; y = layer_norm(x_out) * weight + bias. Returns
    (x_out, y).

    Arithmetic is float32. x_out is rounded to x's dtype once, and the norm sees the rounded value; y is rounded to
    delta's dtype once.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what self-attention gave.
        gate: float32 [D] or [B, D] (float64 where x is); None is a gate of one.
        cam_scale, cam_shift: [B, S, D] of delta's dtype, contiguous; both None without a camera.
        weight, bias: [D], of delta's dtype.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, delta, gate, cam_scale, cam_shift, weight, bias, eps)
