"""Checkpoints as people have them: wrapped, half downloaded, in other formats. Read where that is harmless, else named
in one sentence that says what to do.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models.checkpoint import NAMINGS, CheckpointError, infer_config, load_checkpoint, rename
from tests.models.test_checkpoint import CONFIG, StandIn, random_weights, write_shards

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4943\n"


def load(folder):
    """The stand-in's weights after loading, and what was said."""
    model = StandIn()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_checkpoint(model, folder)
    return model.state_dict(), [str(warning.message) for warning in said]


def only_problem(folder):
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(StandIn(), folder)
    assert len(refused.value.problems) == 1, refused.value.problems
    return refused.value.problems[0]


def same(loaded, weights):
    return all(torch.equal(loaded[name], weight.view(loaded[name].shape)) for name, weight in weights.items())


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.diffusion_model.", "a.b.c."]
)
def test_a_prefix_that_all_keys_share_is_taken_off_and_said_once(tmp_path, prefix, naming):
    weights = {name: w for name, w in random_weights().items() if naming != "diffusers" or not _is_camera(name)}
    if naming == "diffusers":
        weights_in = weights
        config = LingBotConfig.from_dict({**CONFIG.to_dict(), "camera": False})
        model = StandIn(config)
    else:
        weights_in, model = weights, StandIn()
    write_shards(tmp_path, {prefix + rename(name, naming): w for name, w in weights_in.items()})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_checkpoint(model, tmp_path)
    assert same(model.state_dict(), weights_in)
    inner = prefix.replace("_orig_mod.", "")
    expected = [f"every key starts with {inner!r}"] if inner else []
    assert [text for text in expected if text in str(said[0].message)] == expected
    assert len(said) == len(expected)


def _is_camera(name):
    return ".cam_" in name or name.startswith(("c2ws_", "patch_embedding_wancamctrl"))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_single_blocks_are_taken_off(tmp_path, wrapper):
    weights = random_weights()
    wrapped = {name.replace("blocks.1.", f"blocks.1.{wrapper}.", 1): w for name, w in weights.items()}
    write_shards(tmp_path, wrapped)
    loaded, said = load(tmp_path)
    assert same(loaded, weights) and not said


def test_a_key_that_stands_twice_under_two_wrappers_is_refused(tmp_path):
    weights = random_weights()
    write_shards(tmp_path, {**weights, "blocks.0._orig_mod.norm3.weight": weights["blocks.0.norm3.weight"] + 1})
    assert "stands for blocks.0.norm3.weight, as" in only_problem(tmp_path)


def test_a_shared_prefix_that_makes_nothing_known_is_left_alone(tmp_path):
    save_file({"encoder.a": torch.ones(1), "encoder.b": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.a: unexpected"):
        load_checkpoint(StandIn(), tmp_path)


def test_a_byte_order_mark_is_read(tmp_path):
    weights = random_weights()
    write_shards(tmp_path, weights)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG.to_dict()).encode())
    assert infer_config(tmp_path) == CONFIG
    loaded, said = load(tmp_path)
    assert same(loaded, weights) and not said


@pytest.mark.parametrize("what", ["shard", "index", "config"])
def test_a_git_lfs_pointer_is_named(tmp_path, what):
    names = {
        "shard": "diffusion_pytorch_model-00001-of-00003.safetensors",
        "index": "diffusion_pytorch_model.safetensors.index.json",
        "config": "config.json",
    }
    write_shards(tmp_path, random_weights())
    (tmp_path / names[what]).write_text(POINTER)
    if what == "config":
        with pytest.raises(ValueError, match=r"config\.json: is a Git LFS pointer.*git lfs pull"):
            infer_config(tmp_path)
    else:
        assert "is a Git LFS pointer, not the file itself; run `git lfs pull`" in only_problem(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_model.bin", "PyTorch pickles"),
        ("wan.pt", "PyTorch pickles"),
        ("wan.pth", "PyTorch pickles"),
        ("wan.ckpt", "PyTorch pickles"),
        ("wan-Q8_0.gguf", "GGUF files"),
    ],
)
def test_a_folder_in_another_format_is_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    problem = only_problem(tmp_path)
    assert f"it has {kind} ({name})" in problem and "convert them to safetensors" in problem


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_float8_weights_with_scales_are_one_sentence(tmp_path, suffix):
    weights = random_weights()
    for name in [name for name in weights if name.endswith("ffn.0.weight") or name.endswith("self_attn.q.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[name.removesuffix("weight") + suffix] = torch.ones(1)
    weights["scaled_fp8"] = torch.zeros(2)
    write_shards(tmp_path, weights)
    problem = only_problem(tmp_path)
    assert "are stored as F8_E4M3: float8 weights can't be read; take the bfloat16 checkpoint" in problem


def test_a_config_without_its_class_says_how_it_was_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG.to_dict(), "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"unknown field 'hidden_act'.*without _class_name it is read as this project"):
        LingBotConfig.from_json(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", "\x00"])
def test_json_that_can_not_be_read_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        LingBotConfig.from_json(path)


def test_json_without_end_is_not_read_into_memory(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte
    with pytest.raises(ValueError, match="must have at most"):
        LingBotConfig.from_json(path)
