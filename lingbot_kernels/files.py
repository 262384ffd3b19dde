"""Files that people hand over: JSON of bounded size, and what a file that isn't what its name says really is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20  # the index of a checkpoint with a million tensors has about as many
LFS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
_LFS_POINTER_START = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` holds the few lines that Git LFS leaves where a file was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER_START)) == _LFS_POINTER_START


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte order mark.

    Raises:
        ValueError: no JSON, or more than MAX_JSON_BYTES; the message says why and leaves naming the file to the caller.
        OSError: it can't be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"has {size} bytes, must have at most {MAX_JSON_BYTES}")
    if is_lfs_pointer(path):
        raise ValueError(LFS_POINTER)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a JSON file: {error}") from error
    except RecursionError:
        raise ValueError("not a JSON file that can be read: it is nested too deeply") from None
