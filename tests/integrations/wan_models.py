"""Random, tiny `WanTransformer3DModel`s and their inputs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

HEADS, HEAD_DIM, CHANNELS, TEXT = 2, 12, 4, 16


def make(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = dict(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT, freq_dim=32, ffn_dim=40, num_layers=3, cross_attn_norm=True,
        rope_max_seq_len=64,
    )  # fmt: skip
    model = diffusers.WanTransformer3DModel(**(settings | changes)).eval()
    with torch.no_grad():  # norms start at one, and one is no test of a weight
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return model


def inputs(batch: int = 2, frames: int = 3, size: tuple[int, int] = (8, 12), seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, *size, generator=generator),
        "timestep": torch.tensor([500, 30, 999][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT, generator=generator),
    }


def to(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in values.items()}


@torch.no_grad()
def run(model: Any, values: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**values, **more, return_dict=False)[0]


def error(x: Tensor, oracle: Tensor) -> float:
    return float((x.double() - oracle.double()).norm() / oracle.double().norm())
