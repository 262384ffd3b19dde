from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from parts import diffusers_folder, official_folder

from lingbot_kernels.pipeline import LingBotWorldPipeline


@pytest.fixture(scope="session")
def diffusers_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_folder(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture(scope="session")
def official_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_folder(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def pipeline(diffusers_layout: Path) -> LingBotWorldPipeline:
    return LingBotWorldPipeline.from_pretrained(diffusers_layout, device="cpu")


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A smooth coloured picture of 100 x 60 pixels."""
    y, x = np.mgrid[0:60, 0:100]
    channels = (127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 2 * x + y / 2)
    return np.stack(channels, -1).astype(np.uint8)
