"""Gated residual addition: what closes a block."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op


@kernel_op("gated_residual", returns=("x_out",))
def _op(x: Tensor, delta: Tensor, gate: Tensor | None) -> Launch:
    _check.residual("x", x, "delta", delta)
    if gate is not None:
        _check.modulation("gate", gate, x)
    return Launch([Output(x)], {**sizes(x), "residual_dtype": x.dtype, "dtype": delta.dtype})


def gated_residual(x: Tensor, delta: Tensor, gate: Tensor | None, *, backend: str | None = None) -> Tensor:
    """x_out = x + delta * gate [B, S, D], in float32, rounded to x's dtype once.

    Args:
        x: residual stream [B, S, D], contiguous, in delta's dtype or float32.
        delta: [B, S, D], contiguous: what the residual branch gave.
        gate: float32 [D] or [B, D] (float64 where x is); None is a gate of one.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, delta, gate)
