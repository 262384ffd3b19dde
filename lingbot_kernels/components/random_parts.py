"""Parts with random weights, for demonstrations and measurements: pictures mean nothing, times are real."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.components.reading import require

TINY_VAE, REAL_VAE = 8, 96  # channels of the VAE's widest stage


def random_vae(base_dim: int, device: torch.device) -> Any:
    """A Wan VAE in float32 with random weights, whose pixels have the spread of a picture's, the same at every call."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        vae = require("diffusers").AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
        for name, parameter in vae.named_parameters():
            if "gamma" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        latents = torch.randn(1, vae.config.z_dim, 2, 8, 8)
    vae.to(device)
    with torch.no_grad():
        spread = vae.decode(latents.to(device)).sample.std()
    vae.decoder.conv_out.weight.mul_(0.45 / spread)
    return vae


class NoiseText:
    """In place of a text encoder: noise, as many tokens as a prompt may have, another one for each prompt."""

    def __init__(self, text_dim: int) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(d_model=text_dim))

    def __call__(self, prompt: str, max_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(1, max_tokens, self.model.config.d_model, generator=generator)
