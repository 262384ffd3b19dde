"""bfloat16 on the CPU: the bits of the official eager chain, over enough elements for shares of 1e-5."""

from __future__ import annotations

import pytest
import torch
from official_bits import assert_official_bits, measure_shares


@pytest.mark.unpoisoned
@pytest.mark.parametrize("heads,tokens", [(40, 2000), (12, 4680)])
def test_bits_of_the_official_chain(heads: int, tokens: int) -> None:
    torch.manual_seed(0)
    assert_official_bits(measure_shares("cpu", heads, tokens, "cpu"))
