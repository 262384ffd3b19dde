"""One thread that runs the sessions of a pipeline in turns; it alone touches torch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lingbot_kernels.pipeline import WorldSession
from lingbot_kernels.play.pace import Pace
from lingbot_kernels.play.wire import Held

PATIENCE = 2.0  # seconds after which a viewer that takes nothing is waited for
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """What a step made.

    Attributes:
        frames: uint8 [N, H, W, 3].
        keys: held in it, as `WorldSession.step` takes them.
        sequence: of the last key message that it heeds.
        interval: seconds to show each frame.
        seconds: that the step took, until its frames were in host memory.
        session_bytes: that the session keeps.
        memory_bytes: on a GPU, what torch has allocated there; else the process's resident memory, 0 where unknown.
    """

    number: int
    frames: np.ndarray
    keys: str
    sequence: int
    interval: float
    seconds: float
    session_bytes: int
    memory_bytes: int


class Listener(Protocol):
    """Told what becomes of a seat, on the worker's thread; what it does there is quick."""

    def opened(self, height: int, width: int, seed: int) -> None:
        """The session has begun."""

    def made(self, chunk: Chunk) -> None: ...

    def failed(self, message: str) -> None:
        """The session is over."""


class Seat:
    """A viewer's place with the worker. Its methods are for any thread.

    Attributes:
        session: made, used and closed by the worker's thread; None before and after.
    """

    def __init__(self, listener: Listener, wake: Callable[[], None]) -> None:
        self.session: WorldSession | None = None
        self._listener: Listener | None = listener
        self._wake = wake
        self._lock = threading.Lock()
        self._held = Held(frozenset(), 0)
        self._tapped: frozenset[str] = frozenset()
        self._outstanding = False
        self._attended = 0.0
        # The worker's own:
        self.leaving = self.unsettled = False
        self.pace: Pace | None = None  # from the session's beginning on
        self.turn = time.monotonic()  # the last one

    def hold(self, held: Held) -> None:
        """Keys are held from now on. One that is let go before the next chunk begins counts in that chunk."""
        with self._lock:
            self._held = held
            self._tapped |= held.keys

    def handed(self) -> None:
        """The viewer has frames to take: from now on, unless it had some already."""
        with self._lock:
            if not self._outstanding:
                self._outstanding, self._attended = True, time.monotonic()

    def took(self, outstanding: bool) -> None:
        """The viewer has taken frames, and whether there are `outstanding` ones that it was handed and hasn't taken."""
        with self._lock:
            self._outstanding, self._attended = outstanding, time.monotonic()
        self._wake()

    def stalled(self, now: float) -> bool:
        """Whether the viewer takes nothing, so that the world stands still."""
        with self._lock:
            return self._outstanding and now - self._attended > PATIENCE

    def take_keys(self) -> Held:
        """The keys of the chunk that begins: held now, or tapped since the last one began."""
        with self._lock:
            taken = Held(self._held.keys | self._tapped, self._held.sequence)
            self._tapped = frozenset()
            return taken

    @property
    def listener(self) -> Listener:
        assert self._listener is not None
        return self._listener

    def forget(self) -> None:
        """Let go of session and listener: whoever keeps the seat keeps nothing alive."""
        self.session = self._listener = None


