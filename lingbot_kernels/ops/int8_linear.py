"""A linear layer of int8 rows and int8 weights: exact sums, then scales, bias and activation in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output
from lingbot_kernels.ops._library import kernel_op
from lingbot_kernels.reference.int8_linear import ACTIVATIONS

LARGEST_K = 131071  # 128 * 128 * K must stay below 2**31


def _place(x: Tensor, *others: Any) -> tuple[str, torch.dtype, int, int]:
    """(device type, dtype of the result, tokens, K), by which a backend is chosen."""
    tokens, depth = x.shape[1:] if x.dim() == 3 else (0, 0)
    return x.device.type, others[-1], tokens, depth


@kernel_op("int8_linear", returns=("y",), place=_place)
def _op(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype,
) -> Launch:  # fmt: skip
    if x.dim() != 3 or x.dtype != torch.int8:
        raise TypeError(f"x: got {_check.describe(x)}, must be int8 [B, S, K]")
    batch, tokens, depth = x.shape
    if not 1 <= depth <= LARGEST_K:
        raise ValueError(f"x: got {depth} channels, must be from 1 to {LARGEST_K} for sums to fit int32")
    if x.stride(2) != 1 and depth > 1:
        raise ValueError(f"x: got inner stride {x.stride(2)}, must be 1")
    if w.dim() != 2 or w.shape[1] != depth or w.shape[0] < 1:
        raise ValueError(f"w: got shape {list(w.shape)}, must be [N, {depth}], N at least 1")
    if w.dtype != torch.int8 or w.device != x.device:
        raise TypeError(f"w: got {_check.describe(w)}, must be torch.int8 on {x.device}")
    _check.contiguous("w", w)
    columns = w.shape[0]
    for name, scale, shape in (("x_scale", x_scale, (batch, tokens)), ("w_scale", w_scale, (columns,))):
        if scale.shape != shape:
            raise ValueError(f"{name}: got shape {list(scale.shape)}, must be {list(shape)}")
        if scale.dtype != torch.float32 or scale.device != x.device:
            raise TypeError(f"{name}: got {_check.describe(scale)}, must be torch.float32 on {x.device}")
        _check.contiguous(name, scale)
    if bias is not None:
        if bias.shape != (columns,):
            raise ValueError(f"bias: got shape {list(bias.shape)}, must be [{columns}]")
        if bias.dtype not in _check.FLOATS or bias.device != x.device:
            raise TypeError(f"bias: got {_check.describe(bias)}, must be a float on {x.device}")
        _check.contiguous("bias", bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, must be None or 'gelu_tanh'")
    if out_dtype not in _check.FLOATS:
        raise TypeError(f"out_dtype: got {out_dtype}, must be one of bfloat16, float16, float32, float64")
    fields: dict[str, Any] = {
        "rows": batch * tokens, "inputs": depth, "outputs": columns, "gelu": int(activation is not None),
        "bias_dtype": torch.float32 if bias is None else bias.dtype, "dtype": out_dtype,
    }  # fmt: skip
    return Launch([Output(x, (batch, tokens, columns), out_dtype)], fields)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = activation((x w^T) * (x_scale * w_scale) + bias), [B, S, N] of `out_dtype`.

    The sums are exact, in int32: the same on every backend. The epilogue is float32 (float64 for a float64 result),
    rounded once. A row whose scale is NaN gives NaN.

    Args:
        x: int8 [B, S, K], K at most 131071; rows may lie apart (on a CPU they are gathered first).
        x_scale: float32 [B, S], contiguous.
        w: int8 [N, K], contiguous.
        w_scale: float32 [N], contiguous.
        bias: [N] of any float dtype, contiguous, or None.
        activation: None or "gelu_tanh" (Hendrycks and Gimpel 2016, section 2).

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    if x.device.type == "cpu" and not x.is_contiguous():
        x = x.contiguous()
    return _op(backend, x, x_scale, w, w_scale, bias, activation, out_dtype)
