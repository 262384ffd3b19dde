"""qk_norm_rope_push: both backends against float64 and against the packed exchange's bits, refusals, registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops, reference
from ops.op_case import (
    BACKENDS,
    DTYPES,
    Arguments,
    check_registration,
    kv_arguments,
    wide,
)

WRITTEN = ("q_outs", "k_caches", "v_caches")
FIRST, CHUNK, CAPACITY = 3, 11, 16


def push_arguments(dtype: torch.dtype, ranks: int = 3, with_q: bool = True, **sizes: int) -> Arguments:
    """Tokens 3 to 7 of a chunk of 11 that wraps rings of 16 slots, 2 of them a sink."""
    arguments = kv_arguments(dtype, **{"heads": 6, **sizes})
    batch, _, dim = arguments["k"].shape
    heads, head_dim = dim // 16 // ranks, 16
    for name in ("k_cache", "v_cache"):
        del arguments[name]
        arguments[f"{name}s"] = [nan(batch, CAPACITY, heads, head_dim, dtype=dtype) for _ in range(ranks)]
    arguments["q_outs"] = [nan(batch, CHUNK, heads, head_dim, dtype=dtype) for _ in range(ranks if with_q else 0)]
    if not with_q:
        arguments["q"] = arguments["q_weight"] = None
    return {**arguments, "ring": ops.RingPosition(9, 2), "first_token": FIRST}


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def pushed(function: Callable[..., None], arguments: Arguments, **options: str) -> list[Tensor]:
    """What lies in every rank's memory after the push, on copies."""
    own = {name: [x.clone() for x in value] if name in WRITTEN else value for name, value in arguments.items()}
    function(**own, **options)
    return [x for name in WRITTEN for x in own[name]]


def widened(arguments: Arguments) -> Arguments:
    return {
        name: [wide(x) for x in value] if name in WRITTEN else wide(value) for name, value in arguments.items()
    }  # fmt: skip


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, ranks: int, with_q: bool) -> None:
    arguments = push_arguments(dtype, ranks, with_q)
    got, again = (pushed(ops.qk_norm_rope_push, arguments, backend="cpu") for _ in range(2))
    plain = pushed(ops.qk_norm_rope_push, arguments, backend="reference")
    exact = pushed(reference.qk_norm_rope_push, widened(arguments))
    for own, repeated, other, true in zip(got, again, plain, exact, strict=True):
        assert same_bits(own, repeated)
        assert torch.equal(own.isnan(), true.isnan()) and torch.equal(other.isnan(), true.isnan())
        error, allowed = ((x.double() - true).nan_to_num().norm() for x in (own, other))
        assert error <= 1.25 * allowed + 1e-300