class SessionWorker:
    """The thread. Sessions that are due have their turns one after another, the longest unserved first.

    Args:
        begin: makes a session; called in the thread.
        device: that of the pipeline.
        fps: frames a second that a session is shown at, at most.
    """

    def __init__(self, begin: Callable[[], WorldSession], device: torch.device, fps: float) -> None:
        self._begin, self._device, self._fps = begin, device, fps
        self._changed = threading.Condition()
        self._seats: list[Seat] = []
        self._woken = self._ended = False
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    def add(self, listener: Listener) -> Seat:
        """A seat, whose session begins when the thread comes to it.

        Raises:
            RuntimeError: the worker has stopped.
        """
        seat = Seat(listener, self._wake)
        with self._changed:
            if self._ended:
                raise RuntimeError("the worker has stopped: make another")
            self._seats.append(seat)
        self._wake()
        return seat

    def leave(self, seat: Seat) -> None:
        """Give a seat up; its session is closed after the step that runs, if one does. Safe twice."""
        with self._changed:
            seat.leaving = True
        self._wake()

    def sessions(self) -> list[WorldSession]:
        """Those that hold memory now."""
        with self._changed:
            return [seat.session for seat in self._seats if seat.session is not None]

    def stop(self) -> None:
        """Close every session and end the thread: after the step that runs, if one does. Safe twice."""
        with self._changed:
            self._ended = True
            for seat in self._seats:
                seat.leaving = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (job := self._next()) is not None:
            job()
            del job  # nothing of a session is kept alive while the thread waits

    def _next(self) -> Callable[[], None] | None:
        """What to do now, waiting for it; None at the end."""
        with self._changed:
            while True:
                self._woken = False
                job, wait = self._choose(time.monotonic())
                if job is not None:
                    return job
                if self._ended and not self._seats:
                    return None
                self._changed.wait_for(lambda: self._woken, wait)

    def _choose(self, now: float) -> tuple[Callable[[], None] | None, float | None]:
        """(a job, None), or (None, seconds until there may be one): memory is given back before more is taken."""
        for seat in self._seats:
            if seat.leaving:
                return partial(self._close, seat), None
        due, later = [], []
        for seat in self._seats:
            if seat.pace is None or (seat.pace.due <= now and not seat.stalled(now)):
                due.append(seat)
            elif seat.pace.due > now:
                later.append(seat.pace.due - now)
            else:
                seat.pace.hold(now)  # until the viewer wakes the thread
        if due:
            seat = min(due, key=lambda seat: seat.turn)
            return partial(self._open if seat.pace is None else self._step, seat), None
        for seat in self._seats:
            if seat.unsettled:
                return partial(self._settle, seat), None
        return None, min(later, default=None)

    def _open(self, seat: Seat) -> None:
        seat.turn = time.monotonic()
        seat.pace = Pace(self._fps, seat.turn)
        try:
            seat.session = self._begin()
        except Exception as error:
            self._fail(seat, error)
            return
        seat.pace.hold(time.monotonic())
        seat.listener.opened(seat.session.height, seat.session.width, seat.session.seed)

    def _step(self, seat: Seat) -> None:
        assert seat.session is not None and seat.pace is not None
        seat.turn = begun = time.monotonic()
        held = seat.take_keys()
        keys = "+".join(sorted(held.keys))
        try:
            frames = seat.session.step(keys).cpu().numpy()
        except Exception as error:
            self._fail(seat, error)
            return
        now = time.monotonic()
        seat.unsettled = True
        seat.listener.made(
            Chunk(
                number=seat.session.chunks - 1, frames=frames, keys=keys, sequence=held.sequence,
                interval=seat.pace.delivered(now, len(frames)), seconds=now - begun,
                session_bytes=seat.session.nbytes(), memory_bytes=memory_bytes(self._device),
            )
        )  # fmt: skip

    def _settle(self, seat: Seat) -> None:
        """The context update, where it waits for idle time: on a CPU."""
        assert seat.session is not None
        seat.unsettled = False
        try:
            seat.session.settle()
        except Exception as error:
            self._fail(seat, error)

    def _fail(self, seat: Seat, error: Exception) -> None:
        """Tell the viewer and give its memory back; other sessions go on."""
        _log.error("a session ended by an error", exc_info=error)
        message = " ".join(str(error).split()) or type(error).__name__
        seat.listener.failed(message)
        self._close(seat)

    def _close(self, seat: Seat) -> None:
        with self._changed:
            if seat in self._seats:
                self._seats.remove(seat)
            session = seat.session
            seat.forget()
        try:
            if session is not None:
                session.close()
        except Exception:
            _log.exception("a session could not be closed")


def memory_bytes(device: torch.device) -> int:
    """What torch has allocated on a GPU; else the process's resident memory, 0 where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
