"""Servers of a tiny world, and viewers of them, for the tests of `lingbot_kernels.play`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp

from lingbot_kernels.pipeline import LingBotWorldPipeline, WorldSession
from lingbot_kernels.play.server import PlayServer, Settings
from lingbot_kernels.play.wire import HEADER

SIZE = {"height": 16, "width": 16}
PROMPT = "a harbour at dawn"
SECONDS = 40.0  # more than a busy machine takes for anything here


def served(
    pipeline: LingBotWorldPipeline, begin: Callable[[], WorldSession] | None = None, **settings: Any
) -> PlayServer:
    """A server on a free port, to be entered; as fast as it can, unless `fps` says otherwise."""
    begin = begin or partial(pipeline.session, PROMPT, **SIZE)
    return PlayServer(begin, pipeline.device, 12, Settings(**{"port": 0, "fps": 1000, **settings}), {"name": "tiny"})


@dataclass
class Frame:
    number: int
    chunk: int
    sequence: int
    interval: float  # milliseconds
    picture: bytes


@dataclass
class Player:
    """A viewer that takes what it reads.

    Attributes:
        notices: the texts that came, by type.
        frames: the frames that came.
        code: of the close; None while open.
    """

    socket: aiohttp.ClientWebSocketResponse
    notices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    code: int | None = None

    async def read(self, take: bool = True) -> bool:
        """Read a message; False at the end."""
        message = await asyncio.wait_for(self.socket.receive(), SECONDS)
        if message.type is aiohttp.WSMsgType.TEXT:
            notice = json.loads(message.data)
            self.notices.setdefault(notice["type"], []).append(notice)
        elif message.type is aiohttp.WSMsgType.BINARY:
            self.frames.append(Frame(*HEADER.unpack_from(message.data), message.data[HEADER.size :]))
            if take:
                with contextlib.suppress(aiohttp.ClientConnectionResetError):  # what came before the end is still read
                    await self.socket.send_json({"taken": self.frames[-1].number})
        else:
            self.code = self.socket.close_code
            return False
        return True

    async def read_until(self, enough: Callable[[], Any], take: bool = True) -> None:
        deadline = time.monotonic() + SECONDS
        while not enough():
            assert time.monotonic() < deadline, (self.notices, len(self.frames))
            assert await self.read(take), (self.code, self.notices)

    async def read_to_the_end(self) -> None:
        """Read what still comes, and say nothing: a socket that is closing may break under who writes to it."""
        while await self.read(take=False):
            pass

    async def hold(self, keys: str, sequence: int) -> None:
        await self.socket.send_json({"keys": keys, "sequence": sequence})


@contextlib.asynccontextmanager
async def player(server: PlayServer, **options: Any) -> AsyncIterator[Player]:
    async with aiohttp.ClientSession() as client:
        address = server.url.replace("http", "ws").replace("/?", "/session?")
        address += "" if "session" in address else "session"
        async with client.ws_connect(address, **options) as socket:
            yield Player(socket)


async def eventually(true: Callable[[], Any], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 2 * SECONDS))  # type: ignore[arg-type]
