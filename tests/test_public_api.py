"""The names that other programs are written against."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lingbot_kernels
from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.models.lingbot_world import CausalLingBotSelfAttention, LingBotTransformerBlock


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lingbot_kernels, lingbot_kernels.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves_and_unknown_ones_do_not() -> None:
    for name in lingbot_kernels.__all__:
        assert getattr(lingbot_kernels, name) is not None and name in dir(lingbot_kernels)
    with pytest.raises(AttributeError, match="module 'lingbot_kernels' has no attribute 'Causal'"):
        _ = lingbot_kernels.Causal  # type: ignore[attr-defined]


def test_signatures() -> None:
    def parameters(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert parameters(CausalLingBotTransformer.forward) == [
        "self", "latents", "text", "timestep", "state", "start_frame", "camera", "step_index", "update_cache_only",
    ]  # fmt: skip
    for module in (CausalLingBotSelfAttention, LingBotTransformerBlock):
        assert "update_cache_only" in parameters(module.forward)
    for name in ("_prepare_cached_rope_for_sequence_shard", "_prepare_cached_time_embeddings"):
        assert callable(getattr(CausalLingBotTransformer, name))
    assert callable(CausalDenoisingStage._update_causal_context_cache)
    assert {"noise", "condition", "text", "camera", "renoise", "generator", "update_context"} <= set(
        parameters(CausalDenoisingStage.denoise_chunk)
    )
    state = RealtimeCausalDiTState()
    assert set(state.runtime_cache) == {"rope", "time_embeddings", "camera_modulation", "text"}
    assert (state.kv_cache, state.crossattn_cache, state.nbytes()) == (None, None, 0)
    state.dispose()
