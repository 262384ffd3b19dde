"""qk_norm_rope_quantize_kv_write and its write-only half: codes and scales against float64, slots, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.reference.rotate_quantize import quantize_values
from ops.op_case import (
    BACKENDS,
    DTYPES,
    Arguments,
    Errors,
    assert_refused,
    check_registration,
    kv_arguments,
    kv_refusals,
    run,
    wide,
)
from ops.quantize_case import assert_close_codes

RING = ("k_cache", "k_scale", "v_cache")
POISON = 77  # of codes
HEADS = [(3, 16), (2, 10), (1, 128), (5, 64), (2, 250)]


def arguments(dtype: torch.dtype, **sizes: int) -> Arguments:
    """Those of the op in 16 bits, with K's cache in codes and its scales as the transpose of [B, heads, capacity]."""
    given = kv_arguments(dtype, **sizes)
    shape = given["k_cache"].shape
    given["k_cache"] = torch.full(shape, POISON, dtype=torch.int8)
    scale = torch.full((shape[0], shape[2], shape[1]), math.nan).transpose(1, 2)
    return {**given, "k_scale": scale}


def without_q(given: Arguments) -> Arguments:
    return {name: value for name, value in given.items() if name not in ("q", "q_weight")}


def call(given: Arguments, backend: str = "cpu") -> list[Tensor]:
    """q_codes, q_scale, k_cache, k_scale, v_cache of the op on copies."""
    op = ops.qk_norm_rope_quantize_kv_write if "q" in given else ops.k_norm_rope_quantize_kv_write
    return run(op, given, RING, backend=backend)


def written(given: Arguments) -> Tensor:
    return given["ring"].slots(given["k"].shape[1], given["k_cache"].shape[1], "cpu")


