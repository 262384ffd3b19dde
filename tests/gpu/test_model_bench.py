"""`bench model` on a small network: replayed graphs are seen kernel by kernel, and their times add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lingbot_kernels.benchmarks.rows import read_rows
from lingbot_kernels.cli import main

SMALL = ["--preset", "tiny", "--layers", "3", "--height", "256", "--width", "384", "--chunks", "1", "--no-peer"]


def test_a_replayed_step_is_seen_kernel_by_kernel(tmp_path: Path) -> None:
    rows_path, timeline_path = tmp_path / "rows.jsonl", tmp_path / "timeline.json"
    result = CliRunner().invoke(
        main, ["bench", "model", *SMALL, "--json", str(rows_path), "--timeline", str(timeline_path)]
    )
    assert result.exit_code == 0, result.output
    rows = {row["op"]: row for row in read_rows(rows_path)}
    assert 1 <= rows["launches_per_block"]["calls"] <= 8, rows["launches_per_block"]["note"]
    assert 0 < rows["gpu_busy"]["ratio"] <= 1
    assert 0 < rows["memory_weights"]["bytes"] < rows["memory_steady_peak"]["bytes"] < rows["memory_in_use"]["bytes"]
    graphs = json.loads(timeline_path.read_text())["graphs"]
    for name, graph in graphs.items():
        held = graph["timeline"]
        assert held["layer_us"] == pytest.approx(sum(line["own_us"] + line["gap_us"] for line in held["lines"]))
        assert held["span_us"] == pytest.approx(sum(held["own_us"].values()) + held["gaps_us"])
        labels = {line["label"] for line in held["lines"]}
        assert {"self-attention", "cross-attention", "self_attn.qkv", "self_attn.o", "ffn.0", "ffn.2"} <= labels, name
    assert sum(line["kind"] == "fused_passes" for line in graphs["step"]["timeline"]["lines"]) >= 4


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_step_replays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(main, ["bench", "model", *SMALL, "--json", str(path), "--compile"])
    assert result.exit_code == 0, result.output
    rows = {row["backend"]: row for row in read_rows(path) if row["op"] == "denoise_step"}
    assert {"torch.compile", "torch.compile, graphs", "lingbot_kernels, no graphs"} <= set(rows)
    assert all(row["gate"] == "green" and row["p50_us"] for row in rows.values()), rows
