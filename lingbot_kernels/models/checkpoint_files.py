"""The files of a checkpoint: which there are, what their headers say, and what stands there in place of one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lingbot_kernels.files import LFS_POINTER, is_lfs_pointer, read_json

STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
RECIPE = "quantization"  # key of a quantised checkpoint's recipe, in every file's metadata and in config.json
_STORED_AS_FLOAT8 = re.compile(r": stored as F8_")
_SCALE = re.compile(r"scale_(weight|input)$|(weight|input)_scale(_inv)?$|^scaled_fp8$|\.scaled_fp8$")
_FOREIGN = {
    ".bin": "PyTorch pickles",
    ".pt": "PyTorch pickles",
    ".pth": "PyTorch pickles",
    ".ckpt": "PyTorch pickles",
    ".gguf": "GGUF files",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; `problems` has one line for each thing wrong with it."""

    def __init__(self, path: Path, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{path}: {count}", *self.problems]))


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return {"F64": 8, "F32": 4, "I8": 1}.get(self.dtype, 2) * math.prod(self.shape)


@dataclass
class Headers:
    """What the files of a checkpoint hold, by stored key, and what is wrong with them."""

    entries: dict[str, Entry]
    problems: list[str]
    unreadable: set[str]  # keys that the index puts in a file that cannot be read
    complete: bool  # False: an unreadable file may hold keys that nothing tells
    recipes: dict[str, str] = field(default_factory=dict)  # file name -> the recipe that its metadata has, as JSON


def read_headers(path: Path) -> Headers:
    """Read the header of every file of a checkpoint, and the index; no tensor data."""
    problems: list[str] = []
    index, files = _find_files(path, problems)
    headers = Headers({}, problems, set(), bool(files))
    for file in files:
        if not file.is_file():
            headers.problems.append(f"{file.name}: no such file")
            _give_up(headers, file, index)
            continue
        try:
            if is_lfs_pointer(file):
                headers.problems.append(f"{file.name}: {LFS_POINTER}")
                _give_up(headers, file, index)
                continue
            with safe_open(file, framework="pt", device="cpu") as shard:
                recipe = (shard.metadata() or {}).get(RECIPE)
                if recipe is not None:
                    headers.recipes[file.name] = recipe
                for key in shard.keys():  # noqa: SIM118, not a mapping
                    view = shard.get_slice(key)
                    _add(headers, Entry(file, key, tuple(view.get_shape()), view.get_dtype()), index)
        except SafetensorError as error:
            headers.problems.append(f"{file.name}: truncated or damaged: {error}")
            _give_up(headers, file, index)
        except OSError as error:
            headers.problems.append(f"{file.name}: can't be read: {error.strerror or error}")
            _give_up(headers, file, index)
    for key, name in (index or {}).items():
        if key not in headers.entries and key not in headers.unreadable:
            headers.problems.append(f"{key}: the index puts it in {name}, which does not hold it")
            headers.unreadable.add(key)
    _name_float8(headers)
    return headers


def _name_float8(headers: Headers) -> None:
    """Say in one sentence that weights are float8 with scales, in place of a line for each of their tensors."""
    float8 = [key for key, entry in headers.entries.items() if entry.dtype.startswith("F8_")]
    if not float8:
        return
    headers.problems = [line for line in headers.problems if not _STORED_AS_FLOAT8.search(line)]
    dtype = headers.entries[float8[0]].dtype
    headers.problems.append(
        f"{float8[0]} and {len(float8) - 1} more are stored as {dtype}: float8 weights can't be read; take the "
        "bfloat16 checkpoint, and precision='int8' to load it in eight bits"
    )
    headers.entries = {key: entry for key, entry in headers.entries.items() if not _SCALE.search(key)}


def _find_files(path: Path, problems: list[str]) -> tuple[dict[str, str] | None, list[Path]]:
    """The index's key -> file name, where there is an index, and all files to read."""
    if not path.is_dir():
        if path.suffix == ".safetensors" and path.is_file():
            return None, [path]
        problems.append("neither a folder nor a .safetensors file")
        return None, []
    for stem in STEMS:
        index_file = path / f"{stem}.safetensors.index.json"
        if index_file.is_file():
            return _read_index(index_file, problems)
        if (path / f"{stem}.safetensors").is_file():
            return None, [path / f"{stem}.safetensors"]
    files = {file.name: file for file in sorted(path.glob("*.safetensors"))}
    for shard in [match for name in files if (match := _SHARD.fullmatch(name))]:
        for number in range(1, int(shard["count"]) + 1):
            name = f"{shard['stem']}-{number:05d}-of-{shard['count']}.safetensors"
            files.setdefault(name, path / name)
    if not files:
        problems.append(f"no .safetensors files in this folder{_what_else(path)}")
    return None, list(files.values())


def _what_else(path: Path) -> str:
    """What a folder without weights has, and what to do with it."""
    if list(path.glob("transformer/*.safetensors")):
        return "; its subfolder transformer has some"
    others = [file for file in sorted(path.iterdir()) if file.suffix in _FOREIGN]
    if not others:
        return ""
    kind, count = _FOREIGN[others[0].suffix], len(others)
    named = others[0].name if count == 1 else f"{others[0].name} and {count - 1} more"
    return f"; it has {kind} ({named}), which are not read: convert them to safetensors"


def _read_index(index_file: Path, problems: list[str]) -> tuple[dict[str, str] | None, list[Path]]:
    try:
        index = read_json(index_file)["weight_map"]
        names = dict.fromkeys(index.values())
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    except ValueError as error:
        problems.append(f"{index_file.name}: {error}")
        return None, []
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(f'{index_file.name}: must be a JSON object with "weight_map": {type(error).__name__}: {error}')
        return None, []
    if not plain:
        problems.append(
            f"{index_file.name}: weight_map must give names of files in the same folder, gives {list(names)}"
        )
        return None, []
    return index, [index_file.parent / name for name in names]


def _give_up(headers: Headers, file: Path, index: dict[str, str] | None) -> None:
    if index is None:
        headers.complete = False
    else:
        headers.unreadable.update(key for key, name in index.items() if name == file.name)


def _add(headers: Headers, entry: Entry, index: dict[str, str] | None) -> None:
    if entry.dtype not in _FLOATS and not (entry.dtype == "I8" and entry.file.name in headers.recipes):
        headers.problems.append(f"{entry.key}: stored as {entry.dtype} in {entry.file.name}, must be one of {_FLOATS}")
    if index is not None and entry.key not in index:
        headers.problems.append(f"{entry.key}: in {entry.file.name}, but not in the index")
    elif index is not None and index[entry.key] != entry.file.name:
        return  # the index prefers another file, which is reported if it lacks the key
    if entry.key in headers.entries:
        first = headers.entries[entry.key].file.name
        headers.problems.append(f"{entry.key}: in both {first} and {entry.file.name}")
    headers.entries[entry.key] = entry
