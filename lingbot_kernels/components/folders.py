"""Where the parts of a world model lie: the official layout of LingBot-World and Wan, diffusers' layout, or a
mixture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Finder = Callable[[Path], Path | None]


class MissingParts(FileNotFoundError):
    """Folders that lack parts of a pipeline; `missing` has one line for each."""

    def __init__(self, folders: Iterable[Path], missing: Iterable[str]) -> None:
        self.missing = tuple(missing)
        where = " and ".join(str(folder) for folder in folders)
        count = "1 part is missing" if len(self.missing) == 1 else f"{len(self.missing)} parts are missing"
        super().__init__("\n  ".join([f"{where}: {count}", *self.missing]))


class BadPart(ValueError):
    """A part that is there and can't be read; the message names the part, the file and what is wrong."""


@dataclass(frozen=True)
class Parts:
    """Where each part lies: a folder of diffusers' or transformers' kind, or one file of the official layout.

    Attributes:
        transformer: folder of safetensors shards.
        text_encoder: folder with config.json, or `models_t5_*.pth`.
        tokenizer: folder with tokenizer.json or spiece.model.
        vae: folder with config.json, or `Wan2.1_VAE.pth`.
    """

    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path


def _folder(*names: str, holds: tuple[str, ...]) -> Finder:
    """The first of the subfolders that has a file of one of the patterns."""

    def find(root: Path) -> Path | None:
        for name in names:
            if any(next((root / name).glob(pattern), None) for pattern in holds):
                return root / name
        return None

    return find


def _file(*patterns: str) -> Finder:
    """The first file of the patterns, in alphabetical order."""

    def find(root: Path) -> Path | None:
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                return path
        return None

    return find


_PARTS: dict[str, tuple[tuple[Finder, ...], str]] = {
    "transformer": (
        (_folder("transformer", "transformers", ".", holds=("*.safetensors", "*.safetensors.index.json")),),
        "safetensors shards in transformer/, transformers/ or the folder itself",
    ),
    "text_encoder": (
        (_folder("text_encoder", holds=("config.json",)), _file("models_t5_*.pth", "models_t5_*.safetensors")),
        "text_encoder/config.json or models_t5_*.pth",
    ),
    "tokenizer": (
        (_folder("tokenizer", "google/umt5-xxl", "google/*", holds=("tokenizer.json", "spiece.model")),),
        "tokenizer.json or spiece.model in tokenizer/ or google/umt5-xxl/",
    ),
    "vae": (
        (_folder("vae", holds=("config.json",)), _file("Wan2.1_VAE*.pth", "Wan2.1_VAE*.safetensors")),
        "vae/config.json or Wan2.1_VAE.pth",
    ),
}


def find_parts(
    folder: str | os.PathLike[str],
    *,
    assets: str | os.PathLike[str] | None = None,
    transformer: str | os.PathLike[str] | None = None,
) -> Parts:
    """Find every part in `folder`, or else in `assets`.

    Args:
        folder: of a checkpoint, in the official layout or diffusers'.
        assets: another folder for what is missing: uploads of the 1.3B model hold the transformer alone.
        transformer: folder of the transformer's shards, relative to `folder`, where its name is none of the usual.

    Raises:
        MissingParts: naming each part that neither folder has, and what was looked for.
    """
    roots = [Path(folder), *([Path(assets)] if assets is not None else [])]
    found: dict[str, Path] = {}
    missing = []
    for part, (finders, looked_for) in _PARTS.items():
        if part == "transformer" and transformer is not None:
            finders = (_folder(os.fspath(transformer), holds=("*.safetensors", "*.safetensors.index.json")),)
            looked_for = f"safetensors shards in {transformer}/"
        hits = (path for root in roots for finder in finders if (path := finder(root)) is not None)
        path = next(hits, None)
        if path is None:
            missing.append(f"{part.replace('_', ' ')}: no {looked_for}")
        else:
            found[part] = path
    if missing:
        raise MissingParts(roots, missing)
    return Parts(**found)
