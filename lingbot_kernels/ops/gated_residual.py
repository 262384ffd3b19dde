"""Gated residual addition: what closes a block."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Output, Plan


def _check_arguments(x: Tensor, delta: Tensor, gate: Tensor | None) -> None:
    _check.residual("x", x, "delta", delta)
    if gate is not None:
        _check.modulation("gate", gate, x)


def _plan(x: Tensor, delta: Tensor, gate: Tensor | None, backend: str) -> Plan:
    _check_arguments(x, delta, gate)
    if backend == "reference":
        return Plan(reference.gated_residual, ("x", "delta", "gate"))
    outputs = (Output("x_out", like="x"),)
    if backend == "triton":
        from lingbot_kernels.triton import gated_residual as kernel

        _dispatch.demand("gated_residual", "triton", kernel.why_not(x, delta))
        return Plan(kernel.gated_residual, ("x", "delta", "gate", "x_out"), outputs)
    codes = _native.DTYPE_CODES
    fields = ("x", "delta", *_native.vector("gate", gate), "x_out", *x.shape, codes[x.dtype], codes[delta.dtype])
    return _native.plan("gated_residual", backend, fields, outputs)


def _fake(x: Tensor, delta: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    _check_arguments(x, delta, gate)
    return x.new_empty(x.shape)


_op = register_kernel(
    "gated_residual(Tensor x, Tensor delta, Tensor? gate, str backend) -> Tensor",
    _plan,
    _fake,
    place=lambda x, *_: _dispatch.place(x),
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
    return _op(backend, x, delta, gate)
