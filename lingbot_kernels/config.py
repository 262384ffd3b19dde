"""Shape and numerics of one causal LingBot-World transformer, its presets, and the config.json files that describe one.
Needs nothing but the standard library, so that tools can read a configuration without loading torch."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingbot_kernels.files import read_json

RESIDUAL_DTYPES = ("bfloat16", "float32")

# A Pluecker embedding has 6 values a pixel; the 8x8 pixels of a latent position are folded into its channels.
PLUECKER_CHANNELS = 6 * 8 * 8

_POSITIVE_INTEGERS = (
    *("dim", "num_heads", "num_layers", "ffn_dim", "in_channels", "out_channels"),
    *("text_dim", "text_len", "freq_dim", "frames_per_chunk", "window_frames"),
)


@dataclass(frozen=True)
class LingBotConfig:
    """Everything that fixes the network and its attention window. Frozen and hashable.

    Args:
        dim: width of the residual stream, `num_heads * head_dim`.
        num_heads: attention heads; `dim / num_heads` must be even and at least 6, so that RoPE splits over (t, h, w).
        num_layers: transformer blocks.
        ffn_dim: hidden width of a block's MLP.
        in_channels: input channels: noisy latent, then mask and image condition (16 + 4 + 16).
        out_channels: channels of a latent, and of the predicted flow.
        patch_size: latent (frames, rows, columns) of one token; frames must be 1.
        text_dim: width of a text embedding.
        text_len: tokens to which a text is zero-padded.
        freq_dim: width of the sinusoidal time embedding; even.
        eps: of every norm.
        rope_theta: base of the RoPE frequencies.
        frames_per_chunk: latent frames that are denoised together.
        window_frames: latent frames that attention sees: sink + recent + current chunk.
        sink_frames: first latent frames, never evicted; 0 turns the sink off.
        residual_dtype: "bfloat16" (fast engines) or "float32" (the official numerics).
        camera: whether the network has camera layers.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what it must be.
    """

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    frames_per_chunk: int = 3
    window_frames: int = 18
    sink_frames: int = 3
    residual_dtype: str = "bfloat16"
    camera: bool = True

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTEGERS:
            _require(_is_int(getattr(self, name)) and getattr(self, name) > 0, self, name, "a positive integer")
        _require(_is_int(self.sink_frames) and self.sink_frames >= 0, self, "sink_frames", "an integer >= 0")
        for name in ("eps", "rope_theta"):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
            _require(ok, self, name, "a positive finite number")
        patch = self.patch_size
        ok = isinstance(patch, (tuple, list)) and len(patch) == 3 and all(_is_int(n) and n > 0 for n in patch)
        _require(ok, self, "patch_size", "three positive integers (frames, rows, columns)")
        object.__setattr__(self, "patch_size", tuple(patch))
        _require(patch[0] == 1, self, "patch_size", "1 in its first place: the window counts whole latent frames")
        _require(self.dim % self.num_heads == 0, self, "dim", f"a multiple of num_heads = {self.num_heads}")
        _require(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            self,
            "dim",
            f"num_heads = {self.num_heads} times an even head_dim >= 6 (RoPE rotates pairs on three axes),"
            f" but head_dim is {self.head_dim}",
        )
        _require(self.freq_dim % 2 == 0, self, "freq_dim", "even: one half is cosines, the other sines")
        _require(self.in_channels >= self.out_channels, self, "in_channels", f">= out_channels = {self.out_channels}")
        _require(self.sink_frames < self.window_frames, self, "sink_frames", f"< window_frames = {self.window_frames}")
        _require(
            self.frames_per_chunk <= self.window_frames - self.sink_frames,
            self,
            "frames_per_chunk",
            f"<= window_frames - sink_frames = {self.window_frames - self.sink_frames}",
        )
        _require(
            self.residual_dtype in RESIDUAL_DTYPES, self, "residual_dtype", " or ".join(map(repr, RESIDUAL_DTYPES))
        )
        _require(isinstance(self.camera, bool), self, "camera", "True or False")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        return math.prod(self.patch_size)

    @property
    def camera_channels(self) -> int:
        """Channels of the Pluecker input on the latent grid: 6 a pixel, 8 x 8 pixels a latent position."""
        return 6 * 8 * 8

    def num_parameters(self) -> int:
        """Number of parameters, counted from the shapes of the official checkpoint."""
        d, f = self.dim, self.ffn_dim

        def linear(inputs: int, outputs: int) -> int:
            return inputs * outputs + outputs

        square = linear(d, d)
        attention = 4 * square + 2 * d  # q, k, v, o and the weights of norm_q, norm_k
        block = 6 * d + 2 * attention + 2 * d + linear(d, f) + linear(f, d)  # 6d: modulation; 2d: norm3
        total = linear(self.in_channels * self.patch_volume, d)
        total += linear(self.text_dim, d) + square
        total += linear(self.freq_dim, d) + square + linear(d, 6 * d)
        total += linear(d, self.out_channels * self.patch_volume) + 2 * d  # 2d: head.modulation
        if self.camera:
            total += linear(PLUECKER_CHANNELS * self.patch_volume, d) + 2 * square
            block += 4 * square
        return total + self.num_layers * block

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LingBotConfig:
        """The named configuration, with fields replaced by `overrides`.

        Args:
            name: "lingbot-world-14b", "lingbot-world-1.3b", or "tiny" (seconds on a laptop).
        """
        if name not in PRESETS:
            raise ValueError(f"preset: no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields, in values that JSON can hold; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LingBotConfig:
        """The inverse of `to_dict`. Raises ValueError for unknown or missing fields, naming each."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [name for name in fields if name not in known]
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in fields]
        if unknown or missing:
            problems = [f"unknown field {name!r}" for name in unknown] + [f"missing field {name!r}" for name in missing]
            raise ValueError(f"LingBotConfig: {', '.join(problems)}; the fields are {', '.join(known)}")
        return cls(**fields)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> LingBotConfig:
        """Read a config.json: this project's own, an official Wan / LingBot-World one, or a diffusers one.

        A foreign file's unknown keys are ignored; what this network cannot express (no query-key norm, no affine
        cross-attention norm, image cross-attention, action control) is refused. A window of -1 (unbounded) gives the
        default.

        Raises:
            ValueError: the file is not JSON, lacks a size, or describes another network; the message names the file.
        """
        path = Path(path)
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds {type(content).__name__}, must hold an object")
        content.pop("quantization", None)  # how the weights are stored says nothing of the network
        try:
            return cls.from_dict(_translate(content) if _is_foreign(content) else content)
        except ValueError as error:
            own = "" if _is_foreign(content) else "; without _class_name it is read as this project's own"
            raise ValueError(f"{path}: {error}{own}") from error