@pytest.mark.parametrize("cursor", [False, True])
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_shards_give_each_rank_what_the_packed_exchange_gives(
    backend: str, dtype: torch.dtype, with_q: bool, cursor: bool
) -> None:
    ranks, splits = 3, (5, 4, 2)
    whole = push_arguments(dtype, ranks, with_q, tokens=CHUNK)
    start = torch.tensor([9], dtype=torch.int32) if cursor else None
    ring = ops.RingPosition(0 if cursor else 9, 2, start)
    first = 0
    packed = []
    for tokens in splits:
        own = slice(first, first + tokens)
        shard = {
            name: x[:, own] if name in ("q", "k", "v") and x is not None else x[own] if name == "cos_sin" else x
            for name, x in whole.items()
        }
        ops.qk_norm_rope_push(**{**shard, "ring": ring, "first_token": first}, backend=backend)
        names = ("q", "k", "v", "q_weight", "k_weight", "cos_sin", "eps")
        packed.append(ops.qk_norm_rope_pack(**{n: shard[n] for n in names}, ranks=ranks, backend=backend))
        first += tokens
    for rank in range(ranks):
        caches = [torch.full_like(whole[name][rank], float("nan")) for name in ("k_caches", "v_caches")]
        received = torch.cat([shard[rank] for shard in packed])
        q = ops.qkv_unpack_kv_write(received, caches[0], caches[1], ring, backend=backend)
        assert same_bits(whole["k_caches"][rank], caches[0]) and same_bits(whole["v_caches"][rank], caches[1])
        assert (q is None) == (not with_q)
        if q is not None:
            assert same_bits(whole["q_outs"][rank], q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_shard(backend: str) -> None:
    for written in pushed(ops.qk_norm_rope_push, push_arguments(torch.float32, tokens=0), backend=backend):
        assert written.isnan().all()


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "k dims": (lambda a: {"k": a["k"][0]}, ValueError, r"k: got .*must be \[B, S, D\]"),
    "v": (lambda a: {"v": a["v"].half()}, TypeError, "v: got torch.float16"),
    "q alone": (lambda a: {"q_weight": None}, ValueError, "q, q_weight: got one of them, must be both or neither"),
    "cos_sin": (lambda a: {"cos_sin": a["cos_sin"][1:]}, ValueError, r"cos_sin: got shape \[4, 16\]"),
    "ranks": (
        lambda a: {"k_caches": 2 * a["k_caches"][:2]}, ValueError, "k_caches: got 4, must divide the heads, .* 96 / 16",
    ),
    "no ranks": (lambda a: {"k_caches": []}, ValueError, "k_caches: got 0, must divide"),
    "v_caches": (lambda a: {"v_caches": a["v_caches"][1:]}, ValueError, "v_caches: got 2, must be one a rank, 3"),
    "heads": (
        lambda a: {n: [x[:, :, :1] for x in a[n]] for n in ("k_caches", "v_caches")}, ValueError,
        r"k_caches: got \[2, 16, 1, 16\], must hold 2 heads of 16",
    ),
    "unlike": (
        lambda a: {"k_caches": [*a["k_caches"][:2], a["k_caches"][2][:, 1:]]}, ValueError,
        r"k_caches: got .*\[2, 15, 2, 16\].*must be like the first",
    ),
    "q_outs": (lambda a: {"q_outs": a["q_outs"][:1]}, ValueError, "q_outs: got 1, must be one a rank, 3"),
    "q_outs tokens": (
        lambda a: {"q_outs": [x[:, :7] for x in a["q_outs"]]}, ValueError,
        r"q_outs: got 7 tokens, must hold first_token \+ S = 8",
    ),
    "q_outs dtype": (lambda a: {"q_outs": [x.half() for x in a["q_outs"]]}, TypeError, "q_outs: got torch.float16"),
    "q_outs heads": (
        lambda a: {"q_outs": [x[..., :8] for x in a["q_outs"]]}, ValueError, r"q_outs: got .*must be \[2, chunk tokens",
    ),
    "q_outs expanded": (
        lambda a: {"q_outs": [x[:, :1].clone().expand(-1, CHUNK, -1, -1) for x in a["q_outs"]]}, ValueError,
        r"q_outs: got strides \(32, 0, 16, 1\), must give each batch and token memory of its own",
    ),
    "first_token": (lambda a: {"first_token": -1}, ValueError, "first_token: got -1, must be 0 or more"),
    "too long": (
        lambda a: {"first_token": 10}, ValueError, "ring: got a chunk of 15 tokens, must be at most .* = 14",
    ),
    "shared": (lambda a: {"k_caches": [a["k_caches"][0]] * 3}, ValueError, "k_caches and k_caches: share memory"),
    "read and written": (
        lambda a: {"q_outs": [a["v_caches"][0][:, :CHUNK], *a["q_outs"][1:]]}, ValueError,
        "(q_outs and v_caches: share memory|q_outs: got .*must be like the first)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = push_arguments(torch.float32)
    change, error, message = REFUSALS[case]
    arguments |= change(arguments)
    for options in ({}, *({"backend": backend} for backend in BACKENDS)):
        with pytest.raises(error, match=message):
            ops.qk_norm_rope_push(**arguments, **options)
    assert all(x.isnan().all() for name in WRITTEN for x in arguments[name])


def test_triton_says_why_it_is_absent() -> None:
    with pytest.raises(ops.BackendUnavailable, match="qk_norm_rope_push: backend 'triton' can't serve: one launch"):
        ops.qk_norm_rope_push(**push_arguments(torch.float32), backend="triton")


@pytest.mark.unpoisoned
def test_registration() -> None:
    samples = []
    for backend, with_q in (("cpu", True), ("reference", False)):
        a = push_arguments(torch.float32, 3, with_q)
        lists = [[torch.zeros_like(x) for x in a[name]] for name in WRITTEN]
        samples.append((
            a["q"], a["k"], a["v"], a["q_weight"], a["k_weight"], a["cos_sin"], *lists, 9, None, 2, FIRST, a["eps"],
            backend,
        ))  # fmt: skip
    check_registration("qk_norm_rope_push", samples)
