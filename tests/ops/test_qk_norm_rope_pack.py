"""qk_norm_rope_pack: both backends against float64, its layout, refusals, registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.op_case import (
    BACKENDS,
    CACHES,
    DTYPES,
    Arguments,
    assert_refused,
    assert_within_rule,
    check_registration,
    kv_arguments,
    run,
)


def pack_arguments(dtype: torch.dtype, ranks: int = 2, with_q: bool = True, **sizes: int) -> Arguments:
    arguments = kv_arguments(dtype, **{"heads": 6, **sizes})
    for name in (*CACHES, "ring"):
        del arguments[name]
    if not with_q:
        arguments["q"] = arguments["q_weight"] = None
    return {**arguments, "ranks": ranks}


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, ranks: int, with_q: bool) -> None:
    arguments = pack_arguments(dtype, ranks, with_q)
    assert_within_rule(ops.qk_norm_rope_pack, reference.qk_norm_rope_pack, arguments)


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_hold_each_ranks_heads_with_the_bits_of_the_ring_write(
    backend: str, dtype: torch.dtype, with_q: bool
) -> None:
    direct = kv_arguments(dtype, heads=6)
    direct["ring"] = ops.RingPosition(2, 2)
    q, k_cache, v_cache = run(ops.qk_norm_rope_kv_write, direct, CACHES, backend=backend)
    packed = ops.qk_norm_rope_pack(**pack_arguments(dtype, 3, with_q), backend=backend)
    assert packed.shape == (3, 5, 2, 3 if with_q else 2, 2, 16) and packed.is_contiguous()
    parts = [k_cache[:, 2:7], v_cache[:, 2:7]]
    if with_q:
        parts.insert(0, q.unflatten(-1, (6, 16)))
    for rank in range(3):
        for part, want in enumerate(parts):
            assert same_bits(packed[rank, :, :, part].transpose(0, 1), want[:, :, 2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_shard(backend: str) -> None:
    packed = ops.qk_norm_rope_pack(**pack_arguments(torch.float32, 2, tokens=0), backend=backend)
    assert packed.shape == (2, 0, 2, 3, 3, 16)


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "ranks": (lambda a: {"ranks": 4}, ValueError, "ranks: got 4, must divide the heads, .* 96 / 16"),
    "no ranks": (lambda a: {"ranks": 0}, ValueError, "ranks: got 0, must divide"),
    "q alone": (lambda a: {"q_weight": None}, ValueError, "q, q_weight: got one of them, must be both or neither"),
    "weight alone": (lambda a: {"q": None}, ValueError, "q, q_weight: got one of them"),
    "q": (lambda a: {"q": a["q"][:, 1:]}, ValueError, r"q: got .*\[2, 4, 96\]"),
    "k dims": (lambda a: {"k": a["k"][0]}, ValueError, r"k: got .*must be \[B, S, D\]"),
    "v": (lambda a: {"v": a["v"].half()}, TypeError, "v: got torch.float16"),
    "v meta": (lambda a: {"v": a["v"].to("meta")}, TypeError, "v: got .*on meta"),
    "v stride": (lambda a: {"v": a["v"].mT.contiguous().mT}, ValueError, "v: got inner stride 5, must be 1"),
    "k_weight": (lambda a: {"k_weight": a["k_weight"][1:]}, ValueError, r"k_weight: got shape \[95\]"),
    "q_weight": (lambda a: {"q_weight": a["q_weight"].double()}, TypeError, "q_weight: got torch.float64"),
    "cos_sin": (lambda a: {"cos_sin": a["cos_sin"][1:]}, ValueError, r"cos_sin: got shape \[4, 16\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = pack_arguments(torch.float32)
    change, error, message = REFUSALS[case]
    assert_refused(ops.qk_norm_rope_pack, arguments, change(arguments), error, message)


@pytest.mark.unpoisoned
def test_registration() -> None:
    samples = []
    for backend, with_q in (("cpu", True), ("reference", False)):
        a = pack_arguments(torch.float32, 3, with_q)
        samples.append(
            (a["q"], a["k"], a["v"], a["q_weight"], a["k_weight"], a["cos_sin"], a["ranks"], a["eps"], backend)
        )
    check_registration("qk_norm_rope_pack", samples)
