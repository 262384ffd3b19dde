"""When a session's forwards replay a graph, and when they warm up for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_graphs import graphs_on_cpu
from helpers import make_inputs, make_model, same_bits, small_config

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState, ops, use_backend
from lingbot_kernels.realtime.graphs import SessionGraphs


def ready(
    graphs: SessionGraphs, *, visible: int = 9, only: bool = False, backend: str = "auto", **changed: Any
) -> bool:
    inputs = SimpleNamespace(**{"latents": torch.zeros(1, 2), "text_kv": [], "camera": None, **changed})
    ring: Any = SimpleNamespace(ring=SimpleNamespace(capacity=9))
    return graphs.ready(inputs, ring, SimpleNamespace(num_visible=visible), only, backend)  # type: ignore[arg-type]


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


def test_each_backend_choice_warms_up_once_and_then_replays_its_own() -> None:
    graphs = SessionGraphs()
    for backend in ("auto", "cuda", "triton"):
        assert not ready(graphs, backend=backend) and graphs.warming
    for backend in ("auto", "cuda", "triton"):
        assert ready(graphs, backend=backend)


def test_what_is_undone_warms_up_again() -> None:
    graphs = SessionGraphs()
    ready(graphs)
    graphs.mark()
    ready(graphs, backend="cuda")
    graphs.undo()
    assert ready(graphs) and not ready(graphs, backend="cuda")
    graphs.drop()
    assert not ready(graphs)


def test_a_graph_belongs_to_the_backend_choice_it_was_captured_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`use_backend` and the environment are honoured after a capture, and each choice goes back to its own graphs."""
    graphs_on_cpu(monkeypatch)
    model = make_model(small_config(window_frames=6, sink_frames=1))
    stage, state, inputs = CausalDenoisingStage(model), RealtimeCausalDiTState(), make_inputs(model.config, 1)
    given = {"text": inputs.text, "renoise": inputs.renoise[0], "camera": inputs.camera[0]}

    def chunks(count: int) -> tuple[int, int]:
        before = state.graphs.captures, state.graphs.replays
        for _ in range(count):
            stage.denoise_chunk(state, inputs.noise[0], **given)
        return state.graphs.captures - before[0], state.graphs.replays - before[1]

    assert chunks(3) == (2, 8)  # the window is full with the second; five forwards a chunk, of which two warm up
    with use_backend("reference"):
        assert chunks(2) == (2, 8)
        assert chunks(1) == (0, 5)
    assert chunks(1) == (0, 5)
    monkeypatch.setattr(ops._dispatch._native, "environment", lambda name: "reference")
    assert chunks(1) == (0, 5)
    with use_backend("cpu"):
        assert chunks(2) == (2, 8)


def test_the_bits_follow_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_on_cpu(monkeypatch)
    model = make_model(small_config(window_frames=6, sink_frames=1))
    stage, inputs = CausalDenoisingStage(model), make_inputs(model.config, 1)
    given = {"text": inputs.text, "renoise": inputs.renoise[0], "camera": inputs.camera[0]}
    outputs = []
    for graphs in (True, False):
        model.cuda_graphs, state = graphs, RealtimeCausalDiTState()
        if not graphs:
            state.graphs.ready = lambda *_: False  # type: ignore[method-assign]
        chunks = [stage.denoise_chunk(state, inputs.noise[0], **given) for _ in range(4)]
        with use_backend("reference"):
            chunks += [stage.denoise_chunk(state, inputs.noise[0], **given) for _ in range(3)]
        outputs.append(chunks)
        assert (state.graphs.replays > 0) == graphs
    assert all(same_bits(a, b) for a, b in zip(*outputs, strict=True))
