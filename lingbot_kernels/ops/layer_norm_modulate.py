"""Layer norm and the timestep's scale and shift, in one pass: what opens a block and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op


@kernel_op("layer_norm_modulate", returns=("y",))
def _op(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Launch:
    _check.tokens("x", x)
    _check.contiguous("x", x)
    _check.modulation("shift", shift, x)
    _check.modulation("scale", scale, x)
    if out_dtype != x.dtype and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out_dtype: got {out_dtype}, must be x's {x.dtype}, since only a float32 x may be narrowed")
    return Launch([Output(x, dtype=out_dtype)], {**sizes(x), "residual_dtype": x.dtype, "dtype": out_dtype})


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = layer_norm(x) * (1 + scale) + shift [B, S, D], the norm without parameters, all in float32, one rounding.

    Adaptive layer norm as in DiT (Peebles and Xie 2023).

    Args:
        x: residual stream [B, S, D], contiguous.
        shift, scale: float32 [D] or [B, D] (float64 where x is).
        out_dtype: dtype of y; x's own where None. Only a float32 x may be narrowed.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, shift, scale, eps, out_dtype or x.dtype)
