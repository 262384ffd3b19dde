"""qk_norm_rope_quantize_push: what all shards write together is what one rank writes alone; refusals, registration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops
from ops.op_case import BACKENDS, DTYPES, Arguments, check_registration, kv_arguments

WRITTEN = ("q_outs", "q_scales", "k_caches", "k_scales", "v_caches")
CHUNK, CAPACITY, SPLITS, POISON = 11, 16, (5, 4, 2), 77
HEADS = [(6, 16), (3, 10), (12, 64), (3, 128)]


def push_arguments(
    dtype: torch.dtype, ranks: int = 3, with_q: bool = True, tokens: int = 5, heads: int = 6, head_dim: int = 16
) -> Arguments:
    """Tokens 3 onwards of a chunk of 11 that wraps rings of 16 slots, 2 of them a sink; scales as transposes."""
    arguments = kv_arguments(dtype, tokens=tokens, heads=heads, head_dim=head_dim)
    batch, own = arguments["k"].shape[0], heads // ranks
    del arguments["k_cache"], arguments["v_cache"]

    def each(*shape: int, fill: float, kind: torch.dtype) -> list[torch.Tensor]:
        return [torch.full(shape, fill, dtype=kind) for _ in range(ranks)]

    count = {"fill": math.nan, "kind": torch.float32}
    arguments["k_caches"] = each(batch, CAPACITY, own, head_dim, fill=POISON, kind=torch.int8)
    arguments["k_scales"] = [x.transpose(1, 2) for x in each(batch, own, CAPACITY, **count)]  # type: ignore[arg-type]
    arguments["v_caches"] = each(batch, CAPACITY, own, head_dim, fill=math.nan, kind=dtype)
    arguments["q_outs"] = each(batch, CHUNK, own, head_dim, fill=POISON, kind=torch.int8) if with_q else []
    arguments["q_scales"] = each(batch, CHUNK, own, **count) if with_q else []  # type: ignore[arg-type]
    if not with_q:
        arguments["q"] = arguments["q_weight"] = None
    return {**arguments, "ring": ops.RingPosition(9, 2), "first_token": 3}


@pytest.mark.parametrize("cursor", [False, True])
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_shards_write_what_one_rank_does(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int], with_q: bool, cursor: bool
) -> None:
    """Every bit of every rank's memory, what is not written included."""
    heads, head_dim = sizes
    whole = push_arguments(dtype, 3, with_q, CHUNK, heads, head_dim)
    start = torch.tensor([9], dtype=torch.int32) if cursor else None
    ring = ops.RingPosition(0 if cursor else 9, 2, start)
    first = 0
    for tokens in SPLITS:
        own = slice(first, first + tokens)
        shard = {
            name: x[:, own] if name in ("q", "k", "v") and x is not None else x[own] if name == "cos_sin" else x
            for name, x in whole.items()
        }
        ops.qk_norm_rope_quantize_push(**{**shard, "ring": ring, "first_token": first}, backend=backend)
        first += tokens
    batch = whole["k"].shape[0]
    k_cache = torch.full((batch, CAPACITY, heads, head_dim), POISON, dtype=torch.int8)
    k_scale = torch.full((batch, heads, CAPACITY), math.nan).transpose(1, 2)
    v_cache = torch.full((batch, CAPACITY, heads, head_dim), math.nan, dtype=dtype)
    rest = (whole["cos_sin"], k_cache, k_scale, v_cache, ring, whole["eps"])
    wanted = {"k_caches": k_cache, "k_scales": k_scale, "v_caches": v_cache}
    if with_q:
        wanted["q_outs"], wanted["q_scales"] = ops.qk_norm_rope_quantize_kv_write(
            *(whole[name] for name in ("q", "k", "v", "q_weight", "k_weight")), *rest, backend=backend
        )
    else:
        ops.k_norm_rope_quantize_kv_write(whole["k"], whole["v"], whole["k_weight"], *rest, backend=backend)
    for name, want in wanted.items():
        assert same_bits(torch.cat(whole[name], dim=2), want), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_shard_and_one_that_lies_within_the_chunk(backend: str) -> None:
    for tokens in (0, 5):
        given = push_arguments(torch.bfloat16, tokens=tokens)
        ops.qk_norm_rope_quantize_push(**given, backend=backend)
        rows = torch.zeros(CHUNK, dtype=torch.bool)
        rows[3 : 3 + tokens] = True
        for scales in given["q_scales"]:
            assert torch.equal(~scales.isnan().any(2).any(0), rows)
        for codes in given["q_outs"]:
            assert codes[:, ~rows].eq(POISON).all()
        assert all(int((~scales.isnan()).sum()) == 2 * tokens * 2 for scales in given["k_scales"])


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "v": (lambda a: {"v": a["v"].half()}, TypeError, "v: got torch.float16"),
    "q alone": (lambda a: {"q_weight": None}, ValueError, "q, q_weight: got one of them, must be both or neither"),
    "ranks": (lambda a: {"k_caches": 2 * a["k_caches"][:2]}, ValueError, "k_caches: got 4, must divide the heads"),
    "k_scales": (lambda a: {"k_scales": a["k_scales"][1:]}, ValueError, "k_scales: got 2, must be one a rank, 3"),
    "v_caches": (lambda a: {"v_caches": a["v_caches"][1:]}, ValueError, "v_caches: got 2, must be one a rank, 3"),
    "q_outs": (lambda a: {"q_outs": a["q_outs"][:1]}, ValueError, "q_outs: got 1, must be one a rank, 3"),
    "q_scales": (lambda a: {"q_scales": []}, ValueError, "q_scales: got 0, must be one a rank, 3"),
    "k in 16 bits": (
        lambda a: {"k_caches": [x.half() for x in a["k_caches"]]}, TypeError, "k_cache: got torch.float16.*torch.int8",
    ),
    "heads": (
        lambda a: {n: [x[:, :, :1] for x in a[n]] for n in ("k_caches", "v_caches")}, ValueError,
        r"k_caches: got \[2, 16, 1, 16\], must hold 2 heads of 16",
    ),
    "k_scales shape": (
        lambda a: {"k_scales": [x[:, 1:] for x in a["k_scales"]]}, ValueError,
        r"k_scales: got shape \[2, 15, 2\], must be \[2, 16, 2\]",
    ),
    "k_scales dtype": (
        lambda a: {"k_scales": [x.half() for x in a["k_scales"]]}, TypeError, "k_scales: got torch.float16",
    ),
    "k_scales expanded": (
        lambda a: {"k_scales": [x[:, :1].expand(-1, CAPACITY, -1) for x in a["k_scales"]]}, ValueError,
        "k_scales: got strides .* must give each batch, token and head memory of its own",
    ),
    "unlike": (
        lambda a: {"k_scales": [*a["k_scales"][:2], a["k_scales"][2].contiguous()]}, ValueError,
        "k_scales: got .* must be like the first",
    ),
    "q_outs dtype": (lambda a: {"q_outs": [x.half() for x in a["q_outs"]]}, TypeError, "q_outs: got torch.float16"),
    "q_outs tokens": (
        lambda a: {"q_outs": [x[:, :7] for x in a["q_outs"]]}, ValueError,
        r"q_outs: got 7 tokens, must hold first_token \+ S = 8",
    ),
    "q_scales shape": (
        lambda a: {"q_scales": [x[:, :7] for x in a["q_scales"]]}, ValueError, r"q_scales: got shape \[2, 7, 2\]",
    ),
    "first_token": (lambda a: {"first_token": -1}, ValueError, "first_token: got -1, must be 0 or more"),
    "too long": (
        lambda a: {"first_token": 10}, ValueError, "ring: got a chunk of 15 tokens, must be at most .* = 14",
    ),
    "shared": (lambda a: {"k_scales": [a["k_scales"][0]] * 3}, ValueError, "k_scales and k_scales: share memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = push_arguments(torch.bfloat16)
    change, error, message = REFUSALS[case]
    held = {name: arguments[name] for name in WRITTEN}
    for options in ({}, *({"backend": backend} for backend in BACKENDS)):
        with pytest.raises(error, match=message):
            ops.qk_norm_rope_quantize_push(**{**arguments, **change(arguments)}, **options)
    assert all(x.eq(POISON).all() if x.dtype == torch.int8 else x.isnan().all() for xs in held.values() for x in xs)


def test_triton_says_why_it_is_absent() -> None:
    with pytest.raises(ops.BackendUnavailable, match="backend 'triton' can't serve: one launch"):
        ops.qk_norm_rope_quantize_push(**push_arguments(torch.float32), backend="triton")


@pytest.mark.unpoisoned
def test_registration() -> None:
    samples = []
    for backend, with_q in (("cpu", True), ("reference", False)):
        a = push_arguments(torch.float32, 3, with_q)
        lists = [[torch.zeros_like(x) for x in a[name]] for name in WRITTEN]
        samples.append((
            a["q"], a["k"], a["v"], a["q_weight"], a["k_weight"], a["cos_sin"], *lists, 9, None, 2, 3, a["eps"],
            backend,
        ))  # fmt: skip
    check_registration("qk_norm_rope_quantize_push", samples)
