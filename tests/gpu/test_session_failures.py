"""On a GPU: chunks that fail while graphs are captured and replayed, and graphs that follow the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from failures import ERRORS, failing
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    use_backend,
)
from lingbot_kernels.models.lingbot_world import LingBotCrossAttention, LingBotTransformerBlock
from lingbot_kernels.realtime.graphs import SessionGraphs
from lingbot_kernels.realtime.runtime_cache import Store

GRID, CHUNKS = (16, 24), 9
CAMERA_NORMS = {"cuda": ("camera_norm_rows", "camera_norm_any"), "triton": ("gated_residual_camera_norm_kernel",)}


class Rollout:
    """A session whose window of 9 frames is full with its third chunk; the prompt changes before the sixth."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        config = LingBotConfig.preset("tiny", dim=256, num_heads=4, num_layers=2, window_frames=9)
        self.model = CausalLingBotTransformer(config, device="cuda", dtype=torch.bfloat16)
        self.stage = CausalDenoisingStage(self.model)
        self.state = RealtimeCausalDiTState()
        self.generator = torch.Generator("cuda").manual_seed(2)
        given = torch.Generator("cuda").manual_seed(3)
        self.texts = [torch.randn(1, 9, config.text_dim, device="cuda", generator=given) for _ in range(2)]
        self.cameras = [torch.randn(1, 384, 3, *GRID, device="cuda", generator=given) for _ in range(2)]
        self.index = 0

    def chunk(self, **changes: Any) -> Tensor:
        rollout = self.stage.rollout(
            self.state, 1, text=self.texts[self.index >= 5], camera=self.cameras[self.index % 2],
            generator=self.generator, latent_size=GRID, **changes,
        )  # fmt: skip
        chunk = next(rollout)
        self.index += 1
        return chunk


SEAMS: dict[str, tuple[Any, str]] = {
    "block": (LingBotTransformerBlock, "forward"),
    "replay": (SessionGraphs, "run"),
    "capture": (SessionGraphs, "_capture"),
    "cache": (Store, "get_or_compute"),
    "text": (LingBotCrossAttention, "project_text"),
    "camera": (LingBotTransformerBlock, "camera_modulation"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("nth", [0, 1, 3])
def test_chunks_that_fail_are_done_again_with_the_same_bits(seam: str, nth: int, after: bool) -> None:
    plain, failed, failures = Rollout(), Rollout(), 0
    for index in range(CHUNKS):
        want = plain.chunk()
        error = ERRORS[index % len(ERRORS)]
        before = failed.state.stats()
        try:
            with failing(*SEAMS[seam], nth, after, error):
                got = failed.chunk()
        except error as raised:
            assert "injected" in str(raised)
            assert failed.state.stats() == before
            failures += 1
            got = failed.chunk()
        assert torch.equal(got, want)
    for pair in zip(plain.state.kv_cache.layers, failed.state.kv_cache.layers, strict=True):  # type: ignore
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    assert plain.state.stats() == failed.state.stats()
    assert failures or (seam, nth) in (("capture", 3), ("text", 3), ("camera", 3), ("capture", 1))


def test_a_side_stream_s_update_that_fails_is_done_again() -> None:
    plain, failed, side = Rollout(), Rollout(), torch.cuda.Stream()
    for _ in range(5):
        plain.chunk(), failed.chunk(context_stream=side)
    with failing(SessionGraphs, "run", 4, True), pytest.raises(RuntimeError, match="injected"):
        failed.chunk(context_stream=side)
    for _ in range(3):
        assert torch.equal(failed.chunk(context_stream=side), plain.chunk())


def camera_norms(run: Callable[[], object]) -> dict[str, int]:
    """How many kernels of one op ran, by backend."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    return {
        backend: sum(any(kernel in name for kernel in kernels) for name in names)
        for backend, kernels in CAMERA_NORMS.items()
    }


@pytest.mark.parametrize("how", ["use_backend", "environment"])
def test_the_kernels_that_run_are_the_chosen_backend_s_also_after_a_capture(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk has four steps of two blocks, and a context update whose last block stops at its K/V write: 9 calls."""
    rollout = Rollout()
    for _ in range(4):
        rollout.chunk()
    for backend in ("cuda", "triton", "reference", "cuda"):
        if how == "environment":
            monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", backend)

        def chunk(backend: str = backend) -> None:
            if how == "environment":
                rollout.chunk()
                return
            with use_backend(backend):
                rollout.chunk()

        chunk()  # warms up, captures
        replays = rollout.state.graphs.replays
        assert camera_norms(chunk) == {name: 9 * (name == backend) for name in CAMERA_NORMS}
        assert rollout.state.graphs.replays == replays + 5
    assert rollout.state.graphs.captures == 2 * 4  # of auto, and of each backend once