def untouched(given: Arguments) -> Tensor:
    kept = torch.ones(given["k_cache"].shape[1], dtype=torch.bool)
    kept[written(given)] = False
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads_and_dim", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_slots(dtype: torch.dtype, heads_and_dim: tuple[int, int], backend: str) -> None:
    heads, head_dim = heads_and_dim
    given = arguments(dtype, heads=heads, head_dim=head_dim)
    got = call(given, backend)
    widened = {name: x if name == "k_scale" else wide(x) for name, x in given.items()}
    exact = run(reference.qk_norm_rope_quantize_kv_write, widened, RING)
    plain = run(reference.qk_norm_rope_quantize_kv_write, given, RING)
    assert got[0].shape == (2, 5, heads, head_dim) and got[0].is_contiguous() and got[1].is_contiguous()
    slots, kept = written(given), untouched(given)
    found, true = ((x[0], x[1], x[2][:, slots], x[3][:, slots]) for x in (got, plain))
    for codes in (0, 2):
        assert_close_codes(found[codes : codes + 2], true[codes : codes + 2])
        if dtype == torch.float32:  # the others round on the way, as the official model does
            rows = exact[codes : codes + 2] if codes == 0 else [x[:, slots] for x in exact[2:4]]
            assert_close_codes(found[codes : codes + 2], rows)
    assert (got[2][:, kept] == POISON).all() and got[3][:, kept].isnan().all()
    assert torch.equal(got[4][:, slots].flatten(2), given["v"]) and got[4][:, kept].isnan().all()
    assert all(same_bits(a, b) for a, b in zip(got, call(given, backend), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_is_a_row_of_rotate_quantizes_definition(backend: str) -> None:
    """The values before quantisation are those that the float32 op writes, bit for bit."""
    given = arguments(torch.float32)
    got = call(given, backend)
    rounded = kv_arguments(torch.float32)
    q_out, k_cache, _ = run(ops.qk_norm_rope_kv_write, rounded, ("k_cache", "v_cache"), backend=backend)
    slots = written(given)
    for found, values in (
        (got[:2], q_out.unflatten(-1, (3, 16))),
        ([x[:, slots] for x in got[2:4]], k_cache[:, slots]),
    ):
        codes, scale = quantize_values(values)
        assert torch.equal(found[0], codes) and same_bits(found[1], scale)
        assert found[0].int().abs().amax(-1).eq(127).all()


@pytest.mark.parametrize("with_v", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_write_only_half_leaves_the_same_bits(backend: str, dtype: torch.dtype, with_v: bool) -> None:
    given = arguments(dtype)
    if not with_v:
        given["v"] = None
    whole, half = call(given, backend), call(without_q(given), backend)
    assert len(half) == 3 and all(same_bits(a, b) for a, b in zip(half, whole[2:], strict=True))
    assert with_v or half[2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cursor_and_every_wrap(backend: str) -> None:
    given = arguments(torch.bfloat16, batch=1)
    first = call({**given, "ring": ops.RingPosition(0, 2)}, backend)
    for start in range(25):
        for ring in (
            ops.RingPosition(start, 2),
            ops.RingPosition(0, 2, torch.tensor([start], dtype=torch.int32)),
        ):
            case = {**given, "ring": ring}
            got, slots = call(case, backend), written(case)
            assert same_bits(got[0], first[0]) and same_bits(got[1], first[1])
            for own, other in zip(got[2:], first[2:], strict=True):
                assert same_bits(own[:, slots], other[:, :5])
            assert (got[2][:, untouched(case)] == POISON).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_without_ordinary_values(backend: str) -> None:
    """A head of zeros has scale 0; a NaN or Inf is in the norm of its whole token and shows in each scale of it."""
    given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments(torch.float32, batch=1).items()}
    given["q"][0, 0] = 0
    given["q"][0, 1, 16:32] = 0
    given["q"][0, 2, 3] = math.nan
    given["k"][0, 3, 40] = math.inf
    codes, scale, k_codes, k_scale, _ = call(given, backend)
    slots = written(given)
    assert not codes[0, 0].any() and not scale[0, 0].any()
    assert not codes[0, 1, 1].any() and scale[0, 1, 1] == 0 and (scale[0, 1, ::2] > 0).all()
    assert not codes[0, 2].any() and scale[0, 2].isnan().all()
    assert not k_codes[0, slots[3]].any() and k_scale[0, slots[3]].isnan().any()
    assert k_scale[0, slots[:3]].isfinite().all() and scale[0, 3:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_change_no_bits(backend: str) -> None:
    given = arguments(torch.bfloat16)
    dense = {name: x.contiguous() if name in ("q", "k", "v") else x for name, x in given.items()}
    dense["k_scale"] = torch.full(given["k_scale"].shape, math.nan)
    assert not given["q"].is_contiguous() and dense["k_scale"].stride() != given["k_scale"].stride()
    got, want = call(given, backend), call(dense, backend)
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_chunk_writes_nothing(backend: str) -> None:
    codes, scale, k_cache, k_scale, v_cache = call(arguments(torch.float32, tokens=0), backend)
    assert codes.shape == (2, 0, 3, 16) and scale.shape == (2, 0, 3)
    assert (k_cache == POISON).all() and k_scale.isnan().all() and v_cache.isnan().all()


def refusals(with_q: bool) -> dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]]:
    """Those of the op in 16 bits that K's cache being in codes leaves as they are, and its own."""
    cases = kv_refusals(with_q)
    for name in (
        "k_cache dtype",
        "k_cache batch",
        "k_cache heads",
        "cache too small",
        "one cache twice",
        "q in a cache",
    ):
        cases.pop(name, None)
    return {
        **cases,
        "k_cache in floats": (
            lambda a: {"k_cache": a["k_cache"].float()}, TypeError, "k_cache: got torch.float32 .*must be torch.int8",
        ),
        "v_cache in codes": (
            lambda a: {"v_cache": a["v_cache"].to(torch.int8)}, TypeError, "v_cache: got torch.int8 .*torch.float32",
        ),
        "too small": (
            lambda a: {name: a[name][:, :6].clone() for name in RING}, ValueError,
            "ring: got a chunk of 5 tokens, must be at most capacity - sink = 4",
        ),
        "k_scale shape": (lambda a: {"k_scale": a["k_scale"][:, 1:]}, ValueError, r"k_scale: got shape \[2, 12, 3\]"),
        "k_scale dtype": (lambda a: {"k_scale": a["k_scale"].half()}, TypeError, "k_scale: got torch.float16"),
        "k_scale meta": (lambda a: {"k_scale": a["k_scale"].to("meta")}, TypeError, "k_scale: got .*on meta"),
        "k_scale expanded": (
            lambda a: {"k_scale": a["k_scale"][:, :, :1].expand(-1, -1, 3)}, ValueError, "k_scale: got strides .*own",
        ),
        "k_scale in V's cache": (
            lambda a: {"k_scale": a["v_cache"][..., 0]}, ValueError, "k_scale and v_cache: share memory",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals(with_q=True))
def test_refusals(case: str) -> None:
    given = arguments(torch.float32)
    change, error, message = refusals(with_q=True)[case]
    assert_refused(ops.qk_norm_rope_quantize_kv_write, given, change(given), error, message, RING)


@pytest.mark.parametrize("case", refusals(with_q=False))
def test_refusals_without_q(case: str) -> None:
    given = without_q(arguments(torch.float32))
    change, error, message = refusals(with_q=False)[case]
    assert_refused(ops.k_norm_rope_quantize_kv_write, given, change(given), error, message, RING)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments(torch.bfloat16)
    caches = tuple(a[name].zero_() for name in RING)
    cursor = torch.tensor([10], dtype=torch.int32)
    both, own = (a["q_weight"], a["k_weight"], a["cos_sin"], *caches), (a["k_weight"], a["cos_sin"], *caches)
    check_registration(
        "qk_norm_rope_quantize_kv_write",
        [
            (a["q"], a["k"], a["v"], *both, 10, None, 2, 1e-6, "cpu"),
            (a["q"], a["k"], None, *both, 0, cursor, 2, 1e-6, "reference"),
        ],
    )
    check_registration(
        "k_norm_rope_quantize_kv_write",
        [
            (a["k"], a["v"], *own, 10, None, 2, 1e-6, "cpu"),
            (a["k"], None, *own, 0, cursor, 2, 1e-6, "reference"),
        ],
    )
