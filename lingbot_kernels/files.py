"""Files that people hand over, or ask for: JSON of bounded size, what a file that isn't what its name says really is,
and outputs that are checked before the work and written as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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


def check_output(path: Path, *, append: bool = False, nbytes: int = 0) -> None:
    """Refuse a file that can't be written, before the work whose result it is to hold; leaves nothing behind.

    Args:
        append: whether the file is to grow, rather than to be replaced; folders that it lacks are then made with it.
        nbytes: what will be written, where that is known.

    Raises:
        ValueError: the folder is missing or takes no file, the file is a folder or a device that takes nothing, or
            there is too little space.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: must have no null byte in its name")
    try:
        target = _Target.of(path)
        if target.mode is not None and stat.S_ISDIR(target.mode):
            raise ValueError(f"{path}: is a folder, must be a file")
        if target.special:
            target.check_device()
            return
        folder = target.path.parent
        while append and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            missing = folder if path.parent.exists() else path.parent  # as it was given, unless a link leads elsewhere
            raise ValueError(f"{path}: the folder {missing} {'is none' if folder.exists() else 'does not exist'}")
        if folder != target.path.parent:
            _Target(folder / target.path.name, None, False).try_to_open()
        elif append or not target.folder_takes_files():
            target.try_to_open()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{path}: can't be written: {error.strerror}") from error
    if nbytes > free:
        raise ValueError(f"{path}: needs {nbytes} bytes, must be at most the {free} free there")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the block, which gets the name `path` once the block has succeeded; where it raises, what
    `path` named is still there.

    It lies beside `path` and has its suffix. A device or pipe, and a file whose folder takes no new ones, is written
    itself.

    Raises:
        OSError: it can't be written.
    """
    target = _Target.of(path)
    if target.special or not target.folder_takes_files():
        yield target.path
        return
    part = target.beside()
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if target.mode is not None:
            part.chmod(stat.S_IMODE(target.mode))
        part.replace(target.path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text as a whole, or leave what is there. A device or pipe gets it after what it had.

    Raises:
        OSError: it can't be written.
    """
    with replacing(path) as file, _opened(file) as opened:
        opened.write(text)


def append_text(path: Path, text: str) -> None:
    """Append to a file, which is made with its folders where there is none: all of the text, or nothing.

    Raises:
        OSError: it can't be written.
    """
    if _Target.of(path).special:
        write_text(path, text)
        return
    left = memoryview(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before.st_size)
            raise


def _opened(path: Path) -> IO[str]:
    """`path` for writing; a descriptor of this process, such as /dev/stdout, where its other users stand."""
    folder = os.path.realpath(path.parent)
    number = {"/dev/stdout": "1", "/dev/stderr": "2"}.get(os.path.abspath(path))
    if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
        number = path.name
    if number is None:
        return path.open("a" if _Target.of(path).special else "w", encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fdopen(os.dup(int(number)), "w", encoding="utf-8")


@dataclass(frozen=True)
class _Target:
    """Where an output really goes.

    Attributes:
        path: behind symbolic links.
        mode: of what is there, None for nothing.
        special: whether it is written as it stands: a device, a pipe, or a file that this process has open already
            (standard output, say), which a new file of its name would leave behind.
    """

    path: Path
    mode: int | None
    special: bool

    @classmethod
    def of(cls, path: Path) -> _Target:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return cls(Path(os.path.realpath(path)), None, False)
        except NotADirectoryError:
            return cls(path, None, False)
        folder = os.path.realpath(path.parent)
        opened = folder == "/dev" or folder.startswith(("/dev/fd", "/proc/"))
        special = opened or not stat.S_ISREG(mode)
        return cls(path if special else Path(os.path.realpath(path)), mode, special)

    def beside(self) -> Path:
        """A new name in the same folder, of the same suffix and never too long."""
        return self.path.with_name(f".part-{secrets.token_hex(4)}-{self.path.stem[:20]}{self.path.suffix}")

    def folder_takes_files(self) -> bool:
        """Tried, not asked: an answer about permissions knows neither read-only nor made-up file systems."""
        part = self.beside()
        try:
            part.open("xb").close()
            part.unlink()
        except OSError:
            return False
        return True

    def try_to_open(self) -> None:
        self.path.open("ab").close()
        if self.mode is None:
            self.path.unlink()

    def check_device(self) -> None:
        """A full device refuses even nothing. A pipe isn't opened: that would wait for its reader."""
        if self.mode is not None and not (stat.S_ISFIFO(self.mode) or stat.S_ISSOCK(self.mode)):
            with self.path.open("ab", buffering=0) as file:
                os.write(file.fileno(), b"")
