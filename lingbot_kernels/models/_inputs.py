"""Checks of what models and forwards are given; each error names the argument, what it was and what it must be."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from lingbot_kernels.config import LingBotConfig

Dtype = torch.dtype | str
_DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
}  # fmt: skip


def as_dtype(name: str, value: Dtype | None) -> torch.dtype | None:
    """A dtype that networks run in, also by its name, with or without "torch.", or a usual short one; None stays None.

    Raises:
        ValueError: another dtype, or a name that stands for none.
        TypeError: neither a dtype nor a string.
    """
    found = _DTYPES.get(value.strip().lower().removeprefix("torch.")) if isinstance(value, str) else value
    if value is None or (isinstance(found, torch.dtype) and found in _DTYPES.values()):
        return found
    kind = ValueError if isinstance(value, str | torch.dtype) else TypeError
    shown = repr(value) if isinstance(value, str) and len(value) < 60 else str(value)[:60]
    hint = "; int8 is a precision: precision='int8'" if "int8" in shown else ""
    raise kind(
        f"{name}: got {shown}, must be bfloat16, float16, float32 or float64, as a torch.dtype or its name{hint}"
    )


def check_chunk(
    cfg: LingBotConfig,
    device: torch.device,
    latents: Tensor,
    text: Tensor,
    timestep: float,
    camera: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `CausalLingBotTransformer.forward` fit the model."""
    real = isinstance(timestep, Real) and not isinstance(timestep, bool)
    if not real or not math.isfinite(timestep):
        raise TypeError(
            f"timestep: got {type(timestep).__name__} {timestep if isinstance(timestep, Real) else ''}, "
            "must be one finite Python float for the chunk (reading a tensor would wait for the device)"
        )
    _check_tensor("latents", latents, device, f"[B, {cfg.in_channels}, F, H, W]", 5)
    batch, channels, frames, height, width = latents.shape
    pt, ph, pw = cfg.patch_size
    if channels != cfg.in_channels or min(latents.shape) < 1 or frames % pt or height % ph or width % pw:
        raise ValueError(
            f"latents: got {list(latents.shape)}, must be [B, {cfg.in_channels}, F, H, W] with F, H, W multiples of "
            f"{pt}, {ph}, {pw}"
        )
    _check_tensor("text", text, device, f"[{batch}, L <= {cfg.text_len}, {cfg.text_dim}]", 3)
    if text.shape[0] != batch or not 0 < text.shape[1] <= cfg.text_len or text.shape[2] != cfg.text_dim:
        raise ValueError(f"text: got {list(text.shape)}, must be [{batch}, L <= {cfg.text_len}, {cfg.text_dim}]")
    if camera is not None:
        wanted = [batch, cfg.camera_channels, frames, height, width]
        if not cfg.camera:
            shape = list(camera.shape) if isinstance(camera, Tensor) else type(camera).__name__
            raise ValueError(f"camera: got {shape}, must be None: the model has no camera layers")
        _check_tensor("camera", camera, device, str(wanted), 5)
        if list(camera.shape) != wanted:
            raise ValueError(f"camera: got {list(camera.shape)}, must be {wanted}")


def _check_tensor(name: str, x: Tensor, device: torch.device, shape: str, dims: int) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, must be a float tensor")
    if x.dim() != dims:
        raise ValueError(f"{name}: got shape {list(x.shape)}, must be {shape}")
    if x.device != device:
        raise ValueError(f"{name}: got device {x.device}, must be the model's, {device}")
