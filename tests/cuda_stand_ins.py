"""What benches ask of torch.cuda, without a GPU: a clock, an allocator, graphs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class ClockEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: ClockEvent) -> float:
        return 1e3 * (end.at - self.at)


class Replayed:
    def replay(self) -> None:
        time.sleep(1e-4)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: Replayed, **options: Any) -> Iterator[None]:
        yield

    cuda = {
        "synchronize": lambda device=None: None, "Event": ClockEvent, "CUDAGraph": Replayed, "graph": capture,
        "memory_allocated": lambda device=None: 3 * 2**30, "max_memory_allocated": lambda device=None: 5 * 2**30,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (20 * 2**30, 80 * 2**30),
        "get_device_properties": lambda device: type("Properties", (), {"uuid": "0"}),
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
