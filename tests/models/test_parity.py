"""Rollouts against the independent float64 formulation: windows, sinks, schedules, cameras, dtypes and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import Inputs, make_inputs, make_model, small_config
from oracle import Oracle, Session, Steps, denoise_chunk, relative_error
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, LingBotConfig, RealtimeCausalDiTState, use_backend

CONTINUOUS = Steps.continuous((1000, 750, 500, 250), 5.0)
BACKENDS = ("cpu", "reference")


def oracle_rollout(
    oracle: Oracle, inputs: Inputs, steps: Steps = CONTINUOUS, camera: bool = True, start_frame: int = 0
) -> list[Tensor]:
    session = Session()
    frames = oracle.cfg.frames_per_chunk
    return [
        denoise_chunk(
            oracle, session, steps, noise, inputs.renoise[i], inputs.text, start_frame + i * frames,
            inputs.condition[i], inputs.camera[i] if camera else None,
        )
        for i, noise in enumerate(inputs.noise)
    ]  # fmt: skip


def package_rollout(
    stage: CausalDenoisingStage, inputs: Inputs, camera: bool = True, start_frame: int | None = None
) -> list[Tensor]:
    state = RealtimeCausalDiTState()
    return [
        stage.denoise_chunk(state, noise, **inputs.chunk(i, camera), start_frame=start_frame if i == 0 else None)
        for i, noise in enumerate(inputs.noise)
    ]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


# (overrides, latent size, chunks): enough chunks to fill the window and to evict in each of them.
WINDOWS: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "18/9/3": ({"window_frames": 18, "sink_frames": 9, "frames_per_chunk": 3}, (4, 6), 10),
    "15+3/3/3": ({"window_frames": 18, "sink_frames": 3, "frames_per_chunk": 3}, (4, 6), 9),
    "18/6/4": ({"window_frames": 18, "sink_frames": 6, "frames_per_chunk": 4}, (2, 4), 8),  # a chunk leaves in part
    "wraps": ({"window_frames": 8, "sink_frames": 1, "frames_per_chunk": 3}, (4, 4), 7),  # 3 does not divide 7
    "no sink": ({"window_frames": 7, "sink_frames": 0, "frames_per_chunk": 3}, (2, 6), 6),
    "whole turn": ({"window_frames": 5, "sink_frames": 2, "frames_per_chunk": 3}, (4, 2), 6),  # chunk = capacity - sink
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_float32_rollout_equals_the_float64_formulation(window: str, backend: str) -> None:
    overrides, size, chunks = WINDOWS[window]
    cfg = small_config(**overrides)
    model, inputs = make_model(cfg), make_inputs(cfg, chunks, size)
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs)
    with use_backend(backend):
        got = package_rollout(CausalDenoisingStage(model), inputs)
    assert worst(got, want) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_two_without_a_camera_and_an_odd_head(backend: str) -> None:
    cfg = small_config(dim=54, num_heads=3, window_frames=8, sink_frames=2)
    model, inputs = make_model(cfg), make_inputs(cfg, 6, batch=2)
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs, camera=False)
    with use_backend(backend):
        got = package_rollout(CausalDenoisingStage(model), inputs, camera=False)
    assert worst(got, want) <= 1e-5
    assert relative_error(got[-1][0], want[-1][1]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_two_with_a_camera_each(backend: str) -> None:
    cfg = small_config(window_frames=8, sink_frames=2)
    model, inputs = make_model(cfg), make_inputs(cfg, 6, batch=2)
    oracle = Oracle(cfg, model.state_dict())
    want = oracle_rollout(oracle, inputs)
    with use_backend(backend):
        got = package_rollout(CausalDenoisingStage(model), inputs)
    assert worst(got, want) <= 1e-5
    assert worst(oracle_rollout(oracle, inputs, camera=False), want) > 0.1


def test_a_model_without_camera_layers() -> None:
    cfg = small_config(camera=False, window_frames=8)
    model, inputs = make_model(cfg), make_inputs(cfg, 6)
    assert not any("cam" in name or "c2ws" in name for name in model.state_dict())
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs, camera=False)
    assert worst(package_rollout(CausalDenoisingStage(model), inputs, camera=False), want) <= 1e-5


def test_the_tiny_preset() -> None:
    cfg = LingBotConfig.preset("tiny", residual_dtype="float32")
    model, inputs = make_model(cfg), make_inputs(cfg, 2, (8, 8))
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs)
    assert worst(package_rollout(CausalDenoisingStage(model), inputs), want) <= 1e-5


def test_float64_model_errs_by_the_float32_rope_table_alone() -> None:
    cfg = small_config(window_frames=8, sink_frames=2)
    model, inputs = make_model(cfg, torch.float64), make_inputs(cfg, 6)
    inputs.noise = [noise.double() for noise in inputs.noise]
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs)
    got = package_rollout(CausalDenoisingStage(model), inputs)
    assert got[0].dtype == torch.float64
    assert worst(got, want) <= 1e-6


SCHEDULES: dict[str, tuple[dict[str, Any], Steps]] = {
    "continuous": ({}, CONTINUOUS),
    "official": ({"schedule": "official"}, Steps.official((1000, 750, 500, 250), 5.0)),
    "first generation": (
        {"timesteps": (1000, 821, 642, 321), "shift": 10.0},
        Steps.continuous((1000, 821, 642, 321), 10.0),
    ),
    "first generation, official": (
        {"timesteps": (1000, 821, 642, 321), "shift": 10.0, "schedule": "official"},
        Steps.official((1000, 821, 642, 321), 10.0),
    ),
    "explicit": (
        {"timesteps": (990.5, 431.25), "sigmas": (0.97, 0.4), "noise_sigmas": (0.45,)},
        Steps((990.5, 431.25), (0.97, 0.4), (0.45,)),
    ),
    "explicit, one noise": (
        {"timesteps": (990.5, 700.0, 431.25), "sigmas": (0.97, 0.8, 0.4)},
        Steps((990.5, 700.0, 431.25), (0.97, 0.8, 0.4), (0.8, 0.4)),
    ),
    "one step": ({"timesteps": (1000,)}, Steps((1000.0,), (1.0,), ())),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    arguments, steps = SCHEDULES[schedule]
    cfg = small_config(window_frames=7, sink_frames=2)
    model, inputs = make_model(cfg), make_inputs(cfg, 6, (4, 4), steps=len(steps.times))
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs, steps)
    assert worst(package_rollout(CausalDenoisingStage(model, **arguments), inputs), want) <= 1e-5


@pytest.mark.parametrize("start_frame", [5, 1_000_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_shift_of_every_frame_changes_nothing_beyond_rounding(start_frame: int, backend: str) -> None:
    cfg = small_config(window_frames=8, sink_frames=2)
    model, inputs = make_model(cfg), make_inputs(cfg, 6)
    want = oracle_rollout(Oracle(cfg, model.state_dict()), inputs)
    stage = CausalDenoisingStage(model)
    with use_backend(backend):
        got = package_rollout(stage, inputs, start_frame=start_frame)
        assert worst(got, want) <= 1e-5
        assert worst(got, package_rollout(stage, inputs)) <= 1e-5


def test_the_oracle_itself_ignores_a_shift_and_depends_on_the_sink() -> None:
    cfg = small_config(window_frames=8, sink_frames=2)
    weights, inputs = make_model(cfg).state_dict(), make_inputs(cfg, 6, (2, 4))
    want = oracle_rollout(Oracle(cfg, weights), inputs)
    assert worst(oracle_rollout(Oracle(cfg, weights), inputs, start_frame=77), want) <= 1e-12
    no_sink = oracle_rollout(Oracle(small_config(window_frames=8, sink_frames=0), weights), inputs)
    shorter = oracle_rollout(Oracle(small_config(window_frames=7, sink_frames=2), weights), inputs)
    assert relative_error(no_sink[-1], want[-1]) > 1e-3 and relative_error(shorter[-1], want[-1]) > 1e-3


def rollout_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return relative_error(torch.cat(list(got)), torch.cat(list(want)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["bfloat16", "float32"])
def test_bfloat16_errs_at_most_a_quarter_more_than_the_plain_formulation(residual: str, backend: str) -> None:
    cfg: LingBotConfig = small_config(dim=128, ffn_dim=256, window_frames=9, sink_frames=2, residual_dtype=residual)
    got, plain, want = [], [], []
    for seed in range(3):
        model, inputs = make_model(cfg, torch.bfloat16, seed), make_inputs(cfg, 6, (8, 8), seed=seed)
        weights = model.state_dict()
        want += oracle_rollout(Oracle(cfg, weights), inputs)
        plain += oracle_rollout(Oracle(cfg, weights, torch.bfloat16, getattr(torch, residual)), inputs)
        with use_backend(backend):
            got += package_rollout(CausalDenoisingStage(model), inputs)
    error, allowed = rollout_error(got, want), rollout_error(plain, want)
    print(f"bf16 {residual} {backend}: {error:.3e}, plain {allowed:.3e}, ratio {error / allowed:.3f}")
    assert 1e-4 < allowed < 0.1
    assert error <= 1.25 * allowed
