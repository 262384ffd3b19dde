"""Bounds of the work the evaluator does, and the errors by which it stops.

They keep hostile or huge input finite; reaching one ends in a report, never in silence.
"""

from __future__ import annotations

MAX_SOURCE_BYTES = 4_000_000
MAX_STEPS = 1_000_000
MAX_CALL_DEPTH = 100
MAX_ITEMS = 100_000
MAX_STRING = 200_000
MAX_INT_BITS = 4_096
MAX_ALTERNATIVES = 48
MAX_MODULES = 200
RECURSION_LIMIT = 6_000


class LimitReachedError(Exception):
    """A bound on steps, sizes or conditions was reached; what follows wasn't evaluated."""


class SourceError(Exception):
    """A file that can't be read as Python: `line` and `column` (1-based) are where known, else 1."""

    def __init__(self, reason: str, line: int = 1, column: int = 1, source: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.column = column
        self.source = source
