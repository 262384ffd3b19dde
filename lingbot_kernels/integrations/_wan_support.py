"""Which Wan transformers `integrations.diffusers.accelerate` can serve, and by name what it can't."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_wan as wan
from torch import nn

from lingbot_kernels.integrations._wan_hooks import is_served

THETA = 10000.0


def register_block(block_class: type[nn.Module]) -> None:
    """Tell diffusers' block caches (`enable_cache`) that this class has the arguments and results of Wan's block."""
    if block_class not in TransformerBlockRegistry._registry:
        TransformerBlockRegistry.register(block_class, copy.copy(TransformerBlockRegistry.get(wan.WanTransformerBlock)))


def check_supported(transformer: nn.Module) -> None:
    """Raise unless the transformer is one whose forward the accelerated classes reproduce."""
    if type(transformer) is not wan.WanTransformer3DModel:
        raise TypeError(f"transformer: got {type(transformer).__name__}, must be diffusers' WanTransformer3DModel")
    model: Any = transformer
    expected = [("transformer", model, wan.WanTransformer3DModel), ("rope", model.rope, wan.WanRotaryPosEmbed)]
    # accelerate's hooks, which always stand on the transformer too, leave a forward behind wherever they were.
    leftovers = "forward" in model.__dict__
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        for part in ("attn1", "attn2"):
            attention = getattr(block, part)
            if type(attention.processor) is not wan.WanAttnProcessor:
                raise TypeError(
                    f"{name}.{part}.processor: got {type(attention.processor).__name__}, must be diffusers' "
                    "WanAttnProcessor"
                )
            if attention.processor._parallel_config is not None:
                raise ValueError(f"{name}.{part}: runs under context parallelism, which accelerate doesn't serve")
            expected += [(f"{name}.{part}.{n}", getattr(attention, n), nn.RMSNorm) for n in ("norm_q", "norm_k")]
        expected += [(name, block, wan.WanTransformerBlock), (f"{name}.ffn.net.0", block.ffn.net[0], GELU)]
        expected += [(f"{name}.{part}", getattr(block, part), wan.FP32LayerNorm) for part in ("norm1", "norm3")]
        expected += [(f"{name}.norm2", block.norm2, (wan.FP32LayerNorm, nn.Identity))]
        if getattr(block.ffn.net[0], "approximate", None) != "tanh":
            raise ValueError(f"{name}.ffn.net.0: got another activation than GELU in its tanh form, must be that")
    for name, module, classes in expected:
        classes = classes if isinstance(classes, tuple) else (classes,)
        if type(module) not in classes:
            wanted = " or ".join(c.__name__ for c in classes)
            raise TypeError(f"{name}: got {type(module).__name__}, must be diffusers' {wanted}")
        if not is_served(module, leftovers):
            raise ValueError(
                f"{name}: has a hook or a patched forward that is neither torch's, diffusers' nor accelerate's; must "
                "be without, since it would keep diffusers' own: patch after accelerate"
            )
    if model.rope._forward_hooks or model.rope._forward_pre_hooks:
        raise ValueError("rope: got forward hooks, must have none: its table has another form than diffusers'")
    _check_rope(model)


def _check_rope(model: Any) -> None:
    """The model's own table must be the one that `ops.rope_cos_sin` makes, up to its roundings."""
    rope = model.rope
    spatial = 2 * (rope.attention_head_dim // 6)
    if rope.attention_head_dim % 2 or not 6 <= rope.attention_head_dim <= 256:
        raise ValueError(f"attention_head_dim: got {rope.attention_head_dim}, must be even and from 6 to 256")
    if tuple(rope.freqs_cos.shape) != (rope.max_seq_len, rope.attention_head_dim):
        raise ValueError(f"rope.freqs_cos: got shape {list(rope.freqs_cos.shape)}, must be [positions, head_dim]")
    if rope.freqs_cos.is_meta:
        return
    positions = min(rope.max_seq_len, 64)
    columns = [rope.attention_head_dim - 2 * spatial, spatial, spatial]
    rates = [THETA ** (-(2 * i) / size) for size in columns for i in range(size // 2)]
    angles = torch.outer(torch.arange(positions).double(), torch.tensor(rates, dtype=torch.float64))
    limit = 2 * torch.finfo(torch.bfloat16).eps  # `.to(torch.bfloat16)` rounds diffusers' table, for good
    for name, table, want in (
        ("cos", rope.freqs_cos[:positions, 0::2], angles.cos()),
        ("sin", rope.freqs_sin[:positions, 1::2], angles.sin()),
    ):
        off = (table.double().cpu() - want).abs().max().item()
        if not off <= limit:
            raise ValueError(
                f"rope.freqs_{name}: differs by {off:.1e} from Wan's table of theta {THETA:g}, "
                f"must be within {limit:.0e}"
            )
