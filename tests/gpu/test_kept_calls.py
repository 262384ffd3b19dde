"""Kept calls on a GPU: found there, on any stream and in graphs, and still refused where a tensor is elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lingbot_kernels import ops, reference


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 37, 1536, device="cuda").bfloat16(), torch.randn(1536, device="cuda").bfloat16()


def test_a_kept_call_serves_every_stream_and_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = sys.modules["lingbot_kernels.ops.rms_norm"]._op
    checked: list[Any] = []
    plan = op._plan
    monkeypatch.setattr(op, "_plan", lambda *call: (checked.append(call), plan(*call))[1])
    op.forget()
    cases = [inputs() for _ in range(4)]
    wanted = [reference.rms_norm(x, weight, 1e-6) for x, weight in cases]

    def run(number: int) -> torch.Tensor:
        return ops.rms_norm(*cases[number], 1e-6, backend=backend)

    got = [run(0)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # long enough for a launch on another stream to be seen too early
        cases[1][0].neg_()
        got.append(run(1))
        got[1].neg_()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.append(run(2))
    cases[2][0].copy_(cases[3][0])
    cases[2][1].copy_(cases[3][1])
    wanted[2] = wanted[3]
    graph.replay()
    got.append(run(3))
    torch.cuda.synchronize()
    assert len(checked) == 1, "torch's DLPack function table was not used"
    for own, want in zip(got, wanted, strict=True):
        assert (own.float() - want.float()).abs().max() <= 2.0**-7 * want.float().abs().max()


def test_a_tensor_on_another_device_is_refused_after_a_kept_call(backend: str) -> None:
    x, weight = inputs()
    for _ in range(2):
        ops.rms_norm(x, weight, 1e-6, backend=backend)
    with pytest.raises(TypeError, match=r"weight: got .* on cpu, must be torch\.bfloat16 on cuda"):
        ops.rms_norm(x, weight.cpu(), 1e-6, backend=backend)
    with pytest.raises(ops.BackendUnavailable, match="serves CUDA tensors, not cpu"):
        ops.rms_norm(x.cpu(), weight.cpu(), 1e-6, backend=backend)
