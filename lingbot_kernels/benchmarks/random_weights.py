"""Random weights for a network: plain ones, and loud ones with what trained video transformers show."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer

KINDS = ("plain", "loud")
LOUD_CHANNELS, LOUDNESS = 0.003, 20.0  # share of the channels, and how much louder modulation and norm3 make them
KEY_SPREAD, VALUE_SPREAD = 2.0, 1.5  # of self-attention's K and V biases
BIASED_SHARE, BIAS = 0.1, 2.0  # of the MLP's hidden channels, and their mean before GELU


@torch.no_grad()
def fill_weights(model: CausalLingBotTransformer, kind: str, seed: int = 0) -> None:
    """Fill every parameter, the same for the same seed and device.

    plain: weights of a size at which every layer, norm, bias and modulation changes the output. loud: the same with
    0.3% of the channels 20 times louder through the modulation and norm3, K and V biases with a spread of 2 and 1.5,
    and a tenth of GELU's inputs biased: what makes int8 without a rotation and fp8 lose.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, must be one of {', '.join(KINDS)}")
    for name, weight in model.state_dict().items():  # views of the parameters
        weight.copy_(_plain(name, weight, seed))
    if kind == "loud":
        for i, block in enumerate(model.blocks):
            _make_loud(f"blocks.{i}", block.state_dict(), seed)


def _draw(name: str, like: Tensor, seed: int) -> Tensor:
    """Normal values of like's shape, in float32, by the parameter's name and the seed."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _plain(name: str, like: Tensor, seed: int) -> Tensor:
    values = _draw(name, like, seed)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.1 * values
    if name.endswith("modulation"):
        return 0.3 * values
    return 0.8 * values / like[0].numel() ** 0.5


def _make_loud(prefix: str, weights: dict[str, Tensor], seed: int) -> None:
    modulation = weights["modulation"]
    dim = modulation.shape[-1]
    order = _draw(f"{prefix}.loud", modulation[0, 0], seed).argsort()
    loud = order[: max(1, round(LOUD_CHANNELS * dim))]
    for row in (1, 4):  # scales of self-attention and of the MLP, which are added to one
        modulation[0, row, loud] = LOUDNESS - 1
    weights["norm3.weight"][loud] = LOUDNESS
    for part, spread in (("k", KEY_SPREAD), ("v", VALUE_SPREAD)):
        bias = weights[f"self_attn.{part}.bias"]
        bias.copy_(spread * _draw(f"{prefix}.{part}", bias, seed))
    hidden = weights["ffn.0.bias"]
    biased = _draw(f"{prefix}.biased", hidden, seed).argsort()[: round(BIASED_SHARE * len(hidden))]
    hidden[biased] += BIAS
