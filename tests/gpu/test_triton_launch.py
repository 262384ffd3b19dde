"""Triton launches by kept kernels give the bits of plain launches, on any stream, in graphs and under hooks."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from lingbot_kernels.triton import _launch, rms_norm


def test_kept_kernels_do_what_plain_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd and even alignments by turns, two streams, a graph, a profiler's hook: always the plain launch's bits."""
    monkeypatch.setattr(_launch, "_compiled", {})
    torch.manual_seed(0)
    storage = torch.randn(8 * 1536 + 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1536, device="cuda", dtype=torch.bfloat16)

    def both(offset: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = storage[offset : offset + tokens * 1536].view(1, tokens, 1536)
        got = torch.full((2, 1, tokens, 1536), float("nan"), device="cuda", dtype=torch.bfloat16)
        rms_norm.rms_norm(x, weight, got[0], 1e-6)
        monkeypatch.setattr(_launch, "use_compiled", False)
        rms_norm.rms_norm(x, weight, got[1], 1e-6)
        monkeypatch.setattr(_launch, "use_compiled", True)
        return got[0], got[1]

    for offset, tokens in [(0, 8), (2, 8), (0, 1), (8, 7), (2, 3), (0, 8), (4, 8)]:
        kept, plain = both(offset, tokens)
        assert torch.equal(kept, plain) and kept.isfinite().all()
    assert len(_launch._compiled) == 3  # x a multiple of 16 bytes, 4 and 8 beyond one

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept, plain = both(0, 8)
    side.synchronize()
    assert torch.equal(kept, plain)

    x, y = storage[: 8 * 1536].view(1, 8, 1536), torch.empty(1, 8, 1536, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rms_norm.rms_norm(x, weight, y, 1e-6)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, plain)

    seen = []
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        rms_norm.rms_norm(x, weight, y, 1e-6)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
