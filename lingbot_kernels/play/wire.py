"""What goes over the WebSocket.

From the viewer, JSON text of at most MAX_MESSAGE bytes, one of:

- `{"keys": "w+l", "sequence": 7}`: the keys that are held from now on ("" for none), and a number that grows from
  message to message;
- `{"taken": 41}`: frame 41 and all before it are drawn, or will not be.

To the viewer, JSON text with a `type` ("world", "chunk", "refused", "error"), and a binary message a frame: HEADER,
then the picture. A frame's `sequence` is that of the last key message which its chunk has heeded.
"""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lingbot_kernels.models.poses import parse_actions

MAX_MESSAGE = 1024
MAX_NUMBER = 2**32 - 1
HEADER = struct.Struct("<IIIf")  # the frame's number, its chunk, the sequence of its keys, milliseconds to show it
FORMATS = ("jpeg", "webp")


@dataclass(frozen=True)
class Held:
    """Keys that are held, as `WorldSession.step` takes them."""

    keys: frozenset[str]
    sequence: int


@dataclass(frozen=True)
class Taken:
    """A frame that the viewer is done with."""

    frame: int


def read_message(text: str) -> Held | Taken:
    """A viewer's message.

    Raises:
        ValueError: naming what was got and what it must be.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"message: got {_shown(text)}, must be JSON") from error
    if isinstance(message, dict) and set(message) == {"taken"}:
        return Taken(_number("taken", message["taken"]))
    if isinstance(message, dict) and set(message) == {"keys", "sequence"}:
        keys = message["keys"]
        if not isinstance(keys, str):
            raise ValueError(f"keys: got {_shown(keys)}, must be text such as 'w+l'")
        try:
            held = parse_actions([keys])
        except ValueError as error:
            raise ValueError(f"keys: got {_shown(keys)}, must be of w a s d i j k l, joined by +") from error
        if len(held) != 1 or "*" in keys:
            raise ValueError(f"keys: got {_shown(keys)}, must be held in one moment, without a *")
        return Held(held[0], _number("sequence", message["sequence"]))
    raise ValueError(f"message: got {_shown(message)}, must have keys and sequence, or taken")


def write_frame(
    pixels: np.ndarray, picture: str, quality: int, *, frame: int, chunk: int, sequence: int, interval: float
) -> bytes:
    """A frame's message: uint8 [H, W, 3] as a picture of one of FORMATS, shown for `interval` seconds."""
    found = io.BytesIO()
    found.write(HEADER.pack(frame & MAX_NUMBER, chunk & MAX_NUMBER, sequence, 1e3 * interval))
    options: dict[str, Any] = {"method": 0} if picture == "webp" else {}  # webp's quickest: it is waited for
    Image.fromarray(pixels).save(found, picture, quality=quality, **options)
    return found.getvalue()


def _number(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{name}: got {_shown(value)}, must be an integer from 0 to {MAX_NUMBER}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
