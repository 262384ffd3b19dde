"""The model bench's flow without a GPU: clock, allocator, graphs and profiler are stood in for, model and sessions are
real.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cuda_stand_ins import stand_in
from torch.utils.flop_counter import FlopCounterMode

from lingbot_kernels.benchmarks import model, model_compiled, plots, timeline
from lingbot_kernels.benchmarks.rows import ABSENT, Row
from lingbot_kernels.cli import main
from lingbot_kernels.commands import bench_model

LAYERS = 2


def recorded(call: Callable[[], Any], times: int) -> list[timeline.Kernel]:
    """What a step of two layers might show: 100 us a kernel, one of the library's overlapping by 20, gaps of 1."""
    for _ in range(times):
        call()
    layer = ["nvjet_qkv", "lingbot::norm_rope_rows", "flash_self", "nvjet_o", "nvjet_q", "flash_cross", "nvjet_o",
             "nvjet_up", "nvjet_down"]  # fmt: skip
    kernels, reached = [], 0.0
    for name in layer * LAYERS * times:
        start = reached + (-20 if "lingbot" in name else 1)
        kernels.append(timeline.Kernel(name, start, start + 100))
        reached = start + 100
    return kernels


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(timeline, "record", recorded)


def run(plan: model.ModelPlan) -> tuple[bool, dict[str, Row], list[str]]:
    rows: list[Row] = []
    said: list[str] = []
    green = model.ModelBench(plan, torch.device("cpu"), rows.append, said.append).run()
    return green, {f"{row.op} {row.backend}": row for row in rows}, said


def small_plan(**options: Any) -> model.ModelPlan:
    return model.ModelPlan("tiny", LAYERS, (8, 12), 1, peers=(), **options)


