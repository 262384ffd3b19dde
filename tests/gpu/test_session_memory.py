"""The memory plan on a GPU: an upper bound that is not far off, and a refusal before anything is allocated."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.realtime.memory import GIB, NotEnoughMemory, session_memory, weights_memory

SIZE, GRID = (58, 104), (29, 52)
CONFIG = LingBotConfig.preset("tiny", dim=1024, num_heads=8, num_layers=4, ffn_dim=4096)


def rollout(state: RealtimeCausalDiTState, model: CausalLingBotTransformer, chunks: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    text = torch.randn(1, 16, model.config.text_dim, device="cuda", generator=generator)
    for _ in CausalDenoisingStage(model).rollout(
        state, chunks, text=text, latent_size=SIZE, generator=generator,
        camera=lambda _: torch.randn(1, 384, 3, *SIZE, device="cuda", generator=generator),
    ):  # fmt: skip
        pass
    torch.cuda.synchronize()


@pytest.fixture
def model() -> CausalLingBotTransformer:
    return CausalLingBotTransformer(CONFIG, device="cuda", dtype=torch.bfloat16)


def settle() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("camera_cache", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_the_plan_bounds_what_a_session_takes(
    model: CausalLingBotTransformer, graphs: bool, camera_cache: bool
) -> None:
    model.cuda_graphs = graphs
    state = RealtimeCausalDiTState(camera_cache=camera_cache)
    rollout(RealtimeCausalDiTState(), model, 1)  # libraries take their workspaces
    settle()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    rollout(state, model, 9)
    plan = session_memory(CONFIG, GRID, torch.bfloat16, cuda_graphs=graphs, **state.switches)
    peak = torch.cuda.max_memory_allocated() - allocated
    assert state.nbytes() < peak <= plan.total, f"peak {peak / GIB:.3f} GiB, planned {plan}"
    kept = torch.cuda.memory_reserved() - reserved
    assert kept <= 1.2 * plan.total, f"kept by the allocator {kept / GIB:.3f} GiB, planned {plan}"
    stats = state.stats()
    for name in ("kv_cache", "camera_modulation", "text", "time_embeddings", "rope"):
        assert getattr(plan, name) == stats[name]["bytes"], name


def test_a_session_that_can_not_fit_is_refused_before_it_allocates(
    model: CausalLingBotTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    state, before = RealtimeCausalDiTState(), torch.cuda.memory_allocated()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**28, 2**36))
        with pytest.raises(NotEnoughMemory, match=r"session: needs .* on cuda:0 \(kv_cache .*camera_cache=False"):
            rollout(state, model, 1)
    gc.collect()
    assert torch.cuda.max_memory_allocated() - before < 2**27  # the inputs alone
    assert state.kv_cache is None and state.nbytes() == 0
    rollout(state, model, 1)
    assert state.nbytes() > 0


def test_a_window_larger_than_the_gpu_is_refused(model: CausalLingBotTransformer) -> None:
    total = torch.cuda.mem_get_info()[1]
    frame = session_memory(CONFIG, GRID, torch.bfloat16).kv_cache // CONFIG.window_frames
    model.config = dataclasses.replace(CONFIG, window_frames=total // frame + 1)
    before = torch.cuda.memory_allocated()
    with pytest.raises(NotEnoughMemory, match="each frame less in window_frames"):
        rollout(RealtimeCausalDiTState(), model, 1)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**27


def test_weights_that_can_not_fit_are_refused_before_they_are_allocated(
    tmp_path: Path, model: CausalLingBotTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    settle()
    before = torch.cuda.memory_allocated()
    kept = torch.cuda.memory_reserved() - before
    size = weights_memory(CONFIG, torch.bfloat16).total
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "mem_get_info", lambda device=None: (max(size - kept - 1, 0), 2**36))
        for make in (
            lambda: CausalLingBotTransformer.from_pretrained(tmp_path, device="cuda"),
            lambda: CausalLingBotTransformer(CONFIG, device="cuda", dtype=torch.bfloat16),
        ):
            with pytest.raises(NotEnoughMemory, match=r"weights: needs .* on cuda"):
                make()
    assert torch.cuda.max_memory_allocated() == before
    loaded = CausalLingBotTransformer.from_pretrained(tmp_path, device="cuda")
    assert loaded.device.type == "cuda"
