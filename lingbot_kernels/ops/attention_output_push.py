"""Attention's output for this rank's heads, straight into the rows of the ranks that own the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from lingbot_kernels.ops import _check
from lingbot_kernels.ops._declare import Addresses, Launch, Written
from lingbot_kernels.ops._library import kernel_op


@kernel_op("attention_output_push")
def _op(attended: Tensor, outs: Sequence[Written], column: int) -> Launch:
    _check.tokens("attended", attended)
    batch, num_tokens, width = attended.shape
    if not outs:
        raise ValueError("outs: got none, must be one a rank")
    for out in outs:
        _check.tokens("outs", out)
        _check.own_memory("outs", out, "batch and token")
        if (out.shape[0], out.shape[2], out.dtype, out.device, out.stride(1)) != (
            batch, outs[0].shape[2], attended.dtype, attended.device, outs[0].stride(1)
        ):  # fmt: skip
            raise ValueError(
                f"outs: got {_check.describe(out)}, must be [{batch}, tokens of the rank, D] of {attended.dtype} on "
                f"{attended.device}, alike in D and token stride"
            )
    total = sum(out.shape[1] for out in outs)
    if total != num_tokens:
        raise ValueError(f"outs: got {total} tokens in all, must be attended's {num_tokens}")
    if not 0 <= column <= outs[0].shape[2] - width:
        raise ValueError(f"column: got {column}, must be from 0 to D - {width} = {outs[0].shape[2] - width}")
    return Launch(
        fields={
            "addresses": Addresses(("outs",)), "ends": list(accumulate(out.shape[1] for out in outs)),
            "batch_strides": [out.stride(0) for out in outs], "token_stride": outs[0].stride(1),
            "batch": batch, "tokens": num_tokens, "width": width, "ranks": len(outs), "dtype": attended.dtype,
        }
    )  # fmt: skip


def attention_output_push(attended: Tensor, outs: Sequence[Tensor], column: int, *, backend: str | None = None) -> None:
    """attended[:, tokens of rank r] becomes outs[r][:, :, column : column + W]: the exchange back, in one pass.

    Tokens are the ranks' in turn, as many as outs[r] has. outs[r] lies in rank r's memory, which the GPUs of a host
    share; who reads it must wait until every rank has written (a barrier between the ranks).

    Args:
        attended: [B, S, W], all the chunk's tokens, this rank's heads; strided views serve.
        outs: a rank each, [B, tokens of the rank, D], alike in D and token stride.
        column: first channel of this rank's heads, rank * W.

    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend asked for by name can't serve.
    """
    _op(backend, attended, list(outs), column)
