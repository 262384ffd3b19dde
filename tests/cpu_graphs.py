"""CUDA graphs of a session on a CPU, where a replay runs the captured forward again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels.models import session_forward
from lingbot_kernels.realtime.chunk_inputs import TimeEmbeddings
from lingbot_kernels.realtime.graphs import SessionGraphs, _Captured


class _Graph:
    captured: _Captured

    def __init__(self, forward: Callable[[], Tensor | None]) -> None:
        self.forward = forward

    def replay(self) -> None:
        self.captured.out = self.forward()


def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions capture and replay; what a capture reads are tensors of its own, as on a GPU."""

    def capture(graphs: SessionGraphs, run: Any, inputs: Any, kv_cache: Any, position: Any, only: bool) -> _Captured:
        time = TimeEmbeddings(inputs.time.blocks.clone(), inputs.time.head.clone())
        own = replace(inputs, latents=inputs.latents.clone(), time=time)
        graph: Any = _Graph(lambda: run(own, kv_cache.layers, position, only))
        graph.captured = _Captured(graph, own, kv_cache, None)
        graphs.captures += 1
        return graph.captured

    monkeypatch.setattr(SessionGraphs, "_capture", capture)
    monkeypatch.setattr(session_forward, "_graphs", lambda model, state: state.graphs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
