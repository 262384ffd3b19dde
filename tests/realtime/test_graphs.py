"""When a session's forwards replay a graph, and when they warm up for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lingbot_kernels.realtime.graphs import SessionGraphs


def ready(graphs: SessionGraphs, *, visible: int = 9, only: bool = False, **changed: Any) -> bool:
    inputs = SimpleNamespace(**{"latents": torch.zeros(1, 2), "text_kv": [], "camera": None, **changed})
    ring: Any = SimpleNamespace(ring=SimpleNamespace(capacity=9))
    return graphs.ready(inputs, ring, SimpleNamespace(num_visible=visible), only)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_each_kind_of_forward_warms_up_once_and_then_replays() -> None:
    graphs = SessionGraphs()
    for only in (False, True):
        assert not ready(graphs, only=only) and graphs.warming and "warms up" in graphs.reason
        assert ready(graphs, only=only) and not graphs.warming and graphs.reason == ""
    assert not ready(graphs, latents=torch.zeros(1, 3)) and graphs.warming
    graphs.clear()
    assert not graphs.warming and not ready(graphs) and graphs.warming


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"visible": 8}, "not full"), ({"text_kv": object()}, "text cache"), ({"camera": object()}, "camera cache")],
)
def test_what_keeps_a_forward_eager_does_not_warm_up(changed: dict[str, Any], reason: str) -> None:
    graphs = SessionGraphs()
    ready(graphs)
    assert not ready(graphs, **changed) and reason in graphs.reason and not graphs.warming
