"""Quantised while loading, saved and read back; what other recipes, other files and other dtypes meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import INT8, make_model, small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_int8 import rollout

from lingbot_kernels import CausalLingBotTransformer, Int8Recipe, LingBotConfig
from lingbot_kernels.models.checkpoint import infer_config, save_checkpoint, stored_recipe
from lingbot_kernels.models.checkpoint_files import CheckpointError
from lingbot_kernels.realtime.memory import weights_memory

Model = CausalLingBotTransformer


def same_model(a: Model, b: Model) -> bool:
    """Whether all weights, and a rollout, have the same bits."""
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys()
    weights = all(own[name].dtype == x.dtype and torch.equal(own[name], x) for name, x in other.items())
    return weights and all(torch.equal(x, y) for x, y in zip(rollout(a, 2), rollout(b, 2), strict=True))


@pytest.mark.parametrize(
    "recipe", [Int8Recipe(), INT8, Int8Recipe(rotate=False, leave_out=("blocks.1.ffn_up",), seed=4)]
)
def test_loading_as_int8_equals_quantising_in_memory(tmp_path: Path, recipe: Int8Recipe) -> None:
    model = make_model(small_config(window_frames=8), torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, precision=recipe)
    model.quantize(recipe)
    assert loaded.recipe == recipe and same_model(loaded, model)


@pytest.mark.parametrize("max_shard_bytes", [2**40, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantised_model_is_read_back(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    recipe = Int8Recipe(leave_out=("blocks.0",), seed=11)
    model = make_model(small_config(window_frames=8), dtype, recipe=recipe)
    save_checkpoint(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == recipe.to_dict()
    assert stored_recipe(tmp_path) == recipe and infer_config(tmp_path) == model.config
    for precision in (None, recipe):
        loaded = Model.from_pretrained(tmp_path, dtype=dtype, precision=precision)
        assert loaded.recipe == recipe and same_model(loaded, model)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 20_000)
    stored = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            stored |= {key: shard.get_tensor(key).dtype for key in shard.keys()}  # noqa: SIM118
    assert stored["blocks.1.self_attn.k.weight"] == stored["blocks.1.ffn.0.weight"] == torch.int8
    assert stored["blocks.1.self_attn.k.weight_scale"] == torch.float32
    assert stored["blocks.0.self_attn.k.weight"] == stored["blocks.1.self_attn.k.bias"] == dtype


def test_the_fast_engines_names_are_quantised_on_the_way(tmp_path: Path) -> None:
    from lingbot_kernels.models.checkpoint import rename

    model = make_model(small_config(window_frames=8), torch.bfloat16)
    weights = {rename(name, "fastvideo"): x.contiguous() for name, x in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = Model.from_pretrained(tmp_path, cfg=model.config, precision="int8")
    model.quantize()
    assert same_model(loaded, model)


def test_an_unquantised_checkpoint_stays_the_default(tmp_path: Path) -> None:
    model = make_model(small_config(window_frames=8), torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "quantization" not in json.loads((tmp_path / "config.json").read_text())
    for precision in (None, "bfloat16"):
        loaded = Model.from_pretrained(tmp_path, precision=precision)
        assert loaded.recipe is None and same_model(loaded, model)
    with pytest.raises(ValueError, match="precision: got 'int4', must be"):
        Model.from_pretrained(tmp_path, precision="int4")


@pytest.mark.parametrize("precision", ["bfloat16", "int8", Int8Recipe(seed=3, rotate=False)])
def test_another_recipe_than_the_stored_one_is_refused(tmp_path: Path, precision: str | Int8Recipe) -> None:
    make_model(small_config(), recipe=Int8Recipe(seed=3)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"quantised by Int8Recipe\(seed=3\), and can be read in no other way; got"
    ):
        Model.from_pretrained(tmp_path, precision=precision)


def test_files_of_two_rotations_are_told_apart(tmp_path: Path) -> None:
    """Weights of one seed beside the config.json, or a file, of another: nothing but their metadata shows it."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        save_checkpoint(make_model(small_config(), recipe=Int8Recipe(seed=seed)), folder, max_shard_bytes=60_000)
    names = sorted(file.name for file in one.glob("*.safetensors"))
    kept = (one / "config.json").read_text()
    (one / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"must be quantised by one recipe .*Int8Recipe\(seed=1\).*seed=2"):
        Model.from_pretrained(one)
    (one / "config.json").write_text(kept)
    (one / names[-1]).write_bytes((other / names[-1]).read_bytes())
    with pytest.raises(CheckpointError, match="the files are of different checkpoints"):
        Model.from_pretrained(one)


def test_a_later_format_and_a_bare_int8_file_are_refused(tmp_path: Path) -> None:
    model = make_model(small_config(), recipe=Int8Recipe())
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    later = json.dumps({**Int8Recipe().to_dict(), "format": "int8-hadamard256"})
    save_file(weights, file, metadata={"quantization": later})
    with pytest.raises(CheckpointError, match=r"quantised in a way that can't be read: .*'int8-hadamard256'"):
        Model.from_pretrained(tmp_path)
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"stored as I8 in .*must be one of"):
        Model.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = make_model(small_config(), torch.bfloat16)
    with torch.no_grad():
        model.blocks[1].cross_attn.o.weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks.1.cross_attn.o.weight: in .*got a NaN or Inf, must be finite"):
        Model.from_pretrained(tmp_path, precision="int8")


@pytest.mark.parametrize("recipe", [None, Int8Recipe(), INT8, Int8Recipe(leave_out=("blocks.1",))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_plan_tells_the_weights_to_the_byte(recipe: Int8Recipe | None, dtype: torch.dtype) -> None:
    for cfg in (small_config(num_layers=2), LingBotConfig.preset("tiny")):
        model = make_model(cfg, dtype, recipe=recipe)
        assert weights_memory(cfg, dtype, recipe).total == sum(x.nbytes for x in model.parameters())


def test_what_the_14b_model_needs() -> None:
    """The camera's products and the text's K and V stay in bfloat16: 12 of the 35 GiB."""
    cfg = LingBotConfig.preset("lingbot-world-14b")
    sizes = [weights_memory(cfg, torch.bfloat16, recipe).total / 2**30 for recipe in (None, Int8Recipe(), INT8)]
    assert [round(size, 1) for size in sizes] == [34.5, 23.4, 19.5]
