"""The keys of a checkpoint: three namings of the same parameters, what a trainer puts around them, and their shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from lingbot_kernels.config import PLUECKER_CHANNELS, LingBotConfig

NAMINGS = ("official", "fastvideo", "diffusers")

_WEIGHT_BIAS, _WEIGHT, _PARAMETER = (".weight", ".bias"), (".weight",), ("",)

_Row = tuple[str, str, str | None, tuple[str, ...]]
_TEXT, _TIME = "condition_embedder.text_embedder.", "condition_embedder.time_embedder."

# (official, FastVideo / sglang, diffusers Wan, suffixes). None: the naming has no such key.
_TOP_LEVEL: tuple[_Row, ...] = (
    ("patch_embedding", "patch_embedding.proj", "patch_embedding", _WEIGHT_BIAS),
    ("patch_embedding_wancamctrl", "patch_embedding_wancamctrl.proj", None, _WEIGHT_BIAS),
    ("c2ws_hidden_states_layer1", "c2ws_mlp.fc_in", None, _WEIGHT_BIAS),
    ("c2ws_hidden_states_layer2", "c2ws_mlp.fc_out", None, _WEIGHT_BIAS),
    ("text_embedding.0", _TEXT + "fc_in", _TEXT + "linear_1", _WEIGHT_BIAS),
    ("text_embedding.2", _TEXT + "fc_out", _TEXT + "linear_2", _WEIGHT_BIAS),
    ("time_embedding.0", _TIME + "mlp.fc_in", _TIME + "linear_1", _WEIGHT_BIAS),
    ("time_embedding.2", _TIME + "mlp.fc_out", _TIME + "linear_2", _WEIGHT_BIAS),
    ("time_projection.1", "condition_embedder.time_modulation.linear", "condition_embedder.time_proj", _WEIGHT_BIAS),
    ("head.head", "proj_out", "proj_out", _WEIGHT_BIAS),
    ("head.modulation", "scale_shift_table", "scale_shift_table", _PARAMETER),
)
_BLOCK: tuple[_Row, ...] = (
    ("modulation", "scale_shift_table", "scale_shift_table", _PARAMETER),
    ("self_attn.q", "to_q", "attn1.to_q", _WEIGHT_BIAS),
    ("self_attn.k", "to_k", "attn1.to_k", _WEIGHT_BIAS),
    ("self_attn.v", "to_v", "attn1.to_v", _WEIGHT_BIAS),
    ("self_attn.o", "to_out", "attn1.to_out.0", _WEIGHT_BIAS),
    ("self_attn.norm_q", "norm_q", "attn1.norm_q", _WEIGHT),
    ("self_attn.norm_k", "norm_k", "attn1.norm_k", _WEIGHT),
    ("norm3", "self_attn_residual_norm.norm", "norm2", _WEIGHT_BIAS),
    ("cross_attn.q", "attn2.to_q", "attn2.to_q", _WEIGHT_BIAS),
    ("cross_attn.k", "attn2.to_k", "attn2.to_k", _WEIGHT_BIAS),
    ("cross_attn.v", "attn2.to_v", "attn2.to_v", _WEIGHT_BIAS),
    ("cross_attn.o", "attn2.to_out", "attn2.to_out.0", _WEIGHT_BIAS),
    ("cross_attn.norm_q", "attn2.norm_q", "attn2.norm_q", _WEIGHT),
    ("cross_attn.norm_k", "attn2.norm_k", "attn2.norm_k", _WEIGHT),
    ("ffn.0", "ffn.fc_in", "ffn.net.0.proj", _WEIGHT_BIAS),
    ("ffn.2", "ffn.fc_out", "ffn.net.2", _WEIGHT_BIAS),
    ("cam_injector_layer1", "cam_conditioner.cam_injector.fc_in", None, _WEIGHT_BIAS),
    ("cam_injector_layer2", "cam_conditioner.cam_injector.fc_out", None, _WEIGHT_BIAS),
    ("cam_scale_layer", "cam_conditioner.cam_scale_layer", None, _WEIGHT_BIAS),
    ("cam_shift_layer", "cam_conditioner.cam_shift_layer", None, _WEIGHT_BIAS),
)
CAMERA_KEY = re.compile(r"(blocks\.\d+\.cam_|c2ws_hidden_states_layer|patch_embedding_wancamctrl)")
BLOCK_INDEX = re.compile(r"^blocks\.(0|[1-9]\d*)\.")

# torch.compile and FSDP put these between a module and its parts.
_INNER_WRAPPER = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_SCALE = "_scale"  # <layer>.weight_scale


def _name_tables() -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """(to official, from official), each by naming; a block's index is replaced by "*" in the keys."""
    to_official: dict[str, dict[str, str]] = {naming: {} for naming in NAMINGS}
    from_official: dict[str, dict[str, str]] = {naming: {} for naming in NAMINGS}
    for prefix, rows in (("", _TOP_LEVEL), ("blocks.*.", _BLOCK)):
        for official, fastvideo, diffusers, suffixes in rows:
            for naming, name in zip(NAMINGS, (official, fastvideo, diffusers), strict=True):
                if name is None:
                    continue
                for suffix in suffixes:
                    to_official[naming][prefix + name + suffix] = prefix + official + suffix
                    from_official[naming][prefix + official + suffix] = prefix + name + suffix
    return to_official, from_official


