"""What a problem of the kernel bench is, and the inputs that several ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.op_bytes import op_bytes

EPS = 1e-6
THETA = 10000.0
CACHES = ("k_cache", "v_cache")
_WRITTEN = ("out", "outs", "q_outs", "k_caches", "v_caches", "k_codes", "k_codes_scale")
_POISON = 77  # of codes, which have no NaN
RING_OPS = ("qk_norm_rope_kv_write", "k_norm_rope_kv_write", "qkv_unpack_kv_write")
GATE_QUERIES = 64  # rows of attention and of matrix products that the gate judges: float64 scores of all would be 40 GB

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Make = Callable[[torch.device], Inputs]
Bind = Callable[[Inputs, str], Callable[[], Any]]
Plain = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Problem:
    """One op in one case.

    Attributes:
        case, op: the case's name with what sets this variant apart, and the op's.
        shape: of the op's main operand.
        dtype: of the activations; a float32 residual stream is in `case`.
        make: device -> fresh random inputs.
        bind: (inputs, backend) -> the call that is measured: the public op on these inputs.
        plain: inputs of any dtype -> outputs, the plain torch formulation; of float64 inputs it is the oracle.
        tokens, dim: what dispatch goes by; those of a shape [1, tokens, dim] where 0.
        bytes: activations read and written once (weights, vectors and tables left out: they are under 1%); where 0,
            what `op_bytes` says, with `sizes`.
        flops: of a matrix product or attention, else 0.
        backends: that can be asked for.
        judged: (inputs, outputs) -> the part of the outputs that the gate judges.
        ceiling: what the row's ceiling is measured with: "copy" of `bytes`, "gemm" or "" (none).
    """

    case: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str
    make: Make
    bind: Bind
    plain: Plain
    tokens: int = 0
    dim: int = 0
    bytes: int = 0
    sizes: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    backends: tuple[str, ...] = ("cuda", "triton", "cpu", "reference")
    judged: Callable[[Inputs, Outputs], Outputs] | None = None
    ceiling: str = "copy"

    def __post_init__(self) -> None:
        _, tokens, dim, *_ = (*self.shape, 0)
        for name, value in (("tokens", tokens), ("dim", dim)):
            object.__setattr__(self, name, getattr(self, name) or value)
        if not self.bytes:
            moved = op_bytes(self.op, self.tokens, self.dim, self.dtype.itemsize, **self.sizes)
            object.__setattr__(self, "bytes", moved)

    def results(self, inputs: Inputs, outputs: Outputs) -> Outputs:
        """Everything the gate compares: outputs, then the ring slots that were written."""
        if self.judged is not None:
            outputs = self.judged(inputs, outputs)
        if self.op not in RING_OPS:
            return outputs
        slots = written_slots(inputs)
        return (*outputs, *(inputs[name][:, slots] for name in CACHES))


def given(inputs: Inputs, arguments: Sequence[Any]) -> list[Any]:
    """Each of `arguments` that is the name of an input as that input, the others as they are."""
    return [inputs[each] if isinstance(each, str) and each in inputs else each for each in arguments]


def op_problem(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, op: str, make: Make, arguments: Sequence[Any], *,
    plain: Plain | None = None, **more: Any,
) -> Problem:  # fmt: skip
    """The public op on `arguments`, see `given`; its formulation is the reference of its name, or `plain`."""
    function, formulation = getattr(ops, op), getattr(reference, op, None)

    def bind(inputs: Inputs, backend: str) -> Callable[[], Any]:
        return partial(function, *given(inputs, arguments), backend=backend)

    def referred(inputs: Inputs) -> Outputs:
        assert formulation is not None
        return as_tuple(formulation(*given(inputs, arguments)))

    return Problem(case, shape, dtype, op, make, bind, plain or referred, **more)


def call_problem(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, op: str, make: Make, call: Callable[..., Any], **more: Any
) -> Problem:
    """The same where `call(function, inputs, **options)` makes the call, of the op and of its reference alike."""
    function, formulation = getattr(ops, op), getattr(reference, op)
    return Problem(
        case, shape, dtype, op, make, lambda inputs, backend: partial(call, function, inputs, backend=backend),
        lambda inputs: as_tuple(call(formulation, inputs)), **more,
    )  # fmt: skip


def written_slots(inputs: Inputs) -> Tensor:
    """Slots of the ring that the chunk of `inputs` goes to."""
    tokens = inputs["k"].shape[1] if "k" in inputs else inputs["packed"].shape[0]
    cache = inputs["k_cache"]
    return inputs["ring"].slots(tokens, cache.shape[1], cache.device)


def as_tuple(out: Any) -> Outputs:
    """An op's result, be it None, a tensor or several, as a tuple."""
    return () if out is None else out if isinstance(out, tuple) else (out,)


def widened(inputs: Inputs) -> Inputs:
    """The same inputs in float64, in memory of their own."""
    return {
        name: value.to(torch.float64, copy=True) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def poisoned(inputs: Inputs) -> Inputs:
    """The same inputs, with what the op writes (the ring's caches, or the buffer it fills) apart and full of NaN, codes
    full of one value.
    """

    def poison(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan if x.is_floating_point() else _POISON)

    written = (*CACHES, *_WRITTEN) if "ring" in inputs or not inputs.keys().isdisjoint(_WRITTEN) else ()
    return {**inputs, **{name: poison(inputs[name]) for name in written if name in inputs}}


def randn(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def norm_weight(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (1 + 0.2 * torch.randn(dim, device=device)).to(dtype)


def residual_inputs(
    case: KernelCase, dtype: torch.dtype, residual: torch.dtype, device: torch.device, camera: bool = False
) -> Inputs:  # fmt: skip
    """A stream x, a branch delta, modulation and affine vectors, and the camera's scale and shift where asked for."""
    shape = (1, case.tokens, case.dim)
    inputs = {
        "x": randn(*shape, device=device, dtype=residual),
        "delta": randn(*shape, device=device, dtype=dtype),
        "weight": norm_weight(case.dim, device, dtype), "bias": 0.1 * randn(case.dim, device=device, dtype=dtype),
        "cam_scale": None, "cam_shift": None,
    }  # fmt: skip
    inputs |= {key: 0.5 * torch.randn(case.dim, device=device) for key in ("shift", "scale", "gate")}
    if camera:
        inputs |= {key: randn(*shape, device=device, dtype=dtype) for key in ("cam_scale", "cam_shift")}
    return inputs


def spread_rows(rows: int) -> torch.Tensor:
    """Indices of at most GATE_QUERIES rows, from the first to the last."""
    return torch.linspace(0, rows - 1, min(rows, GATE_QUERIES)).long()


def judged_rows(inputs: Inputs, outputs: Outputs) -> Outputs:
    """The spread rows of an output that has all rows, [1, S, D]."""
    (out,) = outputs
    rows = inputs["rows"]
    return (out if out.shape[1] == len(rows) else out[:, rows.to(out.device)],)
