"""qkv_unpack_kv_write: a copy, so both backends are exact; refusals, registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops
from ops.op_case import BACKENDS, CACHES, DTYPES, Arguments, assert_refused, check_registration, run


def unpack_arguments(dtype: torch.dtype, parts: int = 3, tokens: int = 5) -> Arguments:
    torch.manual_seed(0)
    caches = torch.full((2, 2, 13, 3, 16), float("nan")).to(dtype)
    packed = torch.randn(tokens, 2, parts, 3, 16).to(dtype)
    return {"packed": packed, "k_cache": caches[0], "v_cache": caches[1], "ring": ops.RingPosition(10, 2)}


@pytest.mark.parametrize("as_cursor", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_take_k_and_v_and_q_stays_where_it_lies(
    backend: str, dtype: torch.dtype, parts: int, as_cursor: bool
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(ops.BackendUnavailable, match="not float64"):
            ops.qkv_unpack_kv_write(**unpack_arguments(dtype), backend=backend)
        return
    arguments = unpack_arguments(dtype, parts)
    if as_cursor:
        arguments["ring"] = ops.RingPosition(0, 2, torch.tensor([10], dtype=torch.int32))
    *q, k_cache, v_cache = run(ops.qkv_unpack_kv_write, arguments, CACHES, backend=backend)
    packed: Tensor = arguments["packed"]
    slots = [10, 11, 12, 2, 3]
    for cache, part in ((k_cache, parts - 2), (v_cache, parts - 1)):
        assert same_bits(cache[:, slots], packed[:, :, part].transpose(0, 1))
        assert cache[:, [slot for slot in range(13) if slot not in slots]].isnan().all()
    assert len(q) == parts - 2
    for view in q:
        assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        assert torch.equal(view, packed[:, :, 0].transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_chunk_writes_nothing(backend: str) -> None:
    arguments = unpack_arguments(torch.float32, tokens=0)
    q, k_cache, v_cache = run(ops.qkv_unpack_kv_write, arguments, CACHES, backend=backend)
    assert q.shape == (2, 0, 3, 16) and k_cache.isnan().all() and v_cache.isnan().all()


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "dims": (lambda a: {"packed": a["packed"][0]}, ValueError, r"packed: got .*\[S, B, 2 or 3, heads, head_dim\]"),
    "one dim": (lambda a: {"packed": a["packed"].flatten()}, ValueError, "packed: got .*2 or 3"),
    "parts": (lambda a: {"packed": a["packed"][:, :, :1].clone()}, ValueError, "packed: got .*2 or 3"),
    "stride": (lambda a: {"packed": a["packed"][:, :, 1:]}, ValueError, "packed: got strides .*must be contiguous"),
    "dtype": (lambda a: {"k_cache": a["k_cache"].half()}, TypeError, "k_cache: got torch.float16"),
    "meta": (lambda a: {"v_cache": a["v_cache"].to("meta")}, TypeError, "v_cache: got .*on meta"),
    "heads": (
        lambda a: {name: a[name][:, :, :2] for name in CACHES}, ValueError, "k_cache: got .*must hold 3 heads of 16",
    ),
    "batch": (lambda a: {name: a[name][:1] for name in CACHES}, ValueError, "k_cache: got batch 1, must be 2"),
    "small": (
        lambda a: {name: a[name][:, :6].clone() for name in CACHES}, ValueError, "ring: got a chunk of 5 tokens",
    ),
    "aliasing": (
        lambda a: {"packed": a["v_cache"].view(-1)[:960].view(5, 2, 2, 3, 16)}, ValueError,
        "v_cache and packed: share memory",
    ),
    "one cache twice": (lambda a: {"v_cache": a["k_cache"]}, ValueError, "k_cache and v_cache: share memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = unpack_arguments(torch.float32)
    change, error, message = REFUSALS[case]
    assert_refused(ops.qkv_unpack_kv_write, arguments, change(arguments), error, message, CACHES)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a, cursor = unpack_arguments(torch.float32), torch.tensor([10], dtype=torch.int32)
    caches = (a["k_cache"].zero_(), a["v_cache"].zero_())
    samples = [(a["packed"], *caches, 10, None, 2, "cpu"), (a["packed"], *caches, 0, cursor, 2, "reference")]
    check_registration("qkv_unpack_kv_write", samples)
