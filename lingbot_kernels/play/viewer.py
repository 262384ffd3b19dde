"""One connection: keys come in, pictures go out, and what the viewer can't take is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from lingbot_kernels.play import wire
from lingbot_kernels.play.worker import Chunk, Seat, SessionWorker

MAX_NOTICES = 8  # texts that wait to be sent; older ones make room
CLOSE_SECONDS = 2.0  # that a viewer has to answer a close
CLOSED = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)


@dataclass(frozen=True)
class _Waiting:
    """A frame that isn't sent yet: uint8 [H, W, 3], its number in the session, and its chunk."""

    pixels: np.ndarray
    number: int
    chunk: Chunk


class Viewer:
    """Between a WebSocket and a session of the worker. All but the listener's methods belong to the event loop.

    At most `window` frames are under way, sent and not yet taken, and twice a chunk's frames wait here; when more come,
    the oldest that wait are dropped. Pictures are encoded when they are sent, in `encoders`.

    Args:
        world: what the viewer is told of the world, besides the session's own.
        frames: of a chunk.
    """

    def __init__(
        self,
        socket: web.WebSocketResponse,
        worker: SessionWorker,
        encoders: Executor,
        world: dict[str, Any],
        *,
        frames: int,
        picture: str,
        quality: int,
    ) -> None:
        self._socket, self._encoders, self._world = socket, encoders, world
        self._picture, self._quality = picture, quality
        self._loop = asyncio.get_running_loop()
        self._window = frames + 4
        self._waiting: deque[_Waiting] = deque(maxlen=2 * frames)
        self._notices: deque[str] = deque(maxlen=MAX_NOTICES)
        self._under_way: deque[int] = deque()
        self._told = -1  # the chunk whose figures were sent
        self._count = self._dropped = 0
        self._over = False  # the session has failed, which the viewer is still to be told
        self._goodbye = (1000, "")  # code and reason of the close
        self._leave = asyncio.Event()
        self._news = asyncio.Event()
        self._worker = worker
        self._seat: Seat | None = None

    async def run(self) -> None:
        """Serve until the viewer leaves, the session fails or `leave` is called; then close the socket."""
        self._seat = self._worker.add(self)
        calls = (self._send(), self._receive(self._seat), self._leave.wait())
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._worker.leave(self._seat)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._waiting.clear()
            code, reason = self._goodbye
            closing = self._socket.close(code=code, message=reason.encode())
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(closing, 2 * CLOSE_SECONDS)

    def leave(self, code: int, reason: str) -> None:
        """End the session, and close the socket with this code and reason."""
        self._goodbye = code, reason
        self._leave.set()

    # The listener, on the worker's thread.

    def opened(self, height: int, width: int, seed: int) -> None:
        # A seed has more bits than a number in a browser.
        self._soon(self._tell, {"type": "world", "height": height, "width": width, "seed": str(seed), **self._world})

    def made(self, chunk: Chunk) -> None:
        self._soon(self._queue, chunk)

    def failed(self, message: str) -> None:
        self._soon(self._end, message)

    def _soon(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call, *arguments)

    # In the loop.

    def _tell(self, notice: dict[str, Any]) -> None:
        self._notices.append(json.dumps(notice))
        self._news.set()

    def _end(self, message: str) -> None:
        self._tell({"type": "error", "message": message})
        self._over, self._goodbye = True, (1011, "the session failed")

    def _queue(self, chunk: Chunk) -> None:
        for pixels in chunk.frames:
            self._dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(_Waiting(pixels, self._count, chunk))
            self._count += 1
        if self._seat is not None:
            self._seat.handed()
        self._news.set()

    async def _send(self) -> None:
        """Send what there is until the session has failed and its viewer knows why."""
        while True:
            await self._news.wait()
            self._news.clear()
            while True:
                if self._notices:
                    await self._socket.send_str(self._notices.popleft())
                elif self._over:
                    return
                elif self._waiting and len(self._under_way) < self._window:
                    await self._send_frame(self._waiting.popleft())
                else:
                    break

    async def _send_frame(self, frame: _Waiting) -> None:
        chunk = frame.chunk
        self._under_way.append(frame.number)
        if chunk.number != self._told:
            self._told = chunk.number
            figures = {
                "type": "chunk", "chunk": chunk.number, "keys": chunk.keys, "sequence": chunk.sequence,
                "milliseconds": round(1e3 * chunk.seconds, 3), "frames": len(chunk.frames), "dropped": self._dropped,
                "session_bytes": chunk.session_bytes, "memory_bytes": chunk.memory_bytes,
            }  # fmt: skip
            await self._socket.send_str(json.dumps(figures))
        encode = partial(
            wire.write_frame, frame.pixels, self._picture, self._quality, frame=frame.number, chunk=chunk.number,
            sequence=chunk.sequence, interval=chunk.interval,
        )  # fmt: skip
        await self._socket.send_bytes(await self._loop.run_in_executor(self._encoders, encode))

    async def _receive(self, seat: Seat) -> None:
        """Heed messages until the viewer leaves. One that makes no sense is refused and changes nothing."""
        while (message := await self._socket.receive()).type not in CLOSED:
            try:
                if message.type is not WSMsgType.TEXT:
                    raise ValueError("message: got bytes, must be text")
                said = wire.read_message(message.data)
                if isinstance(said, wire.Held):
                    seat.hold(said)
                else:
                    self._take(said.frame)
                    seat.took(outstanding=bool(self._waiting or self._under_way))
            except ValueError as error:
                self._tell({"type": "refused", "message": str(error)})

    def _take(self, frame: int) -> None:
        if frame >= self._count:
            raise ValueError(f"taken: got {frame}, must be a frame that was sent")
        while self._under_way and self._under_way[0] <= frame:
            self._under_way.popleft()
        self._news.set()
