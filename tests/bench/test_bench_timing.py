"""Timing on the CPU: percentiles, rotation over the inputs, the copy ceiling."""

from __future__ import annotations

import time

import pytest
import torch

from lingbot_kernels.benchmarks import timing
from lingbot_kernels.benchmarks.timing import Effort, copy_pair, measure, measure_copy, rotated_sets, wall_us

CPU = torch.device("cpu")
SHORT = Effort(budget_us=10_000.0, min_samples=6, max_samples=10)


def test_a_call_takes_as_long_as_it_takes():
    timed = measure([lambda: time.sleep(0.002)] * 2, CPU, SHORT)
    assert 2000 <= timed.p20_us <= timed.p50_us <= timed.p80_us
    assert timed.p20_us < 1_000_000  # seconds are not taken for microseconds, on a busy machine either
    assert (timed.method, timed.calls) == ("clock", 1)
    assert SHORT.min_samples <= timed.samples <= SHORT.max_samples


def test_calls_take_turns():
    seen: list[int] = []
    timed = measure([lambda i=i: seen.append(i) for i in range(3)], CPU, SHORT)
    measured = seen[-timed.samples :]
    assert measured == [i % 3 for i in range(len(measured))]


def test_percentiles_are_of_the_samples():
    timed = timing._timing([float(i) for i in range(1, 12)], 4, "graph")
    assert (timed.p20_us, timed.p50_us, timed.p80_us) == (3.0, 6.0, 9.0)
    assert (timed.calls, timed.samples, timed.method) == (4, 11, "graph")


def test_number_of_samples_stays_within_bounds():
    assert Effort(min_samples=5, max_samples=9).samples(1e9) == 5
    assert Effort(min_samples=5, max_samples=9).samples(0.0) == 9
    assert Effort(budget_us=700.0, min_samples=5, max_samples=9).samples(100.0) == 7


@pytest.mark.parametrize("size", [100, 10_000_000, 278_000_000])
def test_rotated_sets_exceed_four_times_the_cache(monkeypatch, size):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 50 << 20)
    sets = rotated_sets(size, CPU)
    assert 3 <= sets <= 512
    assert sets * size >= 4 * (50 << 20) or sets == 512


def test_copy_ceiling_moves_the_bytes_asked_for():
    target, source = copy_pair(1 << 20, CPU)
    assert target.nbytes + source.nbytes == 1 << 20
    assert (target.dtype, target.is_contiguous()) == (torch.bfloat16, True)
    small, large = (measure_copy(size, CPU, SHORT).p20_us for size in (1 << 12, 1 << 26))
    assert 0 < small < large


def test_wall_time_is_the_hosts():
    assert 1000 <= wall_us([lambda: time.sleep(0.001)], CPU, 1000.0, batches=3) < 500_000
