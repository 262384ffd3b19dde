"""Gated residual addition: what closes a block."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register


def _check_arguments(x: Tensor, delta: Tensor, gate: Tensor | None) -> None:
    _check.residual("x", x, "delta", delta)
    if gate is not None:
        _check.modulation("gate", gate, x)


def _run(x: Tensor, delta: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    _check_arguments(x, delta, gate)
    if backend == "reference":
        return reference.gated_residual(x, delta, gate)
    batch, num_tokens, dim = x.shape
    x_out = torch.empty_like(x)
    if backend == "triton":
        from lingbot_kernels.triton import gated_residual as kernel

        _dispatch.demand("gated_residual", "triton", kernel.why_not(x, delta))
        kernel.gated_residual(x, delta, gate, x_out)
    else:
        codes = _native.DTYPE_CODES
        _native.launch(
            backend, "gated_residual", x.device,
            x.data_ptr(), delta.data_ptr(), *_native.vector(gate), x_out.data_ptr(),
            batch, num_tokens, dim, codes[x.dtype], codes[delta.dtype],
        )  # fmt: skip
    return x_out


def _fake(x: Tensor, delta: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    _check_arguments(x, delta, gate)
    return x.new_empty(x.shape)


_op = register(
    "gated_residual(Tensor x, Tensor delta, Tensor? gate, str backend) -> Tensor",
    _run,
    _fake,
)


def gated_residual(x: Tensor, delta: Tensor, gate: Tensor | None, *, backend: str | None = None) -> Tensor:
    """x_out = x + delta * gate [B, S, D], in float32, rounded to x's dtype once.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what the residual branch gave.
        gate: float32 [D] or [B, D] (float64 where x is); None is a gate of one.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    chosen = _dispatch.resolve_tokens("gated_residual", backend, x)
    return _op(x, delta, gate, chosen)
