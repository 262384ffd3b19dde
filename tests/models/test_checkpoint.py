"""Checkpoints: round trips in three namings, every kind of damage in one error, and memory near one copy."""

import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models import checkpoint
from lingbot_kernels.models.checkpoint import (
    NAMINGS,
    CheckpointError,
    detect_naming,
    infer_config,
    load_checkpoint,
    official_name,
    parameter_shapes,
    rename,
    save_checkpoint,
)
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer

CONFIG = LingBotConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=64, text_dim=24, text_len=8, freq_dim=32)
WITHOUT_CAMERA = LingBotConfig.from_dict({**CONFIG.to_dict(), "camera": False})


class StandIn(nn.Module):
    """Has a checkpoint's parameters, with q, k, v of a block in one tensor, and official names in its state dict."""

    def __init__(self, config=CONFIG, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config = config
        self.slots = {}
        for name, shape in parameter_shapes(config).items():
            block, part = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
            fused = block.endswith("self_attn") and part in ("q", "k", "v")
            own = name.replace(f"self_attn.{part}.", "self_attn.qkv.") if fused else name
            index = "qkv".index(part) if fused else 0
            if index == 0:
                rows = 3 * shape[0] if fused else shape[0]
                value = torch.full((rows, *shape[1:]), math.nan, dtype=dtype, device=device)
                self.register_parameter(own.replace(".", "/"), nn.Parameter(value))
            self.slots[name] = (own.replace(".", "/"), index * shape[0], shape[0])

    def state_dict(self, *args, **kwargs):
        parameters = dict(self.named_parameters())
        return {name: parameters[own].detach()[start : start + n] for name, (own, start, n) in self.slots.items()}


def random_weights(config=CONFIG, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(config).items()}


def write_shards(folder, weights, *, shards=3, index=True, stem="diffusion_pytorch_model"):
    folder.mkdir(exist_ok=True)
    names = list(weights)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        weight_map.update(dict.fromkeys(part, file))
        save_file(part, folder / file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def edit_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def assert_equal(model, weights):
    slots = model.state_dict()
    assert slots.keys() == weights.keys()
    for name, slot in slots.items():
        assert torch.equal(slot, weights[name].to(slot.dtype).view(slot.shape)), name


def assert_refused(model, folder, *expected):
    """One error has a line that contains each expected text, and the model keeps its values."""
    before = {name: slot.clone() for name, slot in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, folder, dtype=torch.float64)
    for text in expected:
        assert any(text in line for line in caught.value.problems), f"{text!r} not in\n{caught.value}"
        assert text in str(caught.value)
    for name, slot in model.state_dict().items():
        assert slot.dtype == before[name].dtype
        assert torch.equal(slot, before[name]) or (slot.isnan().all() and before[name].isnan().all())
    return caught.value.problems


# Names


@pytest.mark.parametrize("name", ["lingbot-world-14b", "lingbot-world-1.3b", "tiny"])
def test_shapes_add_up_to_the_parameter_count(name):
    config = LingBotConfig.preset(name)
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == config.num_parameters()


EXAMPLES = [  # official, FastVideo / sglang, diffusers
    ("patch_embedding.weight", "patch_embedding.proj.weight", "patch_embedding.weight"),
    ("patch_embedding_wancamctrl.bias", "patch_embedding_wancamctrl.proj.bias", None),
    ("c2ws_hidden_states_layer2.weight", "c2ws_mlp.fc_out.weight", None),
    (
        "text_embedding.2.weight",
        "condition_embedder.text_embedder.fc_out.weight",
        "condition_embedder.text_embedder.linear_2.weight",
    ),
    (
        "time_embedding.0.bias",
        "condition_embedder.time_embedder.mlp.fc_in.bias",
        "condition_embedder.time_embedder.linear_1.bias",
    ),
    (
        "time_projection.1.weight",
        "condition_embedder.time_modulation.linear.weight",
        "condition_embedder.time_proj.weight",
    ),
    ("head.head.weight", "proj_out.weight", "proj_out.weight"),
    ("head.modulation", "scale_shift_table", "scale_shift_table"),
    ("blocks.11.modulation", "blocks.11.scale_shift_table", "blocks.11.scale_shift_table"),
    ("blocks.0.self_attn.q.weight", "blocks.0.to_q.weight", "blocks.0.attn1.to_q.weight"),
    ("blocks.0.self_attn.o.bias", "blocks.0.to_out.bias", "blocks.0.attn1.to_out.0.bias"),
    ("blocks.0.self_attn.norm_k.weight", "blocks.0.norm_k.weight", "blocks.0.attn1.norm_k.weight"),
    ("blocks.3.norm3.weight", "blocks.3.self_attn_residual_norm.norm.weight", "blocks.3.norm2.weight"),
    ("blocks.3.cross_attn.v.weight", "blocks.3.attn2.to_v.weight", "blocks.3.attn2.to_v.weight"),
    ("blocks.3.cross_attn.o.weight", "blocks.3.attn2.to_out.weight", "blocks.3.attn2.to_out.0.weight"),
    ("blocks.3.cross_attn.norm_q.weight", "blocks.3.attn2.norm_q.weight", "blocks.3.attn2.norm_q.weight"),
    ("blocks.39.ffn.0.weight", "blocks.39.ffn.fc_in.weight", "blocks.39.ffn.net.0.proj.weight"),
    ("blocks.39.ffn.2.bias", "blocks.39.ffn.fc_out.bias", "blocks.39.ffn.net.2.bias"),
    ("blocks.0.cam_injector_layer1.weight", "blocks.0.cam_conditioner.cam_injector.fc_in.weight", None),
    ("blocks.0.cam_injector_layer2.weight", "blocks.0.cam_conditioner.cam_injector.fc_out.weight", None),
    ("blocks.0.cam_scale_layer.bias", "blocks.0.cam_conditioner.cam_scale_layer.bias", None),
    ("blocks.0.cam_shift_layer.weight", "blocks.0.cam_conditioner.cam_shift_layer.weight", None),
]


@pytest.mark.parametrize(("official", "fastvideo", "diffusers"), EXAMPLES)
def test_names(official, fastvideo, diffusers):
    for naming, key in zip(NAMINGS, (official, fastvideo, diffusers), strict=True):
        if key is None:
            with pytest.raises(KeyError, match="diffusers naming"):
                rename(official, naming)
        else:
            assert rename(official, naming) == key
            assert official_name(key, naming) == official
            assert official_name(key) == official


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.norm1.weight",
        "blocks.00.norm3.weight",
        "blocks.*.norm3.weight",
        "blocks.x.norm3.weight",
        "norm3.weight",
        "head.modulation.weight",
        "blocks.0.self_attn.norm_q.bias",
        "",
    ],
)
def test_unknown_names(key):
    assert official_name(key) is None


