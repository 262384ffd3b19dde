"""When a session's next chunk is due: in time for the frames before it to end, and no earlier."""

from __future__ import annotations

import statistics
from collections import deque


class Pace:
    """The clock of one session. Keys count until a chunk begins, so that it begins as late as its frames allow.

    A chunk that takes longer than its frames last at `fps` is due at once, and its frames are shown for longer: they
    last until the next chunk comes.

    Args:
        fps: frames a second, at most.
        now: seconds, of the clock that all methods are given.

    Attributes:
        due: when the next chunk is to begin.
    """

    def __init__(self, fps: float, now: float) -> None:
        self.due = now
        self._frame = 1 / fps
        self._ends = now  # of the frames that were handed over
        self._took: deque[float] = deque(maxlen=5)  # from due to frames, other sessions' turns included

    def hold(self, now: float) -> None:
        """Nothing is due before `now`: the viewer is waited for, which is no measure of how long a chunk takes."""
        self.due = max(self.due, now)

    def delivered(self, now: float, frames: int) -> float:
        """A chunk's frames are there. How long to show each, in seconds."""
        self._took.append(now - self.due)
        takes = statistics.median(self._took)
        interval = max(self._frame, takes / frames)
        self._ends = max(self._ends, now) + frames * interval
        self.due = max(now, self._ends - takes - interval)  # a frame early, for what a chunk takes now and then
        return interval
