"""Attention's output for this rank's heads, straight into the rows of the ranks that own the tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import _check, _dispatch, _native
from lingbot_kernels.ops._library import register_kernel
from lingbot_kernels.ops._plan import Plan


def _check_arguments(attended: Tensor, outs: Sequence[Tensor], column: int) -> None:
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


def _plan(attended: Tensor, outs: Sequence[Tensor], column: int, backend: str) -> Plan:
    _check_arguments(attended, outs, column)
    if backend == "reference":
        return Plan(reference.attention_output_push, ("attended", "outs", "column"))
    ends = array("q", accumulate(out.shape[1] for out in outs))
    batch_strides = array("q", [out.stride(0) for out in outs])
    fields = (
        *_native.rows("attended", attended), "outs", ends, batch_strides, outs[0].stride(1), column,
        *attended.shape, len(outs), _native.DTYPE_CODES[attended.dtype],
    )  # fmt: skip
    return _native.plan_with_arrays("attention_output_push", backend, fields, ("outs",))


def _fake(attended: Tensor, outs: Sequence[Tensor], column: int, backend: str) -> None:
    _check_arguments(attended, outs, column)


_op = register_kernel(
    "attention_output_push(Tensor attended, Tensor(a!)[] outs, SymInt column, str backend) -> ()",
    _plan,
    _fake,
    place=lambda attended, *_: _dispatch.place(attended),
)


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
