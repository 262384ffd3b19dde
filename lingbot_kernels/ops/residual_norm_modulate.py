"""Residual addition and the modulated layer norm that follows it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register


def _check_arguments(x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None) -> None:
    _check.residual("x", x, "delta", delta)
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None:
            _check.modulation(name, vector, x)


def _run(
    x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check_arguments(x, delta, shift, scale, gate)
    if backend == "reference":
        return reference.residual_norm_modulate(x, delta, shift, scale, eps, gate)
    batch, num_tokens, dim = x.shape
    x_out, y = torch.empty_like(x), torch.empty_like(delta)
    if backend == "triton":
        from lingbot_kernels.triton import residual_norm_modulate as kernel

        _dispatch.demand("residual_norm_modulate", "triton", kernel.why_not(x, delta))
        kernel.residual_norm_modulate(x, delta, gate, shift, scale, x_out, y, eps)
    else:
        codes = _native.DTYPE_CODES
        _native.launch(
            backend, "residual_norm_modulate", x.device,
            x.data_ptr(), delta.data_ptr(), *_native.vector(gate), *_native.vector(shift), *_native.vector(scale),
            x_out.data_ptr(), y.data_ptr(), batch, num_tokens, dim, codes[x.dtype], codes[delta.dtype], eps,
        )  # fmt: skip
    return x_out, y


def _fake(
    x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check_arguments(x, delta, shift, scale, gate)
    return x.new_empty(x.shape), delta.new_empty(x.shape)


_op = register(
    "residual_norm_modulate(Tensor x, Tensor delta, Tensor shift, Tensor scale, float eps, Tensor? gate, str backend) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)


def residual_norm_modulate(
    x: Tensor,
    delta: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    gate: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out = x + delta * gate; y = layer_norm(x_out) * (1 + scale) + shift. Returns (x_out, y), both [B, S, D].

    Arithmetic is float32. x_out is rounded to x's dtype first and the norm sees the rounded value, so that the fused
    pass equals the two passes; y is rounded to delta's dtype once.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what the residual branch gave.
        shift, scale, gate: float32 [D] or [B, D] (float64 where x is); gate None is a gate of one.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    chosen = _dispatch.resolve_tokens("residual_norm_modulate", backend, x)
    return _op(x, delta, shift, scale, eps, gate, chosen)
