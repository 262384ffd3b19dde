"""Gate, residual, camera modulation and the affine layer norm before cross-attention, in one pass."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan


def _check_arguments(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor,
) -> None:  # fmt: skip
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


def _plan(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, backend: str,
) -> Plan:  # fmt: skip
    _check_arguments(x, delta, gate, cam_scale, cam_shift, weight, bias)
    arguments = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias")
    if backend == "reference":
        return Plan(reference.gated_residual_camera_norm, (*arguments, "eps"))
    outputs = (Output("x_out", like="x"), Output("y", like="delta"))
    if backend == "triton":
        from lingbot_kernels.triton import gated_residual_camera_norm as kernel

        _dispatch.demand("gated_residual_camera_norm", "triton", kernel.why_not(x, delta))
        return Plan(kernel.gated_residual_camera_norm, (*arguments, "x_out", "y", "eps"), outputs)
    codes = _native.DTYPE_CODES
    fields = (
        "x", "delta", *_native.vector("gate", gate), "cam_scale", "cam_shift", "weight", "bias", "x_out", "y",
        *x.shape, codes[x.dtype], codes[delta.dtype], "eps",
    )  # fmt: skip
    return _native.plan("gated_residual_camera_norm", backend, fields, outputs)


def _fake(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_arguments(x, delta, gate, cam_scale, cam_shift, weight, bias)
    return x.new_empty(x.shape), delta.new_empty(x.shape)


_op = register_kernel(
    "gated_residual_camera_norm(Tensor x, Tensor delta, Tensor? gate, Tensor? cam_scale, Tensor? cam_shift, "
    "Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor)",
    _plan,
    _fake,
    place=lambda x, *_: _dispatch.place(x),
)


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
