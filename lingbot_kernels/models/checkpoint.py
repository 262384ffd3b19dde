"""Checkpoints of LingBot-World in safetensors files: three namings in, the official one out.
Everything is checked from the headers first; weights then go tensor by tensor from a memory map into the parameters."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.files import read_json
from lingbot_kernels.models._inputs import Dtype, as_dtype
from lingbot_kernels.models.checkpoint_files import RECIPE, STEMS, CheckpointError, Entry, Headers, read_headers
from lingbot_kernels.models.checkpoint_names import (
    BLOCK_INDEX,
    CAMERA_KEY,
    NAMINGS,
    detect_naming,
    official_name,
    parameter_shapes,
    rename,
    stored_as,
    unwrapped,
)
from lingbot_kernels.models.quantize import ValueFold, int8_slots, quantize, value_folds
from lingbot_kernels.quantization import Int8Linear, Int8Recipe

__all__ = [
    "NAMINGS",
    "CheckpointError",
    "detect_naming",
    "infer_config",
    "load_checkpoint",
    "official_name",
    "parameter_shapes",
    "rename",
    "save_checkpoint",
    "stored_recipe",
]

# A shard is mapped anew after this many bytes, so that pages already copied do not count as memory in use.
_MAPPED_BYTES = 64 * 2**20


def load_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    device: torch.device | str | None = None,
    recipe: Int8Recipe | None = None,
) -> None:
    """Copy a checkpoint into a model, converting to the parameters' dtype and device on the way.

    `model.state_dict()` must return tensors under official names that are views of the live parameters, so a fused
    projection is filled through its parts. A model on the meta device is given memory first. Memory in use stays near
    one copy of the weights: a file is memory-mapped, and one tensor of it is converted at a time.

    Args:
        model: what to fill.
        folder: a folder of safetensors shards, with or without an index, or one safetensors file; in any of NAMINGS.
        dtype: of all parameters, also by name; None leaves each as it is.
        device: of all parameters; None leaves them where they are, and means the CPU for a model on the meta device.
        recipe: of a `CausalLingBotTransformer` on the meta device, to have its weights quantised: those of a checkpoint
            in 16 or 32 bits on the way, tensor by tensor, those of one that is quantised by this recipe as they are.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped keys, damaged or missing files, an index that does not
            fit them: all of them in one error, before anything in the model is changed.
    """
    path, dtype = Path(folder), as_dtype("dtype", dtype)
    headers = read_headers(path)
    stored, problems = _recipe(path, headers)
    if stored is not None:
        if recipe == stored and getattr(model, "recipe", None) is None:
            quantize(model, stored)
        problems += _other_recipe(stored, getattr(model, "recipe", None) or recipe)
    slots = {name: (tuple(slot.shape), slot.dtype) for name, slot in model.state_dict().items()}
    matches, unfit = _match(headers, slots)
    if problems := headers.problems + (problems or unfit):
        raise CheckpointError(path, problems)
    _, prefix = unwrapped(headers.entries)
    if prefix:
        warnings.warn(f"{path}: every key starts with {prefix!r}; read without it", stacklevel=2)
    if recipe is not None and stored is None:
        quantize(model, recipe)
    _place(model, dtype, device)
    if recipe is None or stored is not None:
        _copy(matches, model.state_dict(), {}, {})
    else:
        _copy(matches, model.state_dict(), int8_slots(model), {x.key: x for x in value_folds(model, recipe)})


def _copy(
    matches: dict[str, Entry],
    slots: dict[str, torch.Tensor],
    quantized: dict[str, tuple[Int8Linear, slice]],
    folds: dict[str, ValueFold],
) -> None:
    """Fill the slots from the files, those of `quantized` by their codes, with the biases that `folds` move in place
    before the weights that they are moved by.
    """
    biases = {name: entry for name, entry in matches.items() if folds and name.endswith(".bias")}
    weights = {name: entry for name, entry in matches.items() if name not in biases}
    with torch.no_grad():
        for group in itertools.chain(_groups(biases), _groups(weights)):
            with safe_open(group[0][1].file, framework="pt", device="cpu") as shard:
                for name, entry in group:
                    _fill(
                        shard.get_tensor(entry.key), name, entry, slots, quantized, folds
                    )  # let go of before the next


def _fill(
    tensor: torch.Tensor,
    name: str,
    entry: Entry,
    slots: dict[str, torch.Tensor],
    quantized: dict[str, tuple[Int8Linear, slice]],
    folds: dict[str, ValueFold],
) -> None:
    if name not in quantized:
        slots[name].copy_(tensor.view(slots[name].shape))
        return
    layer, rows = quantized[name]
    try:
        layer.fill(tensor, rows)
    except ValueError as error:
        raise CheckpointError(entry.file.parent, [f"{entry.key}: in {entry.file.name}: {error}"]) from error
    if name in folds:
        folds[name].apply(tensor.to(layer.bias.dtype))


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write `model.state_dict()` under official names, and `model.config` as config.json, with the recipe of quantised
    weights in it and in each file's metadata.

    One file `diffusion_pytorch_model.safetensors`, or numbered shards and an index. Files are written under temporary
    names and renamed at the end; those of an earlier checkpoint are then removed. Memory in use grows by one shard.

    Args:
        model: with `state_dict()` as for `load_checkpoint`, and `config`, a LingBotConfig.
        folder: created where it does not exist.
        max_shard_bytes: of tensor data in a file; a larger tensor has a file of its own.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, must be positive")
    config: Any = model.config
    shapes = parameter_shapes(config)
    slots = {name: slot.detach() for name, slot in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, slot in slots.items():
        if slot.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= slot.nbytes
    stem, count = STEMS[0], len(shards)
    files = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [f"{stem}.safetensors"]
    recipe: Int8Recipe | None = getattr(model, "recipe", None)
    metadata = {"format": "pt"}
    texts: dict[str, dict[str, Any]] = {"config.json": config.to_dict()}
    if recipe is not None:
        texts["config.json"][RECIPE] = recipe.to_dict()
        metadata[RECIPE] = json.dumps(recipe.to_dict())
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(slot.nbytes for slot in slots.values())
        texts[f"{stem}.safetensors.index.json"] = {"metadata": {"total_size": size}, "weight_map": weight_map}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial" for name in [*files, *texts]}
    try:
        for name, content in texts.items():
            partial[name].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file, names in zip(files, shards, strict=True):
            tensors = {name: slots[name].to("cpu", copy=True) for name in names}
            for name in tensors.keys() & shapes.keys():
                if tensors[name].dtype != torch.int8:  # codes may be padded
                    tensors[name] = tensors[name].reshape(shapes[name])
            save_file(tensors, partial[file], metadata=metadata)
            del tensors  # before the next shard is copied
            shutil.copymode(partial["config.json"], partial[file])  # save_file makes files that only the owner can read
        for name, source in partial.items():
            os.replace(source, folder / name)
    finally:
        for source in partial.values():
            source.unlink(missing_ok=True)
    for old in [*folder.glob(f"{stem}*.safetensors"), folder / f"{stem}.safetensors.index.json"]:
        if old.name not in partial:
            old.unlink(missing_ok=True)


def infer_config(folder: str | os.PathLike[str]) -> LingBotConfig:
    """The configuration of a checkpoint: from its config.json where there is one, else from the shapes it holds.

    Whether there are camera layers is read from the keys, unless config.json says so. Shapes do not tell the number of
    heads: it is taken as dim / 128, as in the whole Wan family; nor the window, text_len, eps and rope_theta: defaults.

    Raises:
        CheckpointError: the files cannot be read, or the shapes are not those of such a network.
    """
    path = Path(folder)
    headers = read_headers(path)
    if headers.problems:
        raise CheckpointError(path, headers.problems)
    shapes = {name: entry.shape for name, entry in _translate(headers)[0].items()}
    camera = any(CAMERA_KEY.match(name) for name in shapes)
    description = (path if path.is_dir() else path.parent) / "config.json"
    if description.is_file():
        config = LingBotConfig.from_json(description)
        states_camera = "camera" in read_json(description)
        return config if states_camera else dataclasses.replace(config, camera=camera)
    needed = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    absent = [name for name in (*needed, "head.head.weight") if len(shapes.get(name, ())) < 2]
    if absent:
        raise CheckpointError(path, [f"no config.json, and no {name} to read sizes from" for name in absent])
    patch = shapes["patch_embedding.weight"]
    frames, rows, columns = patch[2:] if len(patch) == 5 else (1, 2, 2)
    patch_volume = frames * rows * columns
    dim = patch[0]
    if dim % 128:
        raise CheckpointError(path, [f"no config.json, and dim {dim} is no multiple of 128: num_heads is unknown"])
    try:
        return LingBotConfig(
            dim=dim,
            num_heads=dim // 128,
            num_layers=1 + max(int(block[1]) for name in shapes if (block := BLOCK_INDEX.match(name))),
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            in_channels=patch[1] if len(patch) == 5 else patch[1] // patch_volume,
            out_channels=shapes["head.head.weight"][0] // patch_volume,
            patch_size=(frames, rows, columns),
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
            camera=camera,
        )
    except ValueError as error:
        raise CheckpointError(path, [f"the shapes give no valid configuration: {error}"]) from error


def stored_recipe(folder: str | os.PathLike[str]) -> Int8Recipe | None:
    """The recipe that a checkpoint's weights are quantised by; None where they are not.

    Raises:
        CheckpointError: its files, or they and config.json, disagree on it, or it is of a later format.
    """
    path = Path(folder)
    recipe, problems = _recipe(path, read_headers(path))
    if problems:
        raise CheckpointError(path, problems)
    return recipe


def _recipe(path: Path, headers: Headers) -> tuple[Int8Recipe | None, list[str]]:
    """The recipe in the files' metadata, and what is wrong with it."""
    said: dict[str, Any] = {}
    problems = []
    for file in sorted({entry.file.name for entry in headers.entries.values()}):
        try:
            said[file] = Int8Recipe.from_dict(json.loads(headers.recipes[file])) if file in headers.recipes else None
        except (ValueError, TypeError) as error:
            problems.append(f"{file}: its weights are quantised in a way that can't be read: {error}")
    description = (path if path.is_dir() else path.parent) / "config.json"
    if any(recipe is not None for recipe in said.values()) and description.is_file():
        try:
            content = read_json(description)
            said[description.name] = Int8Recipe.from_dict(content[RECIPE]) if RECIPE in content else None
        except (ValueError, TypeError) as error:
            problems.append(f"{description.name}: {error}")
    if len(set(said.values())) > 1:
        each = "; ".join(f"{file}: {recipe or 'not quantised'}" for file, recipe in said.items())
        problems.append(f"the files are of different checkpoints, must be quantised by one recipe ({each})")
    return next(iter(said.values()), None), problems