_DEFAULT_WINDOW = {"frames_per_chunk": 3, "window_frames": 18, "sink_frames": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "lingbot-world-14b": {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824, **_DEFAULT_WINDOW},
    "lingbot-world-1.3b": {"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960, **_DEFAULT_WINDOW},
    "tiny": {
        "dim": 128,
        "num_heads": 2,
        "num_layers": 3,
        "ffn_dim": 256,
        "text_dim": 64,
        "text_len": 16,
        "freq_dim": 64,
        **_DEFAULT_WINDOW,
    },
}

# Keys that only foreign files have, and the field each one is. Sizes that are null or -1 leave the default.
_FOREIGN_KEYS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_attention_heads": "num_heads",
    "local_attn_size": "window_frames",
    "sink_size": "sink_frames",
    "chunk_size": "frames_per_chunk",
    "num_frame_per_block": "frames_per_chunk",
    "num_frames_per_block": "frames_per_chunk",
}
_FOREIGN_MARKS = {*_FOREIGN_KEYS, "attention_head_dim", "_class_name", "_diffusers_version", "model_type", "qk_norm"}


def _is_foreign(content: dict[str, Any]) -> bool:
    return not _FOREIGN_MARKS.isdisjoint(content)


def _translate(content: dict[str, Any]) -> dict[str, Any]:
    """Fields from an official or diffusers config.json."""
    for key in ("qk_norm", "cross_attn_norm"):
        if content.get(key, True) not in (True, "rms_norm_across_heads"):
            raise ValueError(
                f"{key} is {content[key]!r}, but this network has full-width q, k norms and an affine norm3"
            )
    for key in ("added_kv_proj_dim", "image_dim"):
        if content.get(key) is not None:
            raise ValueError(f"{key} is {content[key]!r}: image cross-attention is not part of this network")
    if content.get("control_type", "cam") not in ("cam", None):
        raise ValueError(f"control_type is {content['control_type']!r}, only 'cam' is supported")
    own = {field.name for field in dataclasses.fields(LingBotConfig)}
    fields = {name: value for name, value in content.items() if name in own and value is not None}
    for key, name in _FOREIGN_KEYS.items():
        if content.get(key) not in (None, -1):
            fields[name] = content[key]
    if "attention_head_dim" in content and "dim" not in fields:
        heads, head_dim = fields.get("num_heads"), content["attention_head_dim"]
        if not (_is_int(heads) and _is_int(head_dim)):
            raise ValueError(f"num_attention_heads = {heads!r} and attention_head_dim = {head_dim!r} must be integers")
        fields["dim"] = heads * head_dim
    if content.get("_class_name") == "WanTransformer3DModel":
        fields.setdefault("camera", False)
    return fields


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, config: LingBotConfig, name: str, requirement: str) -> None:
    if not condition:
        raise ValueError(f"LingBotConfig.{name} is {getattr(config, name)!r}, must be {requirement}")
