"""k_norm_rope_kv_write: the write-only half leaves the bits of the whole op; refusals, registration."""

from __future__ import annotations

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
    kv_refusals,
    run,
)

REFUSALS = kv_refusals(with_q=False)


def arguments_without_q(dtype: torch.dtype, **sizes: int) -> Arguments:
    arguments = kv_arguments(dtype, **sizes)
    return {name: value for name, value in arguments.items() if name not in ("q", "q_weight")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype) -> None:
    assert_within_rule(ops.k_norm_rope_kv_write, reference.k_norm_rope_kv_write, arguments_without_q(dtype), CACHES)


@pytest.mark.parametrize("with_v", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_of_the_whole_op(backend: str, dtype: torch.dtype, with_v: bool) -> None:
    arguments = kv_arguments(dtype)
    if not with_v:
        arguments["v"] = None
    whole = run(ops.qk_norm_rope_kv_write, arguments, CACHES, backend=backend)
    half = {name: value for name, value in arguments.items() if name not in ("q", "q_weight")}
    got = run(ops.k_norm_rope_kv_write, half, CACHES, backend=backend)
    assert len(got) == 2 and all(same_bits(a, b) for a, b in zip(got, whole[1:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_chunk_writes_nothing(backend: str) -> None:
    k_cache, v_cache = run(
        ops.k_norm_rope_kv_write, arguments_without_q(torch.float32, tokens=0), CACHES, backend=backend
    )
    assert k_cache.isnan().all() and v_cache.isnan().all()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = arguments_without_q(torch.float32)
    change, error, message = REFUSALS[case]
    assert_refused(ops.k_norm_rope_kv_write, arguments, change(arguments), error, message, CACHES)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = arguments_without_q(torch.bfloat16)
    rest = (a["k_weight"], a["cos_sin"], a["k_cache"].zero_(), a["v_cache"].zero_())
    cursor = torch.tensor([10], dtype=torch.int32)
    check_registration(
        "k_norm_rope_kv_write",
        [
            (a["k"], a["v"], *rest, 10, None, 2, 1e-6, "cpu"),
            (a["k"], None, *rest, 0, cursor, 2, 1e-6, "reference"),
        ],
    )
