"""Checks of the int8 attention against the reference.

Not collected by itself: test_kernels.py runs it under the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from checks import DEVICE, poisoned, same_bits

from lingbot_kernels import reference
from lingbot_kernels.triton.int8_attention import AttentionConfig, int8_attention

BF16 = torch.bfloat16


def operands(queries: int, capacity: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries + capacity)
    codes = [torch.randint(-127, 128, (2, n, 2, head_dim), generator=generator) for n in (queries, capacity)]
    scales = [0.01 + 0.02 * torch.rand(2, n, 2, generator=generator) for n in (queries, capacity)]
    v = torch.randn(2, capacity, 2, head_dim, generator=generator) + 0.5
    q, k = (x.to(DEVICE, torch.int8) for x in codes)
    return q, scales[0].to(DEVICE), k, scales[1].to(DEVICE), v.to(DEVICE, BF16)


@pytest.mark.parametrize("config", [None, AttentionConfig(16, 32, 4, 1)])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(5, 37, 64), (17, 1, 128), (70, 65, 64)])
def test_against_float64(queries: int, keys: int, head_dim: int, config: AttentionConfig | None) -> None:
    q, q_scale, k, k_scale, v = operands(queries, keys + 3, head_dim)
    v[:, keys:] = torch.nan
    for count in (1.0, 9.0):
        out, again = (poisoned(2, queries, 2 * head_dim, dtype=BF16) for _ in range(2))
        lse = poisoned(2, 2, queries, dtype=torch.float32)
        for to in (out, again):
            int8_attention(q, q_scale, k, k_scale, v, keys, count, to, lse, config=config)
        exact, exact_lse = reference.int8_attention(q, q_scale, k, k_scale, v.double(), keys, count)
        assert (out.double() - exact).norm() <= 0.004 * exact.norm()
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
        assert same_bits(out, again)
