"""Gate, residual, camera modulation and the affine layer norm before cross-attention, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register


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


def _run(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_arguments(x, delta, gate, cam_scale, cam_shift, weight, bias)
    batch, num_tokens, dim = x.shape
    if backend == "reference":
        return reference.gated_residual_camera_norm(x, delta, gate, cam_scale, cam_shift, weight, bias, eps)
    x_out, y = torch.empty_like(x), torch.empty_like(delta)
    if backend == "triton":
        from lingbot_kernels.triton import gated_residual_camera_norm as kernel

        _dispatch.demand("gated_residual_camera_norm", "triton", kernel.why_not(x, delta))
        kernel.gated_residual_camera_norm(x, delta, gate, cam_scale, cam_shift, weight, bias, x_out, y, eps)
    else:
        codes = _native.DTYPE_CODES
        _native.launch(
            backend, "gated_residual_camera_norm", x.device,
            x.data_ptr(), delta.data_ptr(), *_native.vector(gate),
            _native.pointer(cam_scale), _native.pointer(cam_shift), weight.data_ptr(), bias.data_ptr(),
            x_out.data_ptr(), y.data_ptr(), batch, num_tokens, dim, codes[x.dtype], codes[delta.dtype], eps,
        )  # fmt: skip
    return x_out, y


def _fake(
    x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_arguments(x, delta, gate, cam_scale, cam_shift, weight, bias)
    return x.new_empty(x.shape), delta.new_empty(x.shape)


_op = register(
    "gated_residual_camera_norm(Tensor x, Tensor delta, Tensor? gate, Tensor? cam_scale, Tensor? cam_shift, "
    "Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
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
    chosen = _dispatch.resolve_tokens("gated_residual_camera_norm", backend, x)
    return _op(x, delta, gate, cam_scale, cam_shift, weight, bias, eps, chosen)
