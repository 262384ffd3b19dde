"""Norm + RoPE + quantisation + K/V write on the CPU: codes and scales of what the float32 form writes."""

from __future__ import annotations

import pytest
import torch
from cpu_calls import (
    Ring,
    assert_same_bits,
    poison,
    qk_norm_rope_kv_write,
    qk_norm_rope_quantize_kv_write,
    rope_cos_sin,
    under_every_isa,
)
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(40, 128), (12, 64), (3, 6), (2, 10), (5, 24), (1, 320), (2, 606), (7, 2)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(heads * head_dim)
    dim = heads * head_dim
    q, k, v = (torch.randn(batch, tokens, 3 * dim, generator=g) * 2).to(dtype).split(dim, -1)
    weights = (1 + torch.randn(2, dim, generator=g) / 4).to(dtype)
    return q, k, v, weights[0], weights[1], rope_cos_sin(tokens, 12_345, 12, 4, head_dim)


def ring_of(batch: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, capacity, heads, head_dim)
    scale = poison(batch, heads, capacity).transpose(1, 2)
    return torch.full(shape, 77, dtype=torch.int8), scale, poison(*shape, dtype=dtype)


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    amax = values.abs().amax(-1)
    assert (amax > 0).all()
    largest = torch.full_like(amax, 127)
    return (values * (largest / amax).unsqueeze(-1)).round().to(torch.int8), amax / largest


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7)])
def test_the_float32_forms_values(batch: int, tokens: int, heads: int, head_dim: int) -> None:
    given = inputs(batch, tokens, heads, head_dim, torch.float32)
    ring = Ring(8, 1, 11)  # wraps
    k_cache, k_scale, v_cache = ring_of(batch, 11, heads, head_dim, torch.float32)
    codes, scale = qk_norm_rope_quantize_kv_write(*given, k_cache, k_scale, v_cache, ring)
    k_float, v_float = poison(2, batch, 11, heads, head_dim)
    q_float = qk_norm_rope_kv_write(*given, k_float, v_float, ring)
    slots = ring.slots(tokens)
    for got, values in (
        ((codes, scale), q_float.unflatten(-1, (heads, head_dim))),
        ((k_cache[:, slots], k_scale[:, slots]), k_float[:, slots]),
    ):
        want = quantized(values)
        assert torch.equal(got[0], want[0])
        assert_same_bits(got[1], want[1])
    assert_same_bits(v_cache, v_float)
    kept = [i for i in range(11) if i not in slots]
    assert (k_cache[:, kept] == 77).all() and k_scale[:, kept].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_only_threads_and_instruction_sets_give_the_same_bits(dtype: torch.dtype) -> None:
    given = inputs(2, 33, 12, 64, dtype)

    def run(threads: int, with_q: bool = True) -> Tensor:
        held = ring_of(2, 50, 12, 64, dtype)
        q, k, v, q_weight, k_weight, table = given
        first = (q, k, v, q_weight) if with_q else (None, k, v, None)
        out = qk_norm_rope_quantize_kv_write(*first, k_weight, table, *held, Ring(40, 5, 50), threads)
        assert (out is None) == (not with_q)
        return torch.cat([x.float().flatten() for x in (*held, *(out or ()))])

    one = run(1)
    for threads in (2, 3, 0):
        assert_same_bits(run(threads), one)
    for other in under_every_isa(lambda: run(0)):
        assert_same_bits(other, one)
    alone = run(0, with_q=False)
    assert_same_bits(alone, one[: alone.numel()])


def test_refusals() -> None:
    from lingbot_kernels import _C

    fields = [0] * len(str(_C.cpu.qk_norm_rope_quantize_kv_write.__doc__).split(", "))
    names = [x.strip() for x in str(_C.cpu.qk_norm_rope_quantize_kv_write.__doc__).partition("(")[2].split(",")]

    def call(**values: int) -> None:
        for name, value in {"batch": 1, "tokens": 1, "heads": 1, "head_dim": 2, **values}.items():
            fields[names.index(name.replace("__", "."))] = value
        _C.cpu.qk_norm_rope_quantize_kv_write(*fields)

    with pytest.raises(RuntimeError, match="k and k_weight must not be null"):
        call()
    with pytest.raises(RuntimeError, match="head_dim must be even"):
        call(head_dim=3)
    with pytest.raises(RuntimeError, match="k_cache and k_scale must not be null"):
        call(k__ptr=8, k_weight=8)
    with pytest.raises(RuntimeError, match="q needs q_weight, q_codes and q_scale"):
        call(q__ptr=8)