def test_rows_of_a_run(no_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    green, rows, said = run(small_plan(timeline_path=path))
    assert green and {row.precision for row in rows.values()} == {"bfloat16"}
    ours = "lingbot_kernels"
    for op in ("denoise_step", "context_update", "chunk", "first_chunk"):
        assert rows[f"{op} {ours}"].p50_us is not None and rows[f"{op} {ours}"].ceiling == "bare floor"
    phases = {kind: rows[f"step_phase_{kind} {ours}"].p50_us for kind in (*timeline.KINDS, "gaps")}
    assert phases == pytest.approx(
        {"attention": 400, "products": 1200, "fused_passes": 160, "other": 0, "gaps": 16 - 1 / 5}
    )
    assert rows[f"gpu_busy {ours}"].ratio == pytest.approx(1760 / (1760 + 16 - 1 / 5))
    assert rows[f"launches_per_block {ours}"].calls == 1
    memory = {op.split()[0]: row.bytes / 2**30 for op, row in rows.items() if op.startswith("memory_")}
    assert memory == {
        "memory_weights": 3, "memory_session": 3, "memory_graphs": 3, "memory_steady_peak": 5, "memory_in_use": 60,
    }  # fmt: skip
    assert "steady peak 5.0, in use on the GPU 60.0" in rows[f"denoise_step {ours}"].note
    report = json.loads(path.read_text())
    assert report["case"] == "tiny-2layers-s72-kv432-1gpu" and report["layers"] == LAYERS
    assert list(report["graphs"]) == ["floor", "floor, epilogues", "step"]
    step = report["graphs"]["step"]
    assert step["timeline"]["layer_us"] == pytest.approx(888) and step["unprofiled_ms"] > 0
    assert len(step["kernels"]) == 5 * 9 * LAYERS and step["names"][step["kernels"][2][0]] == "flash_self"
    assert "self_attn.qkv" in said[0] and "unprofiled" in said[0]


def test_a_prompt_with_padding_is_measured_with_one_key_for_it(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[int] = set()
    attend = model._attend
    monkeypatch.setattr(model, "_attend", lambda q, k, *rest: (keys.add(k.shape[1]), attend(q, k, *rest)))
    green, rows, _ = run(small_plan(prompt_tokens=5))
    assert green and keys == {6, 432}  # of the text and of the window, in the floor
    assert {row.case for row in rows.values()} == {"tiny-2layers-s72-kv432-prompt5-1gpu"}


def test_a_trace_that_does_not_fit_leaves_the_rest(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timeline, "record", lambda call, times: recorded(call, times)[:-9])
    green, rows, said = run(small_plan(timeline_path=tmp_path / "t.json"))
    assert green and "got 18 attention calls, must be 20" in rows["launches_per_block lingbot_kernels"].note
    assert "must be 20" in said[0] and "error" in json.loads((tmp_path / "t.json").read_text())["graphs"]["step"]


def test_no_kernels_are_said_to_be_none(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "record", lambda call, times: [])
    green, rows, said = run(small_plan())
    assert green and "no kernel" in said[0] and "gpu_busy lingbot_kernels" not in rows


def test_a_floor_with_epilogues_runs_the_same_products(no_gpu: None) -> None:
    bench = model.ModelBench(small_plan(), torch.device("cpu"), lambda row: None)
    session = model.BenchSession(bench, model.CausalLingBotTransformer(bench.config, dtype=torch.bfloat16))
    session.fill()
    flops: dict[bool, int] = {}
    for epilogues in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            bench.floor(session, epilogues=epilogues)
        flops[epilogues] = counter.get_total_flops()
    assert flops[False] == flops[True] > 0


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_step_is_gated_and_leaves_the_model_as_it_was(no_gpu: None) -> None:
    green, rows, _ = run(small_plan(compiled=True))
    assert green
    eager, compiled = rows["denoise_step lingbot_kernels, no graphs"], rows["denoise_step torch.compile"]
    for row in (eager, compiled):
        assert row.p50_us is not None and row.gate == "green" and row.ratio is not None
        assert float(row.note.rsplit(" ", 1)[-1]) < 0.01
    assert compiled.error is not None and 0 < compiled.error <= 1.25 * (compiled.plain_error or 0)
    replayed = rows["denoise_step torch.compile, graphs"]
    assert replayed.gate == "failed" and "no graph was replayed" in replayed.note  # there are none on a CPU


def test_a_failure_to_compile_is_a_row(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(block: torch.nn.Module, **options: Any) -> None:
        raise RuntimeError("no compiler")

    bench = model.ModelBench(small_plan(), torch.device("cpu"), (rows := []).append)
    session = model.BenchSession(bench, model.CausalLingBotTransformer(bench.config, dtype=torch.bfloat16))
    session.fill()
    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    assert not model_compiled.measure(bench, session, 1.0, 0.001, 0.001)
    assert rows[-1].gate == "failed" and rows[-1].note == "RuntimeError: no compiler" and rows[-1].p50_us is None
    assert session.model.cuda_graphs


def test_a_picture_of_the_step_adds_up(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times = {"denoise_step": 330, "bare_floor": 309, "step_phase_attention": 158, "step_phase_products": 152,
             "step_phase_fused_passes": 14, "step_phase_other": 0.1, "step_phase_gaps": 3}  # fmt: skip
    rows = [
        {"op": op, "backend": "library" if op == "bare_floor" else "lingbot_kernels", "p50_us": 1e3 * ms, "case": "c",
         "gpu": "g", "date": "2026-01-01T00:00:00Z"}
        for op, ms in times.items()
    ]  # fmt: skip
    plots.model_step(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no timed denoise step"):
        plots.model_step(rows[1:], tmp_path / "q.png")


def test_options_are_checked() -> None:
    for arguments, message in ((["--gpus", "1", "--height", "40"], "--height"), (["--preset", "huge"], "--preset")):
        result = CliRunner().invoke(main, ["bench", "model", *arguments])
        assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize("half", [False, True])
def test_a_peer_that_is_not_there_is_a_row(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half: bool
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    if half:
        (tmp_path / "sglang").mkdir()
        (tmp_path / "sglang/__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
    elif importlib.util.find_spec("sglang") is not None:
        pytest.skip("sglang is installed")
    green, rows, _ = run(dataclasses.replace(small_plan(), peers=("sglang",)))
    said = "is not importable (ModuleNotFoundError" if half else "sglang is not installed"
    assert green
    for backend in ("sglang", "sglang accelerated"):
        row = rows[f"chunk {backend}"]
        assert row.peer and row.gate == ABSENT and row.p50_us is None and said in row.note
    monkeypatch.delitem(sys.modules, "sglang", raising=False)


@pytest.mark.parametrize(
    "words, peers",
    [
        ([], ["flashdreams"]),
        (["--peer"], ["flashdreams"]),
        (["--no-peer"], []),
        (["--peer", "--no-peer"], []),
        (["--peer", "sglang"], ["sglang"]),
        (["--peer", "sglang", "--peer", "--layers", "3"], ["sglang", "flashdreams"]),
    ],
)
def test_which_peers_are_asked_for(words: list[str], peers: list[str]) -> None:
    given = bench_model.command.make_context("model", list(words)).params
    assert list(() if given["no_peer"] else given["peers"]) == peers
    assert set(peers) <= set(model.PEERS)
