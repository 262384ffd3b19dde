"""`rollout`: what it reports is what happened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_video import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    ops,
)
from lingbot_kernels.benchmarks import backends, tables
from lingbot_kernels.benchmarks.timing import ChunkTimer, percentiles, steady
from lingbot_kernels.models.camera import CameraTrajectory, example_trajectory

STORES = ("rope", "time_embeddings", "camera_modulation", "text")


def report_of(invoke, tmp_path, *arguments):
    result = invoke("rollout", *SMALL, "--json", "report.json", *arguments)
    return json.loads((tmp_path / "report.json").read_text()), result


def test_the_report_has_every_documented_field(invoke, tmp_path):
    report, result = report_of(invoke, tmp_path, "--chunks", 8)
    assert list(report) == ["environment", "device", "model", "settings", "chunks", "summary"]
    assert report["model"]["preset"] == "tiny" and report["model"]["config"]["window_frames"] == 18
    assert report["model"]["parameters"] == LingBotConfig.preset("tiny").num_parameters()
    settings = report["settings"]
    assert (settings["tokens_per_frame"], settings["tokens_per_chunk"]) == (4, 12)
    assert settings["schedule"]["times"] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert (settings["camera"], settings["prompt"], settings["device"]) == ("made path", "seeded noise", "cpu")

    assert [chunk["index"] for chunk in report["chunks"]] == list(range(8))
    assert [chunk["start_frame"] for chunk in report["chunks"]] == list(range(0, 24, 3))
    assert [chunk["visible_tokens"] for chunk in report["chunks"]] == [12, 24, 36, 48, 60, 72, 72, 72]
    for chunk in report["chunks"]:
        assert len(chunk["denoise_ms"]) == 4 and min(chunk["denoise_ms"]) > 0 and chunk["context_ms"] > 0
        forwards = sum(chunk["denoise_ms"]) + chunk["inputs_ms"]
        assert forwards <= chunk["time_to_chunk_ms"] <= chunk["total_ms"] - chunk["context_ms"]
        assert 0.1 < chunk["latents_rms"] < 10
        first = chunk["index"] == 0
        assert chunk["cache_misses"] == {
            "rope": 1, "time_embeddings": 5 * first, "camera_modulation": 1, "text": 1 * first
        }  # fmt: skip
        assert chunk["cache_hits"] == {name: 5 - chunk["cache_misses"][name] for name in STORES}

    summary = report["summary"]
    assert summary["steady_chunks"] == [5, 6, 7]
    total = sorted(report["chunks"][i]["total_ms"] for i in (5, 6, 7))[1]
    assert summary["total_ms"]["p50"] == pytest.approx(total)
    assert summary["first_chunk_ms"] == report["chunks"][0]["time_to_chunk_ms"]
    assert summary["frames_per_second"] == pytest.approx(12e3 / total)
    sizes = summary["cache_bytes"]
    assert sizes["kv_cache"] == 3 * 2 * 72 * 128 * 4  # layers, K and V, slots, dim, bytes
    assert sizes["camera_modulation"] == 3 * 2 * 12 * 128 * 4
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    assert summary["peak_memory_bytes"] > 10**7
    memory = summary["memory"]
    assert [memory[name] for name in ("weights_bytes", "first_chunk_bytes", "steady_chunk_bytes")] == [None] * 3
    assert memory["planned"]["weights"] == 4 * report["model"]["parameters"]
    assert {name: memory["planned"][name] for name in sizes if name != "total"} == {
        name: size for name, size in sizes.items() if name != "total"
    }
    cameras = sorted(chunk["camera_ms"] for chunk in report["chunks"][5:])
    assert cameras[0] > 0 and summary["camera_ms"]["p50"] == pytest.approx(cameras[1])
    assert all(chunk["camera_ms"] < chunk["denoise_ms"][0] for chunk in report["chunks"])
    for words in (
        "to chunk",
        "first chunk",
        "steady chunk",
        "frames a second",
        "kv_cache",
        "by cpu",
        "windowed_attention",
        "ms of step 0",
    ):
        assert words in result.stdout
    assert "random weights" in result.stderr and "the prompt is noise" in result.stderr


def test_latents_are_the_stage_s(invoke, tmp_path):
    """The command gives what the same inputs give through the public API; the prompt's file and the path are used."""
    torch.manual_seed(3)
    prompt = torch.randn(5, 64)
    save_file({"other": torch.zeros(1), "prompt_embeds": prompt}, tmp_path / "prompt.safetensors")
    path = example_trajectory(9)
    poses = np.repeat(path.poses, 4, axis=0)[:33]  # one per pixel frame
    dense = CameraTrajectory(poses, path.intrinsics[0])
    np.save(tmp_path / "poses.npy", dense.poses)
    np.save(tmp_path / "intrinsics.npy", dense.intrinsics)
    given = ("--poses", "poses.npy", "--intrinsics", "intrinsics.npy", "--prompt-embeds", "prompt.safetensors")
    invoke("rollout", *SMALL, "--chunks", 3, "--seed", 5, *given, "--save-latents", "latents.safetensors")
    latents = load_file(tmp_path / "latents.safetensors")["latents"]

    torch.manual_seed(5)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny"))
    generator = torch.Generator().manual_seed(5)
    camera = CameraTrajectory.from_pixel_frames(dense.poses, dense.intrinsics).embedding(32, 32)
    stage, state, start = CausalDenoisingStage(model), RealtimeCausalDiTState(), 0
    for index in range(3):
        noise = torch.randn(1, 16, 3, 4, 4, generator=generator)
        renoise = torch.randn(3, 1, 16, 3, 4, 4, generator=generator)
        rays = camera[:, :, start : start + 3]
        chunk = stage.denoise_chunk(state, noise, text=prompt[None], camera=rays, renoise=renoise)
        torch.testing.assert_close(latents[:, :, start : start + 3], chunk, rtol=0, atol=1e-6, msg=f"chunk {index}")
        start += 3
    assert latents.shape == (1, 16, 9, 4, 4)


