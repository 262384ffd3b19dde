"""Prompts to umT5 embeddings, through transformers: the encoder and tokenizer that the Wan family is trained with."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.components.folders import BadPart
from lingbot_kernels.components.reading import read_pickled, require

MAX_CHARACTERS = 100_000  # refused before they are cleaned and cut into tokens: far more than max_tokens can hold


def clean(prompt: str) -> str:
    """The prompt as the official code reads it: broken encodings mended, HTML entities and runs of blanks resolved."""
    ftfy = require("ftfy")
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """A umT5 encoder with its tokenizer.

    Args:
        model: transformers' `UMT5EncoderModel`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, encoder: Path, tokenizer: Path, *, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """Read both from their folders, or the encoder from an official `models_t5_*.pth`.

        Raises:
            BadPart: naming the file and what is wrong with it. ImportError: the extra `pipeline` isn't installed.
        """
        transformers = require("transformers")
        try:
            tokens = transformers.AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        except Exception as error:  # every tokenizer class raises its own
            raise BadPart(f"tokenizer: {tokenizer}: {error}") from error
        model = _from_folder(encoder, dtype) if encoder.is_dir() else _from_official(encoder, dtype)
        return cls(model.to(device), tokens)

    @torch.no_grad()
    def __call__(self, prompt: str, max_tokens: int) -> Tensor:
        """The embeddings [1, L, text_dim] of the prompt's L tokens, on the encoder's device.

        Raises:
            TypeError, ValueError: the prompt is no text, says nothing, or has more than MAX_CHARACTERS or
                `max_tokens` tokens.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: got {type(prompt).__name__}, must be a string")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"prompt: got {len(prompt)} characters, must have at most {MAX_CHARACTERS}")
        text = clean(prompt)
        if not text:
            raise ValueError(f"prompt: got {prompt!r}, must say something about the world")
        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=True)
        ids, mask = tokens.input_ids, tokens.attention_mask
        if ids.shape[1] > max_tokens:
            raise ValueError(f"prompt: got {ids.shape[1]} tokens, must have at most {max_tokens}")
        device = self.model.device
        found: Tensor = self.model(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return found


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    transformers, logging = require("transformers"), require("transformers.utils.logging")
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a library draws nothing on its caller's terminal
    try:
        model, info = transformers.UMT5EncoderModel.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # what safetensors, json and transformers raise has no common class
        raise BadPart(f"text encoder: {folder}: {error}") from error
    finally:
        if drawn:
            logging.enable_progress_bar()
    # A checkpoint with one table of embeddings stores it under either of two names.
    missing = [key for key in info["missing_keys"] if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    if missing or info.get("mismatched_keys"):
        wrong = missing or info["mismatched_keys"]
        raise BadPart(
            f"text encoder: {folder}: {len(wrong)} weights are missing or misshapen, such as {sorted(wrong)[0]}"
        )
    return model


_OFFICIAL_LAYERS = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_OFFICIAL_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def transformers_name(official: str) -> str | None:
    """transformers' name of a weight of the official umT5 encoder, or None where there is none."""
    stem, _, last = official.rpartition(".")
    if last != "weight":
        return None
    if stem in _OFFICIAL_TOP:
        return f"{_OFFICIAL_TOP[stem]}.weight"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if match is None or match[2] not in _OFFICIAL_LAYERS:
        return None
    return f"encoder.block.{match[1]}.{_OFFICIAL_LAYERS[match[2]]}.weight"


def _from_official(path: Path, dtype: torch.dtype) -> Any:
    """The encoder of an official file, whose sizes are read off its weights."""
    transformers = require("transformers")
    stored = read_pickled("text encoder", path)
    weights = {}
    for key, value in stored.items():
        name = transformers_name(key)
        if name is None:
            raise BadPart(f"text encoder: {path}: {key} is no weight of a umT5 encoder")
        weights[name] = value
    try:
        bias = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        query = weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
        config = transformers.UMT5Config(
            vocab_size=weights["shared.weight"].shape[0],
            d_model=weights["shared.weight"].shape[1],
            d_kv=query.shape[0] // bias.shape[1],
            d_ff=weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_heads=bias.shape[1],
            num_layers=1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.block.")),
            relative_attention_num_buckets=bias.shape[0],
            feed_forward_proj="gated-gelu",
        )
    except KeyError as error:
        raise BadPart(f"text encoder: {path}: has no {error.args[0]}") from error
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    try:
        model.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    except RuntimeError as error:
        raise BadPart(f"text encoder: {path}: {error}") from error
    return model
