"""Layer norm and the timestep's scale and shift, in one pass: what opens a block and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register


def _check_arguments(x: Tensor, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> None:
    _check.tokens("x", x)
    _check.contiguous("x", x)
    _check.modulation("shift", shift, x)
    _check.modulation("scale", scale, x)
    if out_dtype != x.dtype and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out_dtype: got {out_dtype}, must be x's {x.dtype}, since only a float32 x may be narrowed")


def _run(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> Tensor:
    _check_arguments(x, shift, scale, out_dtype)
    if backend == "reference":
        return reference.layer_norm_modulate(x, shift, scale, eps, out_dtype=out_dtype)
    batch, num_tokens, dim = x.shape
    y = torch.empty_like(x, dtype=out_dtype)
    if backend == "triton":
        from lingbot_kernels.triton import layer_norm_modulate as kernel

        _dispatch.demand("layer_norm_modulate", "triton", kernel.why_not(x, y))
        kernel.layer_norm_modulate(x, shift, scale, y, eps)
    else:
        codes = _native.DTYPE_CODES
        _native.launch(
            backend, "layer_norm_modulate", x.device,
            x.data_ptr(), *_native.vector(shift), *_native.vector(scale), y.data_ptr(),
            batch, num_tokens, dim, codes[x.dtype], codes[out_dtype], eps,
        )  # fmt: skip
    return y


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, backend: str) -> Tensor:
    _check_arguments(x, shift, scale, out_dtype)
    return x.new_empty(x.shape, dtype=out_dtype)


_op = register(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype, str backend) -> Tensor",
    _run,
    _fake,
)


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
    chosen = _dispatch.resolve_tokens("layer_norm_modulate", backend, x)
    return _op(x, shift, scale, eps, out_dtype or x.dtype, chosen)
