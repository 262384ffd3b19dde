"""The command line on a GPU: memory by phase, the camera's time, and what caches save when graphs replay."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lingbot_kernels.benchmarks.rows import read_rows
from lingbot_kernels.cli import main


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_rollout_reports_memory_by_phase(tmp_path: Path) -> None:
    gc.collect()  # what other tests left must not go away meanwhile
    path = tmp_path / "report.json"
    output = invoke("rollout", "--device", "cuda", "--chunks", 10, "--quiet", "--json", path)
    report = json.loads(path.read_text())
    summary = report["summary"]
    memory, planned = summary["memory"], summary["memory"]["planned"]
    assert memory["weights_bytes"] >= planned["weights"]
    stored = memory["weights_bytes"] + summary["cache_bytes"]["total"]
    for name in ("first_chunk_bytes", "steady_chunk_bytes"):
        assert stored < memory[name] <= summary["peak_memory_bytes"], name
    assert summary["peak_memory_bytes"] - memory["weights_bytes"] <= sum(planned.values()) - planned["weights"]
    assert 0 < summary["camera_ms"]["p50"] < report["chunks"][-1]["denoise_ms"][0]
    assert "planned memory" in output and "ms of step 0" in output


@pytest.mark.parametrize("graphs", ["--cuda-graphs", "--no-cuda-graphs"])
def test_bench_caching_on_fewer_layers(graphs: str, tmp_path: Path) -> None:
    report_path, rows_path = tmp_path / "report.json", tmp_path / "rows.jsonl"
    arguments = ("--device", "cuda", "--layers", 2, "--chunks", 9, "--repeats", 1, "--json", report_path)
    invoke("bench", "caching", *arguments, "--rows", rows_path, graphs)
    report, rows = json.loads(report_path.read_text()), read_rows(rows_path)
    assert report["bit_identical"] and report["settings"]["layers"] == "2 of 3"
    assert report["settings"]["interleave"] == "chunk"
    assert report["steady_chunks"] == ([7, 8] if graphs == "--cuda-graphs" else [5, 6, 7, 8])
    assert [row["gate"] for row in rows] == ["green"] * 7 and {row["method"] for row in rows} == {"events"}