def test_every_parameter_renames_back_and_namings_are_told_apart():
    for naming in NAMINGS:
        names = parameter_shapes(WITHOUT_CAMERA if naming == "diffusers" else CONFIG)
        keys = [rename(name, naming) for name in names]
        assert len(set(keys)) == len(names)
        assert [official_name(key, naming) for key in keys] == list(names)
        assert detect_naming(keys) == naming


# Reading what is right


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("wrapper", ["", "model.", "transformer."])
def test_round_trip_in_each_naming(tmp_path, naming, index, wrapper):
    config = WITHOUT_CAMERA if naming == "diffusers" else CONFIG
    weights = random_weights(config)
    write_shards(tmp_path, {wrapper + rename(name, naming): w for name, w in weights.items()}, index=index)
    model = StandIn(config)
    load_checkpoint(model, tmp_path)
    assert_equal(model, weights)
    save_checkpoint(model, tmp_path / "saved", max_shard_bytes=200_000)
    again = StandIn(config)
    load_checkpoint(again, tmp_path / "saved")
    assert_equal(again, weights)
    assert infer_config(tmp_path / "saved") == config


def test_one_file_and_a_folder_with_one_file(tmp_path):
    weights = random_weights()
    save_file(weights, tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = StandIn()
        load_checkpoint(model, path)
        assert_equal(model, weights)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtype_conversion(tmp_path, stored, wanted):
    weights = random_weights(dtype=stored)
    write_shards(tmp_path, weights)
    for model, dtype in ((StandIn(dtype=wanted), None), (StandIn(), wanted), (StandIn(device="meta"), wanted)):
        load_checkpoint(model, tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert_equal(model, weights)


def test_parameters_stored_in_another_shape(tmp_path):
    weights = random_weights()
    stored = dict(weights)
    stored["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    stored["patch_embedding_wancamctrl.weight"] = weights["patch_embedding_wancamctrl.weight"].view(128, 384, 1, 2, 2)
    stored["head.modulation"] = weights["head.modulation"][0]
    stored["blocks.1.modulation"] = weights["blocks.1.modulation"][None]
    write_shards(tmp_path, stored)
    model = StandIn()
    load_checkpoint(model, tmp_path)
    assert_equal(model, weights)
    assert infer_config(tmp_path) == LingBotConfig.from_dict({**CONFIG.to_dict(), "text_len": 512})


def test_meta_model_with_a_buffer_is_refused(tmp_path):
    write_shards(tmp_path, random_weights())
    model = StandIn(device="meta")
    model.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="'table'"):
        load_checkpoint(model, tmp_path)


# Writing


def test_save_writes_one_file_or_shards_with_an_index(tmp_path):
    weights = random_weights()
    write_shards(tmp_path / "in", weights)
    model = StandIn(dtype=torch.bfloat16)
    load_checkpoint(model, tmp_path / "in")
    out = tmp_path / "out"
    save_checkpoint(model, out, max_shard_bytes=100_000)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"diffusion_pytorch_model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    assert index["metadata"]["total_size"] == 2 * CONFIG.num_parameters()
    assert index["weight_map"].keys() == parameter_shapes(CONFIG).keys()
    for file in files:
        part = load_file(out / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 100_000 or len(part) == 1
    assert LingBotConfig.from_json(out / "config.json") == CONFIG
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1

    save_checkpoint(model, out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = StandIn(dtype=torch.bfloat16)
    load_checkpoint(again, out)
    assert_equal(again, weights)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = StandIn()
    write_shards(tmp_path / "in", random_weights())
    load_checkpoint(first, tmp_path / "in")
    save_checkpoint(first, tmp_path / "out", max_shard_bytes=100_000)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    calls = []

    def fail_at_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        save_file(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", fail_at_third)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(first, tmp_path / "out", max_shard_bytes=100_000)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_checkpoint(first, tmp_path / "out", max_shard_bytes=0)


# Everything that can be wrong


def test_missing_unexpected_and_wrongly_shaped_keys_in_one_error(tmp_path):
    weights = random_weights()
    del weights["blocks.1.self_attn.k.weight"], weights["head.modulation"]
    weights["blocks.0.norm1.weight"] = torch.zeros(3)
    weights["blocks.2.norm3.weight"] = torch.zeros(128)
    weights["blocks.0.ffn.0.weight"] = torch.zeros(128, 64)
    weights["patch_embedding.weight"] = torch.zeros(128, 143)
    weights["blocks.0.modulation"] = torch.zeros(6 * 128)
    problems = assert_refused(
        StandIn(),
        write_and_return(tmp_path, weights),
        "blocks.1.self_attn.k.weight: missing",
        "head.modulation: missing",
        "blocks.0.norm1.weight: unexpected",
        "blocks.2.norm3.weight: unexpected",
        "blocks.0.ffn.0.weight: shape [128, 64]",
        "must be [64, 128]",
        "patch_embedding.weight: shape [128, 143]",
        "blocks.0.modulation: shape [768]",
    )
    assert len(problems) == 7


def write_and_return(folder, weights, **options):
    write_shards(folder, weights, **options)
    return folder


def test_missing_key_is_told_in_the_names_of_the_file(tmp_path):
    weights = {rename(name, "fastvideo"): w for name, w in random_weights().items()}
    del weights["blocks.0.to_q.weight"]
    assert_refused(
        StandIn(),
        write_and_return(tmp_path, weights),
        "blocks.0.self_attn.q.weight: missing (fastvideo key blocks.0.to_q.weight)",
    )


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_shard(tmp_path, index, keep):
    folder = write_and_return(tmp_path, random_weights(), index=index)
    file = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    problems = assert_refused(StandIn(), folder, f"{file.name}: truncated or damaged")
    assert len(problems) == 1


def test_damaged_header_and_other_problems_together(tmp_path):
    weights = random_weights()
    weights["blocks.0.ffn.2.weight"] = torch.zeros(64, 64)
    weight_map = write_shards(tmp_path, weights)
    bad = next(file for name, file in weight_map.items() if file != weight_map["blocks.0.ffn.2.weight"])
    (tmp_path / bad).write_bytes(b"\x10" + bytes(7) + b"not a header at all, by no means")
    assert_refused(StandIn(), tmp_path, f"{bad}: truncated or damaged", "blocks.0.ffn.2.weight: shape [64, 64]")


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path, index):
    folder = write_and_return(tmp_path, random_weights(), index=index)
    (folder / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    problems = assert_refused(StandIn(), folder, "diffusion_pytorch_model-00003-of-00003.safetensors: no such file")
    assert len(problems) == 1


def test_index_that_does_not_fit_the_files(tmp_path):
    folder = write_and_return(tmp_path, random_weights())
    first, second = (f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2))
    moved = next(iter(load_file(folder / first)))

    def change(weight_map):
        del weight_map["head.head.bias"]
        weight_map[moved] = second
        weight_map["blocks.0.extra.weight"] = first

    edit_index(folder, change)
    problems = assert_refused(
        StandIn(),
        folder,
        "head.head.bias: in ",
        "but not in the index",
        f"{moved}: the index puts it in {second}, which does not hold it",
        f"blocks.0.extra.weight: the index puts it in {first}, which does not hold it",
    )
    assert len(problems) == 3


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_bad_index(tmp_path, content):
    folder = write_and_return(tmp_path, random_weights())
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    problems = assert_refused(StandIn(), folder, "diffusion_pytorch_model.safetensors.index.json: ")
    assert len(problems) == 1


def test_index_may_not_point_outside_the_folder(tmp_path):
    folder = write_and_return(tmp_path / "in", random_weights())
    edit_index(folder, lambda weight_map: weight_map.update({"head.head.bias": "../other.safetensors"}))
    assert_refused(StandIn(), folder, "names of files in the same folder")


def test_key_in_two_files(tmp_path):
    folder = write_and_return(tmp_path, random_weights(), index=False)
    save_file({"head.head.bias": torch.zeros(64)}, folder / "more.safetensors")
    assert_refused(StandIn(), folder, "head.head.bias: in both ")


def test_integer_weights(tmp_path):
    weights = random_weights()
    weights["head.head.bias"] = torch.zeros(64, dtype=torch.int8)
    assert_refused(StandIn(), write_and_return(tmp_path, weights), "head.head.bias: stored as I8")


def test_nothing_there(tmp_path):
    assert len(assert_refused(StandIn(), tmp_path / "none", "neither a folder nor a .safetensors file")) == 1
    assert len(assert_refused(StandIn(), tmp_path, "no .safetensors files")) == 1
    save_file({}, tmp_path / "model.safetensors")
    assert len(assert_refused(StandIn(), tmp_path, "head.head.bias: missing")) == len(parameter_shapes(CONFIG))
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    save_file({}, tmp_path / "pipeline" / "transformer" / "model.safetensors")
    assert_refused(StandIn(), tmp_path / "pipeline", "its subfolder transformer has some")


def test_camera_keys_must_agree_with_the_model(tmp_path):
    write_shards(tmp_path / "with", random_weights())
    write_shards(
        tmp_path / "without",
        {rename(name, "diffusers"): w for name, w in random_weights(WITHOUT_CAMERA).items()},
    )
    assert_refused(StandIn(WITHOUT_CAMERA), tmp_path / "with", "needs a model with camera=True")
    assert_refused(
        StandIn(),
        tmp_path / "without",
        "needs a model with camera=False",
        "cam_scale_layer.weight: missing (diffusers key none: this naming has no such parameter)",
    )


# The configuration of a checkpoint


@pytest.mark.parametrize("naming", NAMINGS)
def test_infer_config_from_shapes(tmp_path, naming):
    config = LingBotConfig(
        **{
            **(WITHOUT_CAMERA if naming == "diffusers" else CONFIG).to_dict(),
            "dim": 256,
            "num_heads": 2,
            "text_len": 512,
        }
    )
    shapes = {rename(name, naming): torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    write_shards(tmp_path, shapes)
    assert infer_config(tmp_path) == config


def test_infer_config_prefers_config_json_and_reads_camera_from_the_keys(tmp_path):
    official = {
        "model_type": "i2v",
        "dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "ffn_dim": 64,
        "in_dim": 36,
        "out_dim": 16,
    }
    write_shards(tmp_path, random_weights(WITHOUT_CAMERA))
    (tmp_path / "config.json").write_text(json.dumps(official))
    config = infer_config(tmp_path)
    assert (config.num_heads, config.camera) == (4, False)


def test_infer_config_refusals(tmp_path):
    save_file({"head.head.weight": torch.zeros(64, 128)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no patch_embedding\.weight"):
        infer_config(tmp_path)
    config = LingBotConfig.from_dict({**CONFIG.to_dict(), "dim": 96})
    save_file(random_weights(config), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="dim 96 is no multiple of 128"):
        infer_config(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder"):
        infer_config(tmp_path / "none")


# Memory


def test_only_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """No tensor of a shard is alive when the next is read."""
    write_shards(tmp_path, random_weights())
    alive = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.shard = safe_open(*args, **kwargs)

        def __enter__(self):
            self.shard.__enter__()
            return self

        def __exit__(self, *error):
            return self.shard.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.shard, name)

        def get_tensor(self, key):
            assert not any(reference() is not None for reference in alive)
            tensor = self.shard.get_tensor(key)
            alive.append(weakref.ref(tensor))
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    load_checkpoint(StandIn(), tmp_path)
    assert len(alive) == len(parameter_shapes(CONFIG))


PEAK = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from lingbot_kernels.config import LingBotConfig
from test_checkpoint import StandIn
from lingbot_kernels.models.checkpoint import load_checkpoint
config = LingBotConfig.from_dict({config!r})
model = StandIn(config, torch.bfloat16, "meta")
warm = torch.zeros(4, dtype=torch.bfloat16).copy_(torch.ones(4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_checkpoint(model, {folder!r}, device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(p.nbytes for p in model.parameters()))
"""


def test_peak_memory_of_loading_is_near_one_copy(tmp_path):
    """A float32 file of 0.5 GB into 0.25 GB of bfloat16 parameters: the peak may exceed those by the mapped window."""
    config = LingBotConfig(dim=1024, num_heads=8, num_layers=4, ffn_dim=4096, text_dim=512, freq_dim=64)
    shapes = parameter_shapes(config)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    code = PEAK.format(tests=str(Path(__file__).parent), config=config.to_dict(), folder=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    growth, size = int(out[0]), int(out[1])
    assert size == 2 * config.num_parameters()
    assert growth < 1.05 * size + checkpoint._MAPPED_BYTES + 32 * 2**20, f"{growth / size:.2f} copies"
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * checkpoint._MAPPED_BYTES


def test_saving_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    """No tensor of the shard before is alive when a shard is written."""
    alive = []

    def watch(tensors, *args, **kwargs):
        assert not any(reference() is not None for reference in alive)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", watch)
    save_checkpoint(StandIn(), tmp_path, max_shard_bytes=200_000)
    assert len(alive) == len(parameter_shapes(CONFIG))


# The network itself


@pytest.mark.parametrize("preset", ["lingbot-world-14b", "lingbot-world-1.3b", "tiny"])
@pytest.mark.parametrize("camera", [True, False])
def test_the_network_has_the_official_names_and_shapes(preset, camera):
    config = LingBotConfig.preset(preset, camera=camera)
    model = CausalLingBotTransformer(config, device="meta")
    shapes = {name: tuple(slot.shape) for name, slot in model.state_dict().items()}
    assert shapes == parameter_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_network_loads_each_naming_and_saves_the_official_one(tmp_path, naming):
    config = LingBotConfig.preset("tiny", camera=naming != "diffusers")
    weights = random_weights(config)
    write_shards(tmp_path / "in", {rename(name, naming): w for name, w in weights.items()})
    model = CausalLingBotTransformer.from_pretrained(tmp_path / "in", dtype=torch.float32, cfg=config)
    assert_equal(model, weights)
    model.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors").keys() == weights.keys()
    again = CausalLingBotTransformer.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert again.config == config
    assert_equal(again, weights)
