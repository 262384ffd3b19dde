"""Small models whose every part matters, random inputs, and bit-wise comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import CausalLingBotTransformer, Int8Recipe, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.quantization import PRODUCTS

_SMALL: dict[str, Any] = {
    "dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 24, "text_len": 7, "freq_dim": 16,
    "frames_per_chunk": 3, "window_frames": 18, "sink_frames": 3, "residual_dtype": "float32",
}  # fmt: skip


INT8 = Int8Recipe(products=PRODUCTS)  # the camera's as well
INT8_QK = Int8Recipe(products=PRODUCTS, attention="int8_qk")  # and self-attention's Q and K
# (dtype, residual dtype, recipe) of models whose bits may depend on nothing but their inputs.
NUMERICS = {
    "float32": (torch.float32, "float32", None),
    "bfloat16": (torch.bfloat16, "bfloat16", None),
    "bfloat16 in float32": (torch.bfloat16, "float32", None),
    "int8": (torch.bfloat16, "bfloat16", INT8),
    "int8 in float32": (torch.float32, "float32", INT8),
    "int8_qk": (torch.bfloat16, "bfloat16", INT8_QK),
}


def small_config(**overrides: Any) -> LingBotConfig:
    return LingBotConfig(**{**_SMALL, **overrides})


def heads_for(recipe: Int8Recipe | None) -> dict[str, int]:
    """What to change in a small configuration for this recipe: attention in int8 wants heads of 64."""
    return {"dim": 128} if recipe is not None and recipe.attention == "int8_qk" else {}


def make_model(
    cfg: LingBotConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    recipe: Int8Recipe | None = None,
) -> CausalLingBotTransformer:
    """A model with weights of a size at which every layer, norm, bias and modulation changes the output; quantised by
    `recipe` where given.
    """
    model = CausalLingBotTransformer(cfg or small_config(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            values = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * values)
            elif name.endswith("bias"):
                weight.copy_(0.1 * values)
            elif name.endswith("modulation"):
                weight.copy_(0.3 * values)
            else:
                weight.copy_(0.8 * values / weight[0].numel() ** 0.5)
    model = model.to(dtype)
    if recipe is not None:
        model.quantize(recipe)
    return model


@dataclass
class Inputs:
    """Everything a rollout of `chunks` chunks is given: float32."""

    noise: list[Tensor]
    renoise: list[Tensor]
    condition: list[Tensor]
    camera: list[Tensor]
    text: Tensor

    def chunk(self, index: int, camera: bool = True, condition: bool = True) -> dict[str, Any]:
        """Keyword arguments of `denoise_chunk` besides the noise."""
        return {
            "renoise": self.renoise[index],
            "text": self.text,
            "condition": self.condition[index] if condition else None,
            "camera": self.camera[index] if camera else None,
        }


def make_inputs(
    cfg: LingBotConfig, chunks: int, size: tuple[int, int] = (4, 6), batch: int = 1, steps: int = 4, seed: int = 1
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames = cfg.frames_per_chunk
    extra = cfg.in_channels - cfg.out_channels
    return Inputs(
        [draw(batch, cfg.out_channels, frames, *size) for _ in range(chunks)],
        [draw(steps - 1, batch, cfg.out_channels, frames, *size) for _ in range(chunks)],
        [draw(batch, extra, frames, *size) for _ in range(chunks)],
        [0.5 * draw(batch, cfg.camera_channels, frames, *size) for _ in range(chunks)],
        draw(batch, cfg.text_len - 2, cfg.text_dim),
    )


def bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def ring_bits(state: RealtimeCausalDiTState) -> list[Tensor]:
    """A copy of the session's whole ring, unwritten slots included."""
    assert state.kv_cache is not None
    return [bits(x).clone() for layer in state.kv_cache.layers for x in layer]


def same_ring(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
