"""What the tests of the ops share: running an op on copies, the error rule, refusals, torch.library's own checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")

Arguments = dict[str, Any]
Errors = type[Exception] | tuple[type[Exception], ...]


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in tensors(item)]
    return [] if value is None else [value]


def run(op: Callable[..., Any], arguments: Mapping[str, Any], mutated: Sequence[str] = (), **options: Any) -> Any:
    """Outputs, then the mutated arguments, of the op on copies of these."""
    own = {name: value.clone() if name in mutated else value for name, value in arguments.items()}
    return [*tensors(op(**own, **options)), *(own[name] for name in mutated)]


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_within_rule(
    op: Callable[..., Any], reference: Callable[..., Any], arguments: Arguments, mutated: Sequence[str] = ()
) -> None:
    """The cpu backend errs against float64 at most 1.25 times what the plain formulation in this dtype errs, and both
    leave unwritten what is not theirs. Same inputs twice: same bits.
    """
    got, again = (run(op, arguments, mutated, backend="cpu") for _ in range(2))
    plain = run(op, arguments, mutated, backend="reference")
    exact = run(reference, {name: wide(value) for name, value in arguments.items()}, mutated)
    assert len(got) == len(plain) == len(exact)
    for own, repeated, other, true in zip(got, again, plain, exact, strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape == true.shape
        assert same_bits(own, repeated)
        assert torch.equal(own.isnan(), true.isnan()) and torch.equal(other.isnan(), true.isnan())
        error, allowed = ((x.double() - true).nan_to_num().norm() for x in (own, other))
        assert error <= 1.25 * allowed + 1e-300, (error, allowed)


def assert_refused(
    op: Callable[..., Any], arguments: Arguments, change: Arguments, error: Errors, message: str,
    mutated: Sequence[str] = (), backends: Sequence[str] = BACKENDS,
) -> None:  # fmt: skip
    """Each backend, and the automatic choice, names what is wrong, also where a like call was just found valid; caches
    keep their bits.
    """
    for options in ({}, *({"backend": backend} for backend in backends)):
        run(op, arguments, mutated, **options)
    arguments = {**arguments, **change}
    before = {name: arguments[name].clone() for name in mutated}
    for options in ({}, *({"backend": backend} for backend in backends)):
        with pytest.raises(error, match=message):
            op(**arguments, **options)
    for name, value in before.items():
        if value.device.type != "meta":
            assert same_bits(arguments[name], value)


def check_registration(name: str, samples: Sequence[tuple[Any, ...]]) -> None:
    """Schema (what is mutated, what aliases), autograd registration, the fake implementation, and AOT dispatch."""
    for sample in samples:
        torch.library.opcheck(getattr(torch.ops.lingbot_kernels, name).default, sample)


def table(tokens: int, head_dim: int, start: int = 20) -> Tensor:
    return ops.rope_cos_sin(tokens, start, 6, 3, head_dim, 1e4, "cpu", backend="reference")


def kv_arguments(dtype: torch.dtype, batch: int = 2, tokens: int = 5, heads: int = 3, head_dim: int = 16) -> Arguments:
    """Q, K and V as strided views of one projection; a chunk that wraps a ring of 13 slots, 2 of them a sink."""
    torch.manual_seed(0)
    dim = heads * head_dim
    q, k, v = torch.randn(batch, tokens, 3 * dim).to(dtype).chunk(3, dim=-1)
    q_weight, k_weight = (1 + 0.2 * torch.randn(2, dim)).to(dtype).unbind(0)
    return {
        "q": q, "k": k, "v": v, "q_weight": q_weight.clone(), "k_weight": k_weight.clone(),
        "cos_sin": table(tokens, head_dim),
        "k_cache": torch.full((batch, 13, heads, head_dim), float("nan")).to(dtype),
        "v_cache": torch.full((batch, 13, heads, head_dim), float("nan")).to(dtype),
        "ring": ops.RingPosition(10, 2), "eps": 1e-6,
    }  # fmt: skip


CACHES = ("k_cache", "v_cache")


def kv_refusals(with_q: bool) -> dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]]:
    """(changed arguments, error, message) of the ops that write the ring from K and V."""
    cases: dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]] = {
        "k dims": (lambda a: {"k": a["k"][0]}, ValueError, r"k: got .*must be \[B, S, D\]"),
        "k one dim": (lambda a: {"k": a["k"][0, 0]}, ValueError, r"k: got .*must be \[B, S, D\]"),
        "k integers": (lambda a: {"k": a["k"].int()}, (TypeError, ops.BackendUnavailable), "int32"),
        "k stride": (lambda a: {"k": a["k"].mT.contiguous().mT}, ValueError, r"(k: got inner stride 5|q: got)"),
        "v dtype": (lambda a: {"v": a["v"].double()}, TypeError, "v: got torch.float64 .*must be torch.float32"),
        "v shape": (lambda a: {"v": a["v"][:, :-1]}, ValueError, r"v: got .*\[2, 4, 48\]"),
        "v meta": (lambda a: {"v": a["v"].to("meta")}, TypeError, "v: got .*on meta"),
        "v stride": (lambda a: {"v": a["v"].mT.contiguous().mT}, ValueError, "v: got inner stride 5, must be 1"),
        "k_weight shape": (lambda a: {"k_weight": a["k_weight"][:-1]}, ValueError, r"k_weight: got shape \[47\]"),
        "k_weight dtype": (lambda a: {"k_weight": a["k_weight"].half()}, TypeError, "k_weight: got torch.float16"),
        "k_weight stride": (
            lambda a: {"k_weight": a["k_weight"].repeat_interleave(2)[::2]}, ValueError, r"k_weight: got stride \(2,\)",
        ),
        "cos_sin shape": (lambda a: {"cos_sin": a["cos_sin"][1:]}, ValueError, r"cos_sin: got shape \[4, 16\]"),
        "cos_sin bf16": (lambda a: {"cos_sin": a["cos_sin"].bfloat16()}, TypeError, "cos_sin: got torch.bfloat16"),
        "cos_sin float64": (lambda a: {"cos_sin": a["cos_sin"].double()}, TypeError, "cos_sin: got torch.float64"),
        "cos_sin stride": (lambda a: {"cos_sin": a["cos_sin"].mT.contiguous().mT}, ValueError, "cos_sin: got strides"),
        "k_cache dims": (lambda a: {"k_cache": a["k_cache"].flatten(2)}, ValueError, "k_cache: got .*heads, head_dim"),
        "k_cache dtype": (lambda a: {"k_cache": a["k_cache"].bfloat16()}, TypeError, "k_cache: got torch.bfloat16"),
        "v_cache meta": (lambda a: {"v_cache": a["v_cache"].to("meta")}, TypeError, "v_cache: got .*on meta"),
        "k_cache batch": (
            lambda a: {name: a[name][:1] for name in CACHES}, ValueError, "k_cache: got batch 1, must be 2",
        ),
        "v_cache shape": (lambda a: {"v_cache": a["v_cache"][:, 1:]}, ValueError, r"v_cache: got shape \[2, 12, 3, 16"),
        "k_cache heads": (
            lambda a: {name: a[name][:, :, :2] for name in CACHES}, ValueError, "k_cache: got 2 heads of 16, must hold",
        ),
        "k_cache strides": (
            lambda a: {"k_cache": a["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError, "k_cache: got strides .*contiguous",
        ),
        "k_cache expanded": (
            lambda a: {"k_cache": a["k_cache"][:1].expand(2, -1, -1, -1)}, ValueError, "k_cache: got strides .*its own",
        ),
        "cache too small": (
            lambda a: {name: a[name][:, :6].clone() for name in CACHES}, ValueError,
            "ring: got a chunk of 5 tokens, must be at most capacity - sink = 4",
        ),
        "sink": (lambda a: {"ring": ops.RingPosition(0, 13)}, ValueError, "ring: got sink 13, must be from 0 to .* 12"),
        "start": (lambda a: {"ring": ops.RingPosition(-1, 2)}, ValueError, "ring: got chunk_start -1, must be 0"),
        "cursor dtype": (
            lambda a: {"ring": ops.RingPosition(0, 2, torch.zeros(1, dtype=torch.int64))}, TypeError,
            r"ring: got cursor torch.int64 \[1\] on cpu, must be int32 \[1\] on cpu",
        ),
        "cursor meta": (
            lambda a: {"ring": ops.RingPosition(0, 2, torch.zeros(1, dtype=torch.int32, device="meta"))}, TypeError,
            "ring: got cursor .*on meta",
        ),
        "one cache twice": (lambda a: {"v_cache": a["k_cache"]}, ValueError, "k_cache and v_cache: share memory"),
        "v inside its cache": (
            lambda a: {"v": a["v_cache"][:, 1:6].flatten(2)}, ValueError, "v_cache and v: share memory, must be apart",
        ),
    }  # fmt: skip
    if with_q:
        cases["q dtype"] = (lambda a: {"q": a["q"].half()}, TypeError, "q: got torch.float16")
        cases["q shape"] = (lambda a: {"q": a["q"][:1]}, ValueError, r"q: got .*\[1, 5, 48\]")
        cases["q_weight"] = (lambda a: {"q_weight": a["q_weight"][1:]}, ValueError, r"q_weight: got shape \[47\]")
        cases["q in a cache"] = (
            lambda a: {"q": a["k_cache"][:, :5].flatten(2)}, ValueError, "k_cache and q: share memory",
        )  # fmt: skip
    return cases