_TO_OFFICIAL, _FROM_OFFICIAL = _name_tables()


def _look_up(table: dict[str, str], key: str) -> str | None:
    if key.endswith(_SCALE):  # of int8 weights, beside them
        weight = _look_up(table, key.removesuffix(_SCALE))
        return None if weight is None else weight + _SCALE
    block = BLOCK_INDEX.match(key)
    if block is None:
        return table.get(key) if "*" not in key else None
    found = table.get("blocks.*." + key[block.end() :])
    return None if found is None else found.replace("*", block[1], 1)


def official_name(key: str, naming: str | None = None) -> str | None:
    """The official name of a checkpoint key, or None where the naming has no such key.

    Args:
        key: without a wrapper's prefix.
        naming: one of NAMINGS; None tries all three, which never disagree.
    """
    for candidate in NAMINGS if naming is None else (naming,):
        name = _look_up(_TO_OFFICIAL[candidate], key)
        if name is not None:
            return name
    return None


def rename(key: str, naming: str) -> str:
    """The key under which `naming` stores the parameter with the official name `key`. KeyError where it stores none."""
    name = _look_up(_FROM_OFFICIAL[naming], key)
    if name is None:
        raise KeyError(f"{naming} naming has no key for {key!r}")
    return name


def stored_as(key: str, naming: str) -> str:
    """`rename`, for a message: where there is none it says so."""
    return _look_up(_FROM_OFFICIAL[naming], key) or "none: this naming has no such parameter"


def detect_naming(keys: Iterable[str]) -> str:
    """The naming that knows most of the keys; the official one where none knows more."""
    keys = list(keys)
    return max(NAMINGS, key=lambda naming: sum(official_name(key, naming) is not None for key in keys))


def parameter_shapes(config: LingBotConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every parameter of the network, in the order of the official state dict."""
    d, f = config.dim, config.ffn_dim
    widths = {
        "text_embedding.0": (d, config.text_dim),
        "time_embedding.0": (d, config.freq_dim),
        "time_projection.1": (6 * d, d),
        "patch_embedding": (d, config.in_channels, *config.patch_size),
        "patch_embedding_wancamctrl": (d, PLUECKER_CHANNELS * config.patch_volume),
        "head.head": (config.out_channels * config.patch_volume, d),
        "ffn.0": (f, d),
        "ffn.2": (d, f),
    }
    blocks = [f"blocks.{index}." for index in range(config.num_layers)]
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, rows in [("", _TOP_LEVEL), *((block, _BLOCK) for block in blocks)]:
        for name, _, _, suffixes in rows:
            if CAMERA_KEY.match(prefix + name) and not config.camera:
                continue
            weight = (d,) if ".norm_" in name or name == "norm3" else widths.get(name, (d, d))
            for suffix in suffixes:
                shapes[prefix + name + suffix] = {".weight": weight, ".bias": weight[:1]}.get(
                    suffix, (1, 2 if prefix == "" else 6, d)
                )
    return shapes


def unwrapped(keys: Iterable[str]) -> tuple[dict[str, str], str]:
    """Stored key -> key of the network itself, and the prefix that all of them share.

    Trainers save a wrapper around the network (`module.`, `model.diffusion_model.`, ...): of what all keys start with,
    as much is taken off as makes most of them known.
    """
    inner = {key: _INNER_WRAPPER.sub("", key) for key in keys}
    columns = zip(*(key.split(".") for key in inner.values()), strict=False)
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)]
    prefixes = ["".join(f"{part}." for part in shared[:n]) for n in range(len(shared) + 1)]

    def known(prefix: str) -> int:
        return sum(official_name(key.removeprefix(prefix)) is not None for key in inner.values())

    prefix = max(prefixes, key=known)  # of equals the first, which is the shortest
    return {key: name.removeprefix(prefix) for key, name in inner.items()}, prefix