def latents_of(invoke, tmp_path, *arguments):
    invoke("rollout", *SMALL, "--chunks", 2, "--save-latents", "latents.npy", *arguments)
    return np.load(tmp_path / "latents.npy")


def test_options_change_what_they_should(invoke, tmp_path):
    plain = latents_of(invoke, tmp_path)
    same = (("--no-camera-cache",), ("--seed", 0), ("--timesteps", "1000,750,500,250"), ("--no-cuda-graphs",))
    other = (
        ("--seed", 1), ("--no-camera",), ("--actions", "w*3,l*3"), ("--schedule", "official"), ("--shift", 10),
        ("--timesteps", "1000,500"), ("--camera-scale", 0.5), ("--frames-per-chunk", 2), ("--dtype", "bfloat16"),
        ("--window-frames", 4, "--sink-frames", 1),
    )  # fmt: skip
    for arguments in same:
        np.testing.assert_array_equal(latents_of(invoke, tmp_path, *arguments), plain, err_msg=str(arguments))
    for arguments in other:
        changed = latents_of(invoke, tmp_path, *arguments)
        assert changed.shape != plain.shape or np.abs(changed - plain).max() > 1e-4, arguments


def test_a_checkpoint_gives_what_its_weights_give(invoke, tmp_path):
    torch.manual_seed(0)
    CausalLingBotTransformer(LingBotConfig.preset("tiny")).save_pretrained(tmp_path / "checkpoint")
    plain = latents_of(invoke, tmp_path)
    loaded = latents_of(invoke, tmp_path, "--checkpoint", "checkpoint", "--dtype", "float32")
    np.testing.assert_array_equal(loaded, plain)


def test_a_short_path_is_said_to_end(invoke, tmp_path):
    np.save(tmp_path / "poses.npy", example_trajectory(9).poses)
    result = invoke("rollout", *SMALL, "--chunks", 2, "--poses", "poses.npy")
    assert "the camera path has 3 latent frames of 6" in result.stderr
    quiet = invoke("rollout", *SMALL, "--chunks", 2, "--poses", "poses.npy", "--quiet")
    assert quiet.stderr == ""


