"""Which backend serves each op here, and why the others can't: the ops' own dispatch, asked without running them; and
what networks take, told from their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lingbot_kernels.config import PRESETS, LingBotConfig
from lingbot_kernels.models.checkpoint import infer_config, stored_recipe
from lingbot_kernels.ops import BackendUnavailable, _dispatch
from lingbot_kernels.ops.windowed_attention import LIBRARIES, resolve_library
from lingbot_kernels.ops.windowed_attention import why_not as attention_why_not
from lingbot_kernels.quantization import Int8Recipe
from lingbot_kernels.realtime.memory import session_memory, weights_memory

# Matrix products are torch's own: cuBLAS(Lt) on CUDA, oneDNN or MKL on the CPU.
_MATRIX_PRODUCTS = "torch"
GRID_480P = (30, 52)  # rows and columns of tokens of a frame of 480x832 pixels


def _chosen(op: str, device_type: str, dtype: torch.dtype, tokens: int, dim: int, head_dim: int, keys: int) -> str:
    """`keys`: that attention sees."""
    forced_reference = _dispatch.requested_backend() == "reference"
    if op == "windowed_attention":
        requested = "reference" if forced_reference else None
        return resolve_library(requested, device_type, dtype, head_dim, tokens, keys, dim)
    if op == "linear_gelu":
        return "reference" if forced_reference else _MATRIX_PRODUCTS
    return _dispatch.resolve(op, None, device_type, dtype, tokens, dim)


def serving(
    cfg: LingBotConfig, device_type: str, dtype: torch.dtype, tokens: int, recipe: Int8Recipe | None = None
) -> dict[str, str]:
    """Op -> what serves it in a chunk of `tokens` tokens of this network, quantised by `recipe` where given, under the
    backend now in force.

    Raises:
        BackendUnavailable: the backend asked for by name can't serve an op.
    """
    residual = torch.promote_types(dtype, getattr(torch, cfg.residual_dtype))
    keys = tokens * cfg.window_frames // cfg.frames_per_chunk
    of_residual = ("layer_norm_modulate", "gated_residual_camera_norm", "residual_norm_modulate")
    int8_qk = recipe is not None and recipe.attention == "int8_qk"
    write = "norm_rope_quantize_kv_write" if int8_qk else "norm_rope_kv_write"
    names = [f"qk_{write}", f"k_{write}", *(["int8_attention"] if int8_qk else []), "rms_norm", *of_residual]
    if recipe is not None:
        names += [*(f"{name}_quantize" for name in of_residual), "rotate_quantize", "int8_linear"]
    width = cfg.head_dim
    served = {"rope_cos_sin": _chosen("rope_cos_sin", device_type, torch.float32, tokens, width, width, keys)}
    for op in (*names, "windowed_attention", "linear_gelu"):
        op_dtype = residual if op.removesuffix("_quantize") in of_residual else dtype
        served[op] = _chosen(op, device_type, op_dtype, tokens, cfg.dim, cfg.head_dim, keys)
    return served


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where a backend (of attention: a library) can serve the op's tensors, else what is missing."""
    if op == "windowed_attention":
        return attention_why_not(backend, device_type, dtype, head_dim)
    return _dispatch.why_not(op, backend, device_type, dtype)


def survey(device_type: str, dtype: torch.dtype, tokens: int = 4680, dim: int = 5120, head_dim: int = 128) -> Any:
    """Op -> {"backend": what serves it (None where what was asked for can't), "error", "others": backend -> reason
    why it can't serve, or None where it could}.
    """
    rows: dict[str, dict[str, Any]] = {}
    for op in _dispatch.OPS:
        row: dict[str, Any] = {"backend": None, "error": None}
        try:
            row["backend"] = _chosen(op, device_type, dtype, tokens, dim, head_dim, 6 * tokens)
        except BackendUnavailable as error:
            row["error"] = str(error)
        known = LIBRARIES if op == "windowed_attention" else _dispatch.BACKENDS
        others = {name: why_not(op, name, device_type, dtype, head_dim) for name in known}
        row["others"] = {name: reason for name, reason in others.items() if name != row["backend"]}
        rows[op] = row
    return rows


def needs(cfg: LingBotConfig, dtype: torch.dtype, recipe: Int8Recipe | None) -> dict[str, Any]:
    """What a network takes: precision, whether attention has Q and K in int8, the products that run in int8 and what of
    it is left out, and bytes of the weights and of a session at 480x832 with a camera.
    """
    session = session_memory(cfg, GRID_480P, dtype, camera=cfg.camera, recipe=recipe)
    return {
        "precision": str(dtype).removeprefix("torch.") if recipe is None else recipe.precision,
        "int8_attention": recipe is not None and recipe.attention == "int8_qk",
        "int8_products": [] if recipe is None else list(recipe.products),
        "left_out": [] if recipe is None else list(recipe.leave_out),
        "weights": weights_memory(cfg, dtype, recipe).total,
        "session": session.total,
    }


def networks(dtype: torch.dtype, checkpoint: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Of each large preset what it takes as it is, with int8 products, and with int8 attention as well; of a
    checkpoint, by its folder's name, what it takes as it is stored.

    Raises:
        CheckpointError, ValueError: the checkpoint can't be read.
    """
    rows = {
        name: [
            needs(LingBotConfig.preset(name), dtype, recipe)
            for recipe in (None, Int8Recipe(), Int8Recipe(attention="int8_qk"))
        ]
        for name in PRESETS
        if name != "tiny"
    }
    if checkpoint is not None:
        rows[checkpoint.name or str(checkpoint)] = [needs(infer_config(checkpoint), dtype, stored_recipe(checkpoint))]
    return rows
