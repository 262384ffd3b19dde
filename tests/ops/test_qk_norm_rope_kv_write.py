"""qk_norm_rope_kv_write: both backends against float64, refusals, registration."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from lingbot_kernels import ops, reference
from ops.op_case import (
    BACKENDS,
    CACHES,
    DTYPES,
    assert_refused,
    assert_within_rule,
    check_registration,
    kv_arguments,
    kv_refusals,
    run,
)

REFUSALS = kv_refusals(with_q=True)


@pytest.mark.parametrize("heads_and_dim", [(3, 16), (2, 10), (1, 128), (5, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype, heads_and_dim: tuple[int, int]) -> None:
    heads, head_dim = heads_and_dim
    arguments = kv_arguments(dtype, heads=heads, head_dim=head_dim)
    assert_within_rule(ops.qk_norm_rope_kv_write, reference.qk_norm_rope_kv_write, arguments, CACHES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_v_may_lie_in_its_slots_already(backend: str) -> None:
    arguments = kv_arguments(torch.float32)
    whole = run(ops.qk_norm_rope_kv_write, arguments, CACHES, backend=backend)
    arguments["v"] = None
    arguments["v_cache"] = torch.randn_like(arguments["v_cache"])
    q_out, k_cache, v_cache = run(ops.qk_norm_rope_kv_write, arguments, CACHES, backend=backend)
    assert same_bits(q_out, whole[0]) and same_bits(k_cache, whole[1])
    assert same_bits(v_cache, arguments["v_cache"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_chunk_writes_nothing(backend: str) -> None:
    arguments = kv_arguments(torch.float32, tokens=0)
    q_out, k_cache, v_cache = run(ops.qk_norm_rope_kv_write, arguments, CACHES, backend=backend)
    assert q_out.shape == (2, 0, 48) and k_cache.isnan().all() and v_cache.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_contiguous_inputs_give_the_same_bits(backend: str) -> None:
    arguments = kv_arguments(torch.bfloat16)
    dense = {name: x.contiguous() if name in ("q", "k", "v") else x for name, x in arguments.items()}
    assert not arguments["q"].is_contiguous()
    got, want = (run(ops.qk_norm_rope_kv_write, a, CACHES, backend=backend) for a in (arguments, dense))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)) and got[0].is_contiguous()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    arguments = kv_arguments(torch.float32)
    change, error, message = REFUSALS[case]
    assert_refused(ops.qk_norm_rope_kv_write, arguments, change(arguments), error, message, CACHES)


@pytest.mark.unpoisoned
def test_registration() -> None:
    a = kv_arguments(torch.float32)
    a["k_cache"], a["v_cache"] = a["k_cache"].zero_(), a["v_cache"].zero_()
    head = (a["q_weight"], a["k_weight"], a["cos_sin"], a["k_cache"], a["v_cache"])
    cursor = torch.tensor([10], dtype=torch.int32)
    check_registration(
        "qk_norm_rope_kv_write",
        [
            (a["q"], a["k"], a["v"], *head, 10, None, 2, 1e-6, "cpu"),
            (a["q"], a["k"], None, *head, 0, cursor, 2, 1e-6, "reference"),
        ],
    )
