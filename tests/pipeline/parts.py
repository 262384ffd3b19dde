"""Tiny parts of a world model with random weights, built by transformers' and diffusers' own classes, and folders that
hold them in both layouts, written by the libraries' own writers.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig
from lingbot_kernels.components.text import transformers_name

WORDS = ("harbour", "dawn", "boats", "gulls", "a", "at", "with", "and", "the", "rain", "forest")
TEXT_DIM = 32


def tiny_config(**changes: object) -> LingBotConfig:
    return LingBotConfig.preset(
        "tiny",
        **{"text_dim": TEXT_DIM, "num_layers": 2, "window_frames": 9, "dim": 48, "ffn_dim": 64, **changes},
    )


def tiny_transformer(seed: int = 0, **changes: object) -> CausalLingBotTransformer:
    torch.manual_seed(seed)
    return CausalLingBotTransformer(tiny_config(**changes), dtype=torch.float32).eval()


def tiny_vae(seed: int = 1):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    vae.decoder.conv_out.weight.mul_(4)
    return vae


def tiny_tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_text_model(seed: int = 2):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def diffusers_folder(root: Path) -> Path:
    """text_encoder/, tokenizer/, vae/ and transformer/."""
    tiny_text_model().save_pretrained(root / "text_encoder")
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    tiny_vae().save_pretrained(root / "vae")
    tiny_transformer().save_pretrained(root / "transformer")
    return root


def official_folder(root: Path) -> Path:
    """models_t5_*.pth, google/umt5-xxl/, Wan2.1_VAE.pth, and the transformer's shards in the folder itself."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_transformer().save_pretrained(root)
    tiny_tokenizer().save_pretrained(root / "google" / "umt5-xxl")
    torch.save(official_text_weights(), root / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(official_vae_weights(), root / "Wan2.1_VAE.pth")
    return root


def official_text_weights() -> dict[str, torch.Tensor]:
    """The tiny encoder's weights under the names of the official file, which are spelt out here anew."""
    weights = tiny_text_model().state_dict()
    official = {
        "token_embedding.weight": weights["shared.weight"],
        "norm.weight": weights["encoder.final_layer_norm.weight"],
    }
    parts = (
        "norm1",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.o",
        "pos_embedding.embedding",
        "norm2",
        "ffn.gate.0",
        "ffn.fc1",
        "ffn.fc2",
    )
    for block in range(2):
        for part in parts:
            name = f"blocks.{block}.{part}.weight"
            official[name] = weights[transformers_name(name)]
    assert {transformers_name(name) for name in official} == set(weights) - {"encoder.embed_tokens.weight"}
    return official


def official_vae_weights() -> dict[str, torch.Tensor]:
    """The tiny VAE's weights under the names of the official Wan2.1_VAE.pth."""
    official = {}
    for name, value in tiny_vae().state_dict().items():
        official[official_vae_name(name)] = value.clone()
    return official


def official_vae_name(name: str) -> str:
    inner = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    for ours, theirs in (
        ("post_quant_conv", "conv2"),
        ("quant_conv", "conv1"),
        ("conv_in", "conv1"),
        ("norm_out", "head.0"),
        ("conv_out", "head.2"),
    ):
        name = re.sub(rf"(^|\.){ours}(?=\.)", rf"\g<1>{theirs}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    if re.match(r"(encoder|decoder)\.(middle\.[02]|upsamples|downsamples)", name):
        name = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)(?=\.)", lambda m: "." + inner[m[1]], name)
    return name