def test_latents_that_are_not_finite_fail(invoke, tmp_path):
    torch.manual_seed(0)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny"))
    with torch.no_grad():
        model.head.head.bias.fill_(math.nan)
    model.save_pretrained(tmp_path / "checkpoint")
    result = invoke("rollout", *SMALL, "--chunks", 1, "--checkpoint", "checkpoint", code=1)
    assert "chunk 0 are not finite" in result.output


def test_the_plot_is_a_png_for_few_chunks_and_many(invoke, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    from lingbot_kernels.benchmarks import plots

    report, _ = report_of(invoke, tmp_path, "--chunks", 2, "--plot", "rollout.png")
    png = (tmp_path / "rollout.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 5000
    report["chunks"] = [{**report["chunks"][1], "index": i} for i in range(300)]
    plots.latency_per_chunk(report, tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes()[:8] == png[:8]
    with (tmp_path / "folded.txt").open("w") as file:
        tables.print_rollout(Console(file=file, width=150), report)
    text = (tmp_path / "folded.txt").read_text()
    assert "\n..." in text and "\n299 " in text and "\n150 " not in text


def test_the_backend_is_the_option_s_then_the_environment_s(invoke, tmp_path, monkeypatch):
    def backend(*arguments):
        report, _ = report_of(invoke, tmp_path, "--chunks", 1, *arguments)
        return report["settings"]["backend"], report["summary"]["backends"]["windowed_attention"]

    assert backend() == ("auto", "sdpa")
    assert backend("--backend", "reference") == ("reference", "reference")
    monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", "reference")
    assert backend() == ("reference", "reference")
    assert backend("--backend", "auto") == ("auto", "sdpa")
    monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", "cuda")
    assert "LINGBOT_KERNELS_BACKEND: rope_cos_sin" in invoke("rollout", *SMALL, code=2).output
    monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", "cudda")
    assert "LINGBOT_KERNELS_BACKEND" in invoke("bench", "caching", *SMALL, code=2).output


class Watch(TorchDispatchMode):
    """Notes the backend that each registered op is really called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lingbot_kernels":
            names = [argument.name for argument in func._schema.arguments]
            chosen = args[names.index("library" if "library" in names else "backend")]
            self.seen.setdefault(func._schema.name.split("::")[1], set()).add(chosen)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_backends_reported_are_those_that_ran(backend, dtype):
    cfg = LingBotConfig.preset("tiny")
    stage = CausalDenoisingStage(CausalLingBotTransformer(cfg, dtype=dtype))
    noise = torch.randn(1, 16, 3, 4, 4)
    text, camera = torch.randn(1, 4, 64), torch.randn(1, 384, 3, 4, 4)
    with ops.use_backend(backend), Watch() as watch:
        stage.denoise_chunk(RealtimeCausalDiTState(), noise, text=text, camera=camera)
        expected = backends.serving(cfg, "cpu", dtype, 12)
    assert expected.pop("linear_gelu") == ("reference" if backend == "reference" else "torch")
    assert {op: {name} for op, name in expected.items()} == watch.seen


def test_the_progress_bar_is_drawn_on_terminals_only(invoke, monkeypatch):
    from lingbot_kernels.commands import _outputs

    shown = []
    monkeypatch.setattr("rich.progress.Progress", progress_that_notes(shown))
    for quiet, terminal in ((False, True), (True, True), (False, False)):
        monkeypatch.setattr(_outputs, "sys", SimpleNamespace(stderr=Terminal(terminal)))
        invoke("rollout", *SMALL, "--chunks", 1, *(["--quiet"] if quiet else []))
    assert shown == [False, True, True]


class Terminal:
    def __init__(self, terminal: bool) -> None:
        self.isatty = lambda: terminal


def progress_that_notes(disabled):
    from rich.progress import Progress

    class Noted(Progress):
        def __init__(self, *columns, disable, **options):
            disabled.append(disable)
            super().__init__(*columns, disable=True, **options)

    return Noted


def test_the_timer_on_a_made_clock(monkeypatch):
    ticks: Iterator[float] = iter([0.0, 0.001, 0.002, 0.012, 0.013, 0.033, 0.034, 0.040, 0.070])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    timer = ChunkTimer(torch.device("cpu"))
    timer.start()
    timer.inputs_ready()
    for step in range(2):
        with timer.observe("denoise", step):
            pass
    timer.chunk_ready()
    with timer.observe("context", -1):
        pass
    monkeypatch.setattr("time.perf_counter", lambda: 0.080)
    times = timer.stop()
    assert times.inputs == pytest.approx(1) and times.denoise == pytest.approx((10, 20))
    assert (times.context, times.to_chunk, times.total) == pytest.approx((30, 34, 80))


def test_the_timer_finds_the_camera_within_the_first_step(monkeypatch):
    ticks: Iterator[float] = iter([0.0, 0.001, 0.002, 0.004, 0.007, 0.012, 0.013, 0.020, 0.021, 0.025, 0.030])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    timer, state = ChunkTimer(torch.device("cpu")), RealtimeCausalDiTState()
    timer.watch(state)
    timer.start()
    timer.inputs_ready()
    for step in range(2):
        with timer.observe("denoise", step):
            state.runtime_cache["camera_modulation"].get_or_compute("camera", lambda: 1)
    timer.chunk_ready()
    with timer.observe("context", -1):
        pass
    monkeypatch.setattr("time.perf_counter", lambda: 0.040)
    times = timer.stop()
    assert times.denoise == pytest.approx((10, 7)) and times.camera == pytest.approx(3)
    off = RealtimeCausalDiTState(camera_cache=False)
    timer.watch(off)
    off.runtime_cache["camera_modulation"].get_or_compute("camera", lambda: 1)
    assert len(timer._marks) == 12  # nothing is noted of what each forward computes for itself


def test_without_a_camera_or_its_cache_there_is_no_camera_time(invoke, tmp_path):
    for argument in ("--no-camera", "--no-camera-cache"):
        report, result = report_of(invoke, tmp_path, "--chunks", 2, argument)
        assert report["summary"]["camera_ms"] is None and "ms of step 0" not in result.stdout
        assert "camera_modulation" not in report["summary"]["memory"]["planned"]


def test_a_gpu_s_memory_is_shown_by_phase(invoke, tmp_path):
    report, result = report_of(invoke, tmp_path, "--chunks", 2)
    assert "planned memory" not in result.stdout
    report["summary"]["memory"] |= {"weights_bytes": 10**9, "first_chunk_bytes": 2 * 10**9, "steady_chunk_bytes": 3e9}
    with (tmp_path / "gpu.txt").open("w") as file:
        tables.print_rollout(Console(file=file, width=200), report)
    text = (tmp_path / "gpu.txt").read_text()
    assert "weights 1.0 GB, first chunk 2.0 GB, steady chunk 3.0 GB" in text
    assert "planned memory" in text and "forward" in text


def test_what_can_not_fit_is_said_in_a_line(invoke, monkeypatch):
    monkeypatch.setattr("lingbot_kernels.realtime.memory.free_bytes", lambda device: 10**8)
    result = invoke("rollout", "--preset", "lingbot-world-14b", "--device", "cpu", code=1)
    assert result.output.startswith("Error: weights: needs 69.08 GiB on cpu (weights 69.08), must be at most the 0.09")


def test_steady_chunks():
    none = [0] * 6
    assert steady([False, False, True, True], none) == [2, 3]
    assert steady([True, True, True], none) == [1, 2]
    assert steady([False, False, False], none) == [1, 2]
    assert steady([True], none) == [0]
    assert steady([False, True, True, True, True], [0, 1, 1, 0, 0]) == [3, 4]
    assert steady([False, True, True], [0, 0, 1]) == [1, 2]


def test_percentiles():
    assert percentiles([4.0]) == {"p20": 4, "p50": 4, "p80": 4}
    assert percentiles([float(i) for i in range(11)]) == pytest.approx({"p20": 2, "p50": 5, "p80": 8})
