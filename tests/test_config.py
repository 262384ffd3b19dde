"""LingBotConfig: presets, parameter counts, refusals, and the three kinds of config.json."""

import dataclasses
import json
import subprocess
import sys

import pytest

from lingbot_kernels.config import PRESETS, LingBotConfig

SMALL = {"dim": 96, "num_heads": 4, "num_layers": 2, "ffn_dim": 160}


def test_parameter_counts_of_the_published_models():
    assert LingBotConfig.preset("lingbot-world-14b").num_parameters() == 18_544_332_864
    assert LingBotConfig.preset("lingbot-world-1.3b").num_parameters() == 1_709_502_016


def test_parameter_count_without_camera():
    config = LingBotConfig.preset("tiny")
    d = config.dim
    camera = 1536 * d + d + 2 * (d * d + d) + config.num_layers * 4 * (d * d + d)
    assert config.num_parameters() - dataclasses.replace(config, camera=False).num_parameters() == camera


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = LingBotConfig.preset(name)
    assert LingBotConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.patch_volume == 4
    assert hash(config) == hash(LingBotConfig.preset(name))


def test_head_dim_of_the_published_models():
    for name in ("lingbot-world-14b", "lingbot-world-1.3b"):
        config = LingBotConfig.preset(name)
        assert config.head_dim == 128


def test_preset_overrides():
    config = LingBotConfig.preset("tiny", sink_frames=9, residual_dtype="float32")
    assert (config.sink_frames, config.residual_dtype, config.dim) == (9, "float32", 128)
    with pytest.raises(ValueError, match="'sink'"):
        LingBotConfig.preset("tiny", sink=9)
    with pytest.raises(ValueError, match=r"'huge'.*tiny"):
        LingBotConfig.preset("huge")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LingBotConfig.preset("tiny").dim = 3


@pytest.mark.parametrize(
    ("field", "value", "requirement"),
    [
        ("dim", 0, "positive integer"),
        ("dim", 96.0, "positive integer"),
        ("num_layers", True, "positive integer"),
        ("dim", 98, "multiple of num_heads = 4"),
        ("dim", 92, "even head_dim"),
        ("dim", 16, "even head_dim >= 6"),
        ("freq_dim", 63, "even"),
        ("patch_size", (2, 2), "three positive integers"),
        ("patch_size", (1, 2, 0), "three positive integers"),
        ("patch_size", (2, 2, 2), "1 in its first place"),
        ("in_channels", 8, ">= out_channels = 16"),
        ("sink_frames", -1, ">= 0"),
        ("sink_frames", 18, "< window_frames = 18"),
        ("frames_per_chunk", 16, "<= window_frames - sink_frames = 15"),
        ("window_frames", 0, "positive integer"),
        ("residual_dtype", "float16", "'bfloat16' or 'float32'"),
        ("eps", 0.0, "positive finite"),
        ("eps", "1e-6", "positive finite"),
        ("rope_theta", float("inf"), "positive finite"),
        ("camera", 1, "True or False"),
    ],
)
def test_refusals_name_field_value_and_requirement(field, value, requirement):
    with pytest.raises(ValueError) as caught:
        LingBotConfig(**{**SMALL, field: value})
    message = str(caught.value)
    assert f"LingBotConfig.{field} is {value!r}" in message
    assert requirement in message


def test_limits_are_accepted():
    LingBotConfig(**SMALL, window_frames=4, sink_frames=0, frames_per_chunk=4)
    LingBotConfig(**SMALL, window_frames=18, sink_frames=15, frames_per_chunk=3)
    assert LingBotConfig(**SMALL, patch_size=[1, 2, 2]).patch_size == (1, 2, 2)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="missing field 'num_heads', missing field 'ffn_dim'"):
        LingBotConfig.from_dict({"dim": 96, "num_layers": 2})


def _write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_own_json(tmp_path):
    config = LingBotConfig.preset("tiny", camera=False, window_frames=9)
    assert LingBotConfig.from_json(_write(tmp_path / "config.json", config.to_dict())) == config
    with pytest.raises(ValueError, match=r"config\.json.*unknown field 'windows'"):
        LingBotConfig.from_json(_write(tmp_path / "config.json", {**config.to_dict(), "windows": 9}))


OFFICIAL = {
    "_class_name": "WanModel",
    "model_type": "i2v",
    "control_type": "cam",
    "patch_size": [1, 2, 2],
    "text_len": 512,
    "in_dim": 36,
    "dim": 5120,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 40,
    "num_layers": 40,
    "local_attn_size": 18,
    "sink_size": 9,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def test_official_json(tmp_path):
    path = _write(tmp_path / "config.json", OFFICIAL)
    assert LingBotConfig.from_json(path) == LingBotConfig.preset("lingbot-world-14b", sink_frames=9)
    path = _write(path, {**OFFICIAL, "local_attn_size": -1, "sink_size": 6, "chunk_size": 4})
    assert LingBotConfig.from_json(path) == LingBotConfig.preset("lingbot-world-14b", sink_frames=6, frames_per_chunk=4)


DIFFUSERS = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.36.0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 36,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def test_diffusers_json(tmp_path):
    path = _write(tmp_path / "config.json", DIFFUSERS)
    assert LingBotConfig.from_json(path) == LingBotConfig.preset("lingbot-world-1.3b", camera=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", None),
        ("cross_attn_norm", False),
        ("added_kv_proj_dim", 5120),
        ("image_dim", 1280),
        ("control_type", "act"),
    ],
)
def test_other_networks_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} is {value!r}"):
        LingBotConfig.from_json(_write(tmp_path / "config.json", {**DIFFUSERS, key: value}))


def test_bad_json_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        LingBotConfig.from_json(path)
    with pytest.raises(ValueError, match=r"config\.json: holds list"):
        LingBotConfig.from_json(_write(path, [1]))
    with pytest.raises(ValueError, match="missing field 'dim'"):
        LingBotConfig.from_json(_write(path, {"model_type": "i2v", "num_heads": 2, "num_layers": 1, "ffn_dim": 8}))


def test_config_does_not_load_torch():
    code = "import sys, lingbot_kernels.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
