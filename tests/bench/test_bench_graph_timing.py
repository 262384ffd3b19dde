"""Graph timing against a simulated GPU with a clock of its own, and against a real one where there is one."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from click.testing import CliRunner

from lingbot_kernels.benchmarks import timing
from lingbot_kernels.benchmarks.rows import read_rows
from lingbot_kernels.commands.bench_kernels import command


class SimulatedGPU:
    """A stream whose time moves by what is put on it: 10 us a call, a millisecond a spin, 3 us a replay's start."""

    def __init__(self) -> None:
        self.now = 0.0  # microseconds
        self.capturing: list[float] | None = None
        self.log: list[str] = []

    def launch(self, us: float) -> object:
        if self.capturing is not None:
            self.capturing.append(us)
        else:
            self.now += us
        return object()

    def install(self, monkeypatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                assert gpu.capturing is None
                gpu.log.append("event")
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            def replay(self) -> None:
                gpu.log.append("replay")
                gpu.now += 3.0 + sum(self.calls)

        @contextlib.contextmanager
        def graph(captured: CUDAGraph, capture_error_mode: str):
            gpu.log.append("capture")
            gpu.capturing = captured.calls = []
            yield
            gpu.capturing = None

        def spin(cycles: int) -> None:
            gpu.log.append("spin")
            gpu.now += 1000.0

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fake = {
            "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "_sleep": spin, "Stream": lambda: stream,
            "stream": lambda which: contextlib.nullcontext(), "current_stream": lambda *device: stream,
            "synchronize": lambda *device: gpu.log.append("wait"), "device": lambda which: contextlib.nullcontext(),
        }  # fmt: skip
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)


CUDA = torch.device("cuda", 0)


def test_graph_timing_warms_up_queues_replays_and_divides_by_the_calls(monkeypatch):
    gpu = SimulatedGPU()
    gpu.install(monkeypatch)
    order: list[int] = []

    def call(index: int) -> object:
        if gpu.capturing is not None:
            order.append(index)
        return gpu.launch(10.0)

    effort = timing.Effort(sample_us=1000.0, budget_us=20_000.0, min_samples=5, max_samples=50)
    timed = timing.measure([lambda i=i: call(i) for i in range(7)], CUDA, effort)
    assert timed.calls % 7 == 0 and timed.calls * 10 >= 1000
    assert order == [i % 7 for i in range(timed.calls)]
    assert timed.p20_us == timed.p50_us == timed.p80_us == pytest.approx(10.0 + 3.0 / timed.calls)
    assert (timed.method, timed.samples) == ("graph", 19)
    # Once captured: two replays to warm up, then a spin, then nothing but replays between events.
    after = gpu.log[gpu.log.index("capture") + 1 :]
    assert after == ["replay", "replay", "wait", "spin", *["event", "replay", "event"] * timed.samples, "wait"]
    assert gpu.log.index("spin") < gpu.log.index("capture")


def test_outputs_of_a_whole_round_are_alive_during_capture(monkeypatch):
    gpu = SimulatedGPU()
    gpu.install(monkeypatch)
    alive: set[int] = set()
    most = 0

    class Output:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def call() -> Output:
        gpu.launch(10.0)
        return Output()

    timing.measure([call] * 5, CUDA, timing.QUICK)
    assert 5 <= most <= 6 and not alive


def test_events_time_what_a_graph_cannot_hold(monkeypatch):
    gpu = SimulatedGPU()
    gpu.install(monkeypatch)
    timed = timing.measure([lambda: gpu.launch(50.0)] * 3, CUDA, timing.QUICK, graph=False)
    assert (timed.p50_us, timed.method, timed.calls) == (50.0, "events", 3)
    assert "capture" not in gpu.log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_quick_bench_on_a_gpu(tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cuda", "--quick", "--cases", "s192-d512,s192-d512-wrap", "--json", str(path)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = read_rows(path)
    timed = [row for row in rows if row["p50_us"] is not None]
    assert {row["backend"] for row in timed} >= {"triton", "reference", "sdpa", "eager-official"}
    for row in timed:
        wanted = "events" if (row["op"], row["backend"]) == ("rope_cos_sin", "reference") else "graph"
        assert row["method"] == wanted and row["driver"] and row["wall_us"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graph_time_of_a_copy_is_plausible():
    timed = timing.measure_copy(200_000_000, CUDA, timing.QUICK)
    assert 0.2 < 200_000_000 / timed.p50_us / 1e6 < 20  # TB/s
