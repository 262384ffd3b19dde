"""What the ranks run: rollouts of a small model, on one rank where no process group shares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    Int8Recipe,
    LingBotConfig,
    RealtimeCausalDiTState,
)
from lingbot_kernels.quantization import PRODUCTS

SMALL = {
    "dim": 192, "num_heads": 12, "num_layers": 2, "ffn_dim": 256, "text_dim": 32, "text_len": 8, "freq_dim": 32,
    "frames_per_chunk": 3, "window_frames": 8, "sink_frames": 1, "residual_dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A rollout. `grid`: rows and columns of latents; 2 x 2 make a token."""

    grid: tuple[int, int] = (6, 10)  # 45 tokens per chunk: 23 + 22; 15 each; 12 + 3 x 11
    chunks: int = 6
    batch: int = 1
    camera: bool = True
    prompts: tuple[int, ...] = (0,)  # seeds; the prompt changes after every second chunk
    overrides: tuple[tuple[str, Any], ...] = ()
    recipe: Int8Recipe | None = None


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> CausalLingBotTransformer:
    torch.manual_seed(seed)
    model = CausalLingBotTransformer(LingBotConfig(**{**SMALL, **overrides}), dtype=torch.float64)
    return model.to(dtype)


def small_int8_qk_model(ranks: int = 2, seed: int = 0) -> CausalLingBotTransformer:
    """With Q and K in int8 too, and heads of 64 for so many ranks: four for two, one for each of more."""
    heads = 4 if ranks == 2 else ranks
    model = small_model(torch.bfloat16, seed, dim=64 * heads, num_heads=heads, residual_dtype="bfloat16")
    model.quantize(Int8Recipe(products=PRODUCTS, attention="int8_qk"))
    return model


def session(model: CausalLingBotTransformer, case: Case, seed: int, state: RealtimeCausalDiTState) -> Any:
    """The chunks of one session, one at a time; the same for the same seed whatever the model's dtype."""
    cfg, dtype = model.config, torch.promote_types(model.dtype, torch.float32)

    def normal(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.float32).to(dtype)

    texts = [normal(900 + prompt, case.batch, 5, cfg.text_dim) for prompt in case.prompts]
    shape = (case.batch, cfg.out_channels, 3, *case.grid)
    stage = CausalDenoisingStage(model, timesteps=(1000, 500))
    return stage.rollout(
        state,
        case.chunks,
        text=lambda i: texts[i // 2 % len(texts)],
        noise=lambda i: normal(seed * 100 + i, *shape),
        renoise=lambda i: normal(seed * 100 + 50 + i, 1, *shape),
        camera=(lambda i: normal(seed * 100 + 70 + i, case.batch, 384, 3, *case.grid)) if case.camera else None,
    )


def rollout(case: Case, dtype: torch.dtype, sharded: bool, seeds: tuple[int, ...] = (1,)) -> list[Tensor]:
    """The chunks of interleaved sessions, one after another, and then each session's keys and values, of this rank's
    heads.
    """
    model = small_model(dtype, **dict(case.overrides))
    if case.recipe is not None:
        model.quantize(case.recipe)
    if sharded:
        model.shard_sequence()
    states = [RealtimeCausalDiTState() for _ in seeds]
    sessions = [session(model, case, seed, state) for seed, state in zip(seeds, states, strict=True)]
    chunks = [chunk for together in zip(*sessions, strict=True) for chunk in together]
    for state in states:
        assert state.kv_cache is not None
        chunks += [torch.stack(layer) for layer in state.kv_cache.layers]
    return chunks