def _other_recipe(stored: Int8Recipe, wanted: Int8Recipe | None) -> list[str]:
    """What is wrong with reading weights quantised by `stored` into a model that wants others."""
    if wanted == stored:
        return []
    return [
        f"the weights are quantised by {stored}, and can be read in no other way; got {wanted or 'bfloat16'}, must be "
        "precision=None or that recipe"
    ]


def _translate(headers: Headers) -> tuple[dict[str, Entry], set[str], list[str], str]:
    """(entries by official name, official names of unreadable keys, problems, naming)."""
    names, _ = unwrapped([*headers.entries, *headers.unreadable])
    naming = detect_naming(names.values())
    found: dict[str, Entry] = {}
    problems = []
    for key, entry in headers.entries.items():
        name = official_name(names[key], naming)
        if name is None:
            problems.append(f"{key}: unexpected, in {entry.file.name} ({naming} naming)")
        elif name in found:
            problems.append(f"{key}: in {entry.file.name}, stands for {name}, as {found[name].key} does")
        else:
            found[name] = entry
    unreadable = {official_name(names[key], naming) or key for key in headers.unreadable}
    return found, unreadable, problems, naming


def _match(
    headers: Headers, slots: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> tuple[dict[str, Entry], list[str]]:
    """Pair the model's slots (official name -> shape, dtype) with the checkpoint's entries; say what does not fit."""
    found, unreadable, problems, naming = _translate(headers)
    missing = [name for name in slots if name not in found and name not in unreadable]
    if not headers.complete:
        missing = []
    problems += [f"{name}: missing ({naming} key {stored_as(name, naming)})" for name in missing]
    unexpected = [name for name in found if name not in slots]
    problems += [f"{found[name].key}: unexpected, in {found[name].file.name}" for name in unexpected]
    for name, entry in found.items():
        if name not in slots:
            continue
        shape, dtype = slots[name]
        if not _same_values(name, entry.shape, shape):
            problems.append(f"{entry.key}: shape {list(entry.shape)} in {entry.file.name}, must be {list(shape)}")
        elif (entry.dtype == "I8") != (dtype == torch.int8):
            problems.append(f"{entry.key}: stored as {entry.dtype} in {entry.file.name}, must be {dtype}")
    if found and not any(map(CAMERA_KEY.match, found)) and any(CAMERA_KEY.match(name) for name in missing):
        problems.append("the checkpoint has no camera keys: it needs a model with camera=False")
    if any(CAMERA_KEY.match(name) for name in unexpected) and not any(CAMERA_KEY.match(name) for name in slots):
        problems.append("the checkpoint has camera keys: it needs a model with camera=True")
    return {name: entry for name, entry in found.items() if name in slots}, problems


def _same_values(name: str, stored: tuple[int, ...], slot: tuple[int, ...]) -> bool:
    """Whether a stored shape holds a slot's values in the same order.

    A patch embedding is a Conv3d or a Linear over (channel, frame, row, column); a modulation may lack its batch axis.
    """
    if name.startswith("patch_embedding") and name.endswith(".weight"):
        return len(stored) > 1 and stored[:1] == slot[:1] and math.prod(stored) == math.prod(slot)
    if name.endswith("modulation"):
        return [n for n in stored if n != 1] == [n for n in slot if n != 1]
    return stored == slot


def _place(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        own = {f"{name}.signs" for name, module in model.named_modules() if isinstance(module, Int8Linear)}
        buffers = [name for name, _ in model.named_buffers() if name not in own]  # signs come back by themselves
        if buffers:
            raise ValueError(f"model is on the meta device and has buffers that no checkpoint fills: {buffers}")
        model.to(dtype=dtype).to_empty(device=device or "cpu")
    else:
        model.to(dtype=dtype, device=device)


def _groups(matches: dict[str, Entry]) -> Iterator[list[tuple[str, Entry]]]:
    """The matched tensors in groups of one file and at most _MAPPED_BYTES (or one tensor)."""
    group: list[tuple[str, Entry]] = []
    nbytes = 0
    for name, entry in sorted(matches.items(), key=lambda item: item[1].file.name):
        if group and (group[0][1].file != entry.file or nbytes + entry.nbytes > _MAPPED_BYTES):
            yield group
            group, nbytes = [], 0
        group.append((name, entry))
        nbytes += entry.nbytes
    if group:
        yield group
