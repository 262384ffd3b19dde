"""The Wan VAE, through diffusers, from its own folder or the official file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lingbot_kernels.components.folders import BadPart
from lingbot_kernels.components.reading import read_pickled, require


def load_vae(path: Path, device: torch.device) -> Any:
    """diffusers' `AutoencoderKLWan` in float32, from a folder with config.json or an official `Wan2.1_VAE.pth`.

    Raises:
        BadPart: naming the file and what is wrong with it. ImportError: the extra `pipeline` isn't installed.
    """
    autoencoder = require("diffusers").AutoencoderKLWan
    if path.is_dir():
        try:
            vae, info = autoencoder.from_pretrained(
                str(path), torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # what safetensors, json and diffusers raise has no common class
            raise BadPart(f"vae: {path}: {error}") from error
        if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
            raise BadPart(f"vae: {path}: {len(wrong)} weights are missing or unexpected, such as {wrong[0]}")
    else:
        vae = _from_official(path, autoencoder)
    return vae.to(device).eval().requires_grad_(False)


def _from_official(path: Path, autoencoder: Any) -> Any:
    convert = require("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    weights = convert(read_pickled("vae", path))
    try:
        base_dim, z_dim = weights["encoder.conv_in.weight"].shape[0], weights["post_quant_conv.weight"].shape[0]
        vae = autoencoder(base_dim=base_dim, z_dim=z_dim)
        vae.load_state_dict(weights)
    except KeyError as error:
        raise BadPart(f"vae: {path}: has no {error.args[0]}") from error
    except RuntimeError as error:
        raise BadPart(f"vae: {path}: {error}") from error
    return vae
