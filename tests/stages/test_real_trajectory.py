"""The rollout along the published camera trajectory, against the plain network in float64."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.models.camera import CameraTrajectory
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld

CHUNKS, HEIGHT, WIDTH = 7, 96, 160


def example_folder() -> Path:
    roots = [Path(os.environ["LINGBOT_KERNELS_SHARED"])] if "LINGBOT_KERNELS_SHARED" in os.environ else []
    roots += [parent / "shared" for parent in Path(__file__).resolve().parents]
    for root in roots:
        if (root / "data/lingbot_example_00/poses.npy").is_file():
            return root / "data/lingbot_example_00"
    pytest.skip("no shared/data/lingbot_example_00 above this checkout, nor under LINGBOT_KERNELS_SHARED")


def test_rollout_on_the_real_trajectory() -> None:
    folder = example_folder()
    torch.manual_seed(0)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny"))
    frames = model.config.frames_per_chunk
    trajectory = CameraTrajectory.from_files(folder / "poses.npy", folder / "intrinsics.npy")
    longer = np.minimum(np.arange(CHUNKS * frames), len(trajectory) - 1)  # at its end the camera stands still
    trajectory = CameraTrajectory(trajectory.poses[longer], trajectory.intrinsics[longer])
    cameras = list(trajectory.chunks(HEIGHT, WIDTH, frames, scale=trajectory.scale))
    assert len(cameras) == CHUNKS
    text = torch.randn(1, 7, model.config.text_dim)
    noise = torch.randn(CHUNKS, 4, 1, model.config.out_channels, frames, HEIGHT // 8, WIDTH // 8)
    stage, state = CausalDenoisingStage(model), RealtimeCausalDiTState()
    plain = PlainLingBotWorld(model.config, model.state_dict(), torch.float64)
    context = None
    for i, camera in enumerate(cameras):
        got = stage.denoise_chunk(state, noise[i, 0], text=text, camera=camera, renoise=noise[i, 1:])
        wide = noise[i].double()
        exact, context = plain.denoise_chunk(
            stage.schedule, wide[0], wide[1:], text.double(), i * frames, camera.double(), context
        )
        assert float((got - exact).norm() / exact.norm()) <= 1e-5
    assert state.stats()["visible_tokens"] == state.stats()["capacity_tokens"]  # the window is full: chunks left it
