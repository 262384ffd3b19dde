"""RMSNorm over the whole row: the norm of cross-attention's Q and K."""

from __future__ import annotations

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Launch, Output, sizes
from lingbot_kernels.ops._library import kernel_op


@kernel_op("rms_norm", returns=("y",))
def _op(x: Tensor, weight: Tensor, eps: float) -> Launch:
    _check.tokens("x", x)
    _check.weight("weight", weight, x.shape[2], x)
    return Launch([Output(x)], {**sizes(x), "dtype": x.dtype})


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """y = T(T(x32 * rsqrt(mean(x32^2) + eps)) * weight) [B, S, D]: RMSNorm (Zhang and Sennrich 2019) with the two
    roundings of the official model.

    Args:
        x: [B, S, D], bfloat16, float16 or float32 (float64 by the reference), unit inner stride.
        weight: [D], of x's dtype.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    return _op(backend, x, weight, eps)
