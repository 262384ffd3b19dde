"""The server: who may connect, how many, and how it ends."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from aiohttp import web

from lingbot_kernels.pipeline import WorldSession
from lingbot_kernels.play.viewer import CLOSE_SECONDS, Viewer
from lingbot_kernels.play.wire import FORMATS, MAX_MESSAGE
from lingbot_kernels.play.worker import SessionWorker

PAGE = Path(__file__).with_name("page.html")
SPARE_CONNECTIONS = 64  # besides those of sessions: pages on their way, and viewers that are refused
REQUEST_SECONDS = 10.0  # that a connection has to say what it wants
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Settings:
    """How worlds are served.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        max_sessions: viewers at the same time.
        fps: frames a second, at most.
        picture: of `wire.FORMATS`.
        quality: of the pictures, 1 to 100.
        heartbeat: seconds between two pings; a viewer that doesn't answer one within half of them is gone.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_sessions: int = 1
    fps: int = 16
    picture: str = "jpeg"
    quality: int = 85
    heartbeat: float = 20.0

    def __post_init__(self) -> None:
        if self.picture not in FORMATS:
            raise ValueError(f"picture: got {self.picture!r}, must be one of {', '.join(FORMATS)}")
        for name, least, most in (("port", 0, 65535), ("max_sessions", 1, 1000), ("fps", 1, 1000), ("quality", 1, 100)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be from {least} to {most}")


class PlayServer:
    """Serves a page, and a session to each viewer of it. An asynchronous context manager.

    A token is asked for unless the address is a loopback one, whose pages alone may connect.

    Args:
        begin: makes a session; called in the worker's thread.
        device: of the pipeline.
        frames: of a chunk.
        world: what viewers are told of the world: JSON values.

    Attributes:
        worker: the thread with the sessions.
        token: "" where none is asked for.
    """

    def __init__(
        self,
        begin: Callable[[], WorldSession],
        device: torch.device,
        frames: int,
        settings: Settings,
        world: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.token = "" if is_loopback(settings.host) else secrets.token_urlsafe(24)
        self._begin, self._device, self._frames = begin, device, frames
        self._world = {**(world or {}), "fps": settings.fps, "picture": settings.picture}
        self._viewers: dict[asyncio.Task[Any], Viewer] = {}
        self._hurries: dict[Any, asyncio.TimerHandle] = {}  # of connections that have asked for nothing yet
        self._most = settings.max_sessions + SPARE_CONNECTIONS

    async def __aenter__(self) -> PlayServer:
        """Listen.

        Raises:
            OSError: the address can't be had.
        """
        app = web.Application(middlewares=[self._guarded], client_max_size=MAX_MESSAGE)
        app.add_routes([web.get("/", self._page), web.get("/session", self._session)])
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=REQUEST_SECONDS, shutdown_timeout=1)
        await self._runner.setup()
        try:
            self._listening = await asyncio.get_running_loop().create_server(
                self._connection, self.settings.host, self.settings.port, backlog=128
            )
        except BaseException:
            await self._runner.cleanup()
            raise
        self.port: int = self._listening.sockets[0].getsockname()[1]
        self._encoders = ThreadPoolExecutor(2, "pictures")
        self.worker = SessionWorker(self._begin, self._device, self.settings.fps)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Tell every viewer, close every session, and end."""
        self._listening.close()
        for viewer in self._viewers.values():
            viewer.leave(1001, "the server ends")
        if self._viewers:
            await asyncio.wait(list(self._viewers), timeout=3 * CLOSE_SECONDS)
        await asyncio.get_running_loop().run_in_executor(None, self.worker.stop)
        await self._runner.cleanup()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    @property
    def url(self) -> str:
        """Where the page is, with the token where one is asked for."""
        host = socket.gethostname() if self.settings.host in ("0.0.0.0", "::", "") else self.settings.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    def _connection(self) -> asyncio.Protocol:
        """What serves a new connection; beyond the bound, one that is sent away."""
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._most:
            return _Refused()
        protocol = server()

        self._hurries[protocol] = asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._give_up, protocol)
        return protocol

    def _give_up(self, protocol: Any) -> None:
        """End a connection that has asked for nothing."""
        del self._hurries[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()

    @web.middleware
    async def _guarded(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if (hurry := self._hurries.pop(request.protocol, None)) is not None:
            hurry.cancel()
        refusal = self._refusal(request)
        response = await handler(request) if refusal is None else web.Response(status=403, text=refusal)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def _refusal(self, request: web.Request) -> str | None:
        """Why a request may not be answered."""
        if not self.token and _place_of(f"//{request.host}")[1] not in (*LOOPBACK, self.settings.host):
            # A page elsewhere whose name leads here would have its own name as Host and as Origin.
            return f"Host: got {request.host}, must be one of {', '.join(LOOPBACK)}"
        origin = request.headers.get("Origin")
        if origin is not None and _place_of(origin)[0] != request.host:
            return f"Origin: got {origin}, must be the page of this server"
        if self.token and not hmac.compare_digest(_bytes(request.query.get("token", "")), _bytes(self.token)):
            return "token: must be that of the address which lingbot-kernels play printed"
        return None

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html")

    async def _session(self, request: web.Request) -> web.StreamResponse:
        """A WebSocket with a session; without an upgrade, whether there would be one."""
        most = self.settings.max_sessions
        if len(self._viewers) >= most:
            text = f"all sessions are taken ({most}): try again later, or start with a larger --max-sessions"
            return web.Response(status=503, text=text, headers={"Retry-After": "5"})
        channel = web.WebSocketResponse(
            timeout=CLOSE_SECONDS, heartbeat=self.settings.heartbeat, max_msg_size=MAX_MESSAGE, compress=False
        )
        if not channel.can_prepare(request).ok:
            return web.Response(status=426, text="must be a WebSocket", headers={"Upgrade": "websocket"})
        task = asyncio.current_task()
        assert task is not None
        self._viewers[task] = viewer = Viewer(
            channel, self.worker, self._encoders, self._world,
            frames=self._frames, picture=self.settings.picture, quality=self.settings.quality,
        )  # fmt: skip
        try:
            await channel.prepare(request)
            await viewer.run()
        finally:
            del self._viewers[task]
        return channel


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        text = b"too many connections: try again later"
        head = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text)
        transport.write(head + text)
        transport.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _place_of(address: str) -> tuple[str, str]:
    """(name with port, name alone) of a URL; empty where it is none."""
    try:
        parts = urlsplit(address)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")
