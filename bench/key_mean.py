"""Whether int8 attention errs less when a mean of K is taken out before it is quantised, which softmax does not see.

python bench/key_mean.py [--chunks N]: on the CPU. A rollout in float32 of a small network with plain and with loud
weights; at each call of self-attention the same Q, K and V in float64, and with int8 codes of Q and K (a scale for each
token and head) in place of either or both. Prints relative errors of attention's output: means over the calls after the
first chunk's.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    reference,
)
from lingbot_kernels.benchmarks.random_weights import KINDS, fill_weights
from lingbot_kernels.reference.rotate_quantize import quantize_values

GRID, CHUNK = (8, 12), 72  # latents of a frame; tokens of a chunk
WIDTHS = ((256, 4), (512, 4))  # dim, heads: of 64 and of 128


def coded(x: Tensor) -> Tensor:
    """x [B, S, heads, head_dim] as its int8 codes have it."""
    codes, scale = quantize_values(x.float())
    return codes.double() * scale.double().unsqueeze(-1)


class Errors:
    """Errors of one network's attention, by block and by what is in int8."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._first: dict[int, Tensor] = {}

    def attend(self, block: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, num_visible: int) -> Tensor:
        heads = q.unflatten(-1, k_cache.shape[2:]).double()
        k, v = (cache[:, :num_visible].double() for cache in (k_cache, v_cache))
        mean = k.mean(dim=1, keepdim=True)
        if num_visible == CHUNK:
            self._first[block] = mean  # of the last forward of the first chunk: its context update, or the step before
        else:
            exact = reference.windowed_attention(heads, k, v, num_visible)
            first = self._first[block]
            tried = {
                "Q": (coded(heads), k), "K": (heads, coded(k)),
                "K less the first chunk's mean": (heads, coded(k - first)),
                "Q and K": (coded(heads), coded(k)),
                "Q and K less the first chunk's mean": (coded(heads), coded(k - first)),
                "Q and K less the mean of all keys": (coded(heads), coded(k - mean)),
            }  # fmt: skip
            for name, (queries, keys) in tried.items():
                got = reference.windowed_attention(queries, keys, v, num_visible)
                self.found[block][name].append(float((got - exact).norm() / exact.norm()))
            share = float(mean.norm() * k.shape[1] ** 0.5 / k.norm())
            self.found[block]["(share of the mean in K's norm)"].append(share)
        return reference.windowed_attention(q, k_cache, v_cache, num_visible)


def measure(weights: str, dim: int, heads: int, chunks: int) -> Errors:
    torch.manual_seed(0)
    config = LingBotConfig.preset("tiny", dim=dim, num_heads=heads, ffn_dim=2 * dim, window_frames=9, sink_frames=3)
    model, errors = CausalLingBotTransformer(config, dtype=torch.float32), Errors()
    fill_weights(model, weights)
    for index, block in enumerate(model.blocks):
        block.self_attn.attend = partial(errors.attend, index)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 9, config.text_dim, generator=generator)
    camera = 0.5 * torch.randn(1, config.camera_channels, 3 * chunks, *GRID, generator=generator)
    stage, state = CausalDenoisingStage(model), RealtimeCausalDiTState()
    for _ in stage.rollout(state, chunks, text=text, camera=camera, generator=generator, latent_size=GRID):
        pass
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=7)
    chunks = parser.parse_args().chunks
    for weights in KINDS:
        for dim, heads in WIDTHS:
            print(f"{weights}, {heads} heads of {dim // heads}, a column for each block")
            found = measure(weights, dim, heads, chunks).found
            for name in found[0]:
                means = (sum(each[name]) / len(each[name]) for each in found.values())
                print(f"  {name:38}", *(f"{mean:10.3%}" for mean in means))


if __name__ == "__main__":
    main()
