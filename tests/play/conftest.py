"""A tiny world with random weights, served in the test's own process."""

from __future__ import annotations

import pytest

for module in ("diffusers", "aiohttp", "PIL"):
    pytest.importorskip(module, reason="needs lingbot-kernels[play]")

from lingbot_kernels.pipeline import LingBotWorldPipeline  # noqa: E402


@pytest.fixture(scope="session")
def pipeline() -> LingBotWorldPipeline:
    return LingBotWorldPipeline.random("tiny", device="cpu", num_layers=1, dim=48, ffn_dim=64, window_frames=9)
