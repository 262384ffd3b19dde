"""Profiler ranges: their names and nesting as torch.profiler sees them, and nothing at all while they are off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import timeit
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels import nvtx as ranges


@pytest.fixture
def enabled() -> Iterator[None]:
    ranges.enable()
    yield
    ranges.enable(False)


@pytest.fixture(scope="module")
def stage() -> CausalDenoisingStage:
    torch.manual_seed(0)
    cfg = LingBotConfig(
        dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_dim=32, text_len=8, freq_dim=32,
        frames_per_chunk=1, window_frames=3, sink_frames=1,
    )  # fmt: skip
    return CausalDenoisingStage(CausalLingBotTransformer(cfg), timesteps=(1000, 500))


def profiled(stage: CausalDenoisingStage, tmp_path: Path) -> list[dict]:
    """The ranges of this library in a torch.profiler trace of one chunk: name, start and end in microseconds."""
    state, text, noise = RealtimeCausalDiTState(), torch.randn(1, 8, 32), torch.randn(1, 16, 1, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stage.denoise_chunk(state, noise, text=text)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    prefix = ranges.DOMAIN + ":"
    return [
        {"name": e["name"].removeprefix(prefix), "start": e["ts"], "end": e["ts"] + e["dur"]}
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(prefix)
    ]


def parents(events: list[dict]) -> dict[str, set[str]]:
    """Name -> names of the innermost range around each of its events ("" for none)."""
    found: dict[str, set[str]] = {}
    for event in events:
        around = [e for e in events if e is not event and e["start"] <= event["start"] and event["end"] <= e["end"]]
        innermost = min(around, key=lambda e: e["end"] - e["start"], default={"name": ""})
        found.setdefault(event["name"], set()).add(innermost["name"])
    return found


def test_ranges_nest_chunk_step_block_phase_op(enabled, stage, tmp_path):
    events = profiled(stage, tmp_path)
    nesting = parents(events)
    steps = {"step 0", "step 1", "context"}
    assert nesting["chunk"] == {""}
    assert nesting["step 0"] == nesting["step 1"] == nesting["context"] == {"chunk"}
    assert nesting["embeddings"] == steps
    assert nesting["block 0"] == nesting["block 1"] == steps
    assert nesting["head"] == {"step 0", "step 1"}
    for phase in ("self_attn", "camera", "cross_attn", "ffn"):
        assert nesting[phase] == {"block 0", "block 1"}
    assert nesting["qk_norm_rope_kv_write"] == {"self_attn"}
    assert nesting["k_norm_rope_kv_write"] == {"self_attn"}
    assert nesting["gated_residual_camera_norm"] == {"camera"}
    assert nesting["residual_norm_modulate"] == {"cross_attn", "ffn"}
    assert nesting["windowed_attention"] == {"self_attn", "cross_attn"}
    assert nesting["rope_cos_sin"] == {"embeddings"}
    names = [event["name"] for event in events]
    assert names.count("block 0") == 3
    assert names.count("ffn") == 2 * 2 + 1  # the context update's last block ends with its K/V write


def test_nothing_is_marked_while_off(stage, tmp_path):
    assert not ranges.enabled()
    assert profiled(stage, tmp_path) == []


def test_disabled_range_is_one_shared_context_and_costs_nanoseconds():
    assert ranges.range("a") is ranges.range("b")
    seconds = min(timeit.repeat(lambda: ranges.range("a"), number=10_000, repeat=7)) / 10_000
    assert seconds < 2e-6


def test_enabled_ranges_do_not_change_results(stage):
    def chunk() -> torch.Tensor:
        torch.manual_seed(1)
        noise, text = torch.randn(1, 16, 1, 8, 8), torch.randn(1, 8, 32)
        return stage.denoise_chunk(RealtimeCausalDiTState(), noise, text=text, generator=torch.manual_seed(2))

    off = chunk()
    ranges.enable()
    try:
        assert torch.equal(chunk(), off)
    finally:
        ranges.enable(False)


def test_domain_of_the_nvtx_package_is_used_where_it_is_importable(monkeypatch):
    calls: list[tuple] = []
    fake = types.ModuleType("nvtx")
    fake.push_range = lambda name, domain: calls.append(("push", name, domain))
    fake.pop_range = lambda domain: calls.append(("pop", domain))
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    ranges.enable()
    try:
        with ranges.range("chunk"), ranges.range("step 0"):
            pass
    finally:
        ranges.enable(False)
    domain = "lingbot_kernels"
    assert calls == [("push", "chunk", domain), ("push", "step 0", domain), ("pop", domain), ("pop", domain)]


def test_torch_ranges_carry_the_domain_as_a_prefix(monkeypatch):
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "nvtx", None)  # not importable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    ranges.enable()
    try:
        with ranges.range("ffn"):
            pass
    finally:
        ranges.enable(False)
    assert calls == ["lingbot_kernels:ffn", "pop"]


def test_a_range_closes_when_its_block_raises(enabled):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with pytest.raises(KeyError), ranges.range("outer"):
            raise KeyError
        with ranges.range("after"):
            pass
    found = {e.name: e for e in profile.events() if e.name.startswith("lingbot_kernels:")}
    assert found["lingbot_kernels:outer"].time_range.end <= found["lingbot_kernels:after"].time_range.start


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), (None, "False")])
def test_environment_switch(value, expected):
    environment = {k: v for k, v in os.environ.items() if k != "LINGBOT_KERNELS_NVTX"}
    environment |= {} if value is None else {"LINGBOT_KERNELS_NVTX": value}
    script = "from lingbot_kernels import nvtx; print(nvtx.enabled())"
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected


@pytest.mark.parametrize("on", [False, True])
def test_compiles_without_a_graph_break(on):
    def block(x: torch.Tensor) -> torch.Tensor:
        with ranges.range("ffn"):
            return torch.relu(x) + 1

    ranges.enable(on)
    try:
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    finally:
        ranges.enable(False)
        torch.compiler.reset()
