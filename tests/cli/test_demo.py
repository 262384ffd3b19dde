"""The demo, and the plain network that it compares with."""

from __future__ import annotations

import json

import pytest
import torch

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState, demo
from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.commands import session
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

pytest.importorskip("matplotlib", reason="the demo draws a plot")


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "TINY_SIZE", (32, 32))
    monkeypatch.setattr(session, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)


def test_demo_leaves_a_report_and_a_plot(small, tmp_path, capsys):
    assert demo.main() == 0
    report = json.loads((tmp_path / "rollout.json").read_text())
    errors = [chunk["relative_error"] for chunk in report["chunks"]]
    assert len(errors) == 8 and 0 < max(errors) <= 1e-5
    assert (tmp_path / "rollout.png").read_bytes()[:4] == b"\x89PNG"
    assert "within 1e-05" in capsys.readouterr().out


def test_demo_in_int8_says_what_it_allows(small, tmp_path, capsys):
    assert demo.main(["--precision", "int8"]) == 0
    report = json.loads((tmp_path / "rollout.json").read_text())
    assert report["settings"]["precision"] == "int8" and "int8_linear" in report["summary"]["backends"]
    assert 1e-4 < max(chunk["relative_error"] for chunk in report["chunks"]) <= 0.02
    assert "within 2e-02" in capsys.readouterr().out


def test_demo_fails_where_the_ring_is_wrong(small, monkeypatch, capsys):
    """A session that never updates its context differs from the plain network by more than rounding."""
    monkeypatch.setattr(CausalDenoisingStage, "update_context", lambda *_, **__: None)
    assert demo.main() == 1
    assert "NOT within" in capsys.readouterr().out


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize(("window", "sink", "frames"), [(6, 3, 3), (7, 2, 3), (4, 0, 3)])
def test_plain_network_agrees_in_float64(camera, window, sink, frames):
    """With odd grids, batch 2, a window that a chunk does not divide, and eviction."""
    cfg = LingBotConfig.preset(
        "tiny", window_frames=window, sink_frames=sink, frames_per_chunk=frames, num_layers=2, camera=camera
    )
    torch.manual_seed(1)
    model = CausalLingBotTransformer(cfg, dtype=torch.float64)
    stage, state = CausalDenoisingStage(model, timesteps=(1000, 500)), RealtimeCausalDiTState()
    plain = PlainLingBotWorld(cfg, model.state_dict())
    text, context = torch.randn(2, 7, 64, dtype=torch.float64), None
    for index in range(4):
        noise = torch.randn(2, 16, frames, 4, 6, dtype=torch.float64)
        renoise = torch.randn(1, *noise.shape, dtype=torch.float64)
        rays = torch.randn(2, 384, frames, 4, 6, dtype=torch.float64) if camera else None
        start = 1000 + index * frames
        ours = stage.denoise_chunk(state, noise, text=text, camera=rays, renoise=renoise, start_frame=start)
        expected, context = plain.denoise_chunk(stage.schedule, noise, renoise, text, start, rays, context)
        # The model's RoPE table is float32, by contract; everything else is float64.
        assert relative_error(ours, expected) < 1e-6
    assert context[0][0].shape[1] == window * 6


def test_plain_network_in_bfloat16_rounds_like_bfloat16():
    cfg = LingBotConfig.preset("tiny", num_layers=2)
    torch.manual_seed(2)
    weights = CausalLingBotTransformer(cfg, dtype=torch.bfloat16).state_dict()
    inputs = torch.randn(1, 36, 3, 4, 4), torch.randn(1, 7, 64), 937.5, 0, torch.randn(1, 384, 3, 4, 4)
    exact, _ = PlainLingBotWorld(cfg, weights, torch.float64).forward(*inputs)
    rounded, _ = PlainLingBotWorld(cfg, weights).forward(*inputs)
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative_error(rounded, exact) < 3e-2
