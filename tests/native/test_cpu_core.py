"""What all CPU ops rest on: conversions between types, threads, forks, and how arguments are read."""

from __future__ import annotations

import math
import os
import sys
import threading

import pytest
import torch
from cpu_calls import CODES, assert_same_bits, gated_residual, layer_norm_modulate, rms_norm

from lingbot_kernels import _C

HALVES = [torch.float16, torch.bfloat16]


def assert_same_value(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, a NaN for a NaN."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_same_bits(actual[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 256, 256)
    minus_zero = torch.full((1, 256, 256), -0.0)
    assert_same_value(gated_residual(minus_zero, every, None), every.float())
    assert_same_value(gated_residual(every, minus_zero.to(dtype), None), every)


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite() & (every != 0)]
    above = torch.nextafter(every.to(dtype), torch.tensor(math.inf).to(dtype)).float()
    ties = (every.double() + above.double()).div(2).float()  # exact but next to the largest value
    ties = ties[ties.isfinite()]
    near = [torch.nextafter(ties, torch.tensor(sign * math.inf)) for sign in (1.0, -1.0)]
    special = torch.tensor([math.inf, -math.inf, math.nan, 65519.99, 65520.0, -65520.0, 1e-45, 3.4e38, -3.4e38, 0.0])
    values = torch.cat([every, ties, *near, special])
    # A scale of -1 leaves the shift alone, in float32: y is the shift, rounded.
    x = torch.randn(1, 2, values.numel())
    y = layer_norm_modulate(x, values, torch.full_like(values, -1.0), dtype)
    assert_same_value(y[0, 1], values.to(dtype))


def test_nan_payload_does_not_become_infinity() -> None:
    bits = [0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, -1, -0x7FFFFF]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(7)
    for dtype in HALVES:
        y = layer_norm_modulate(torch.randn(1, 1, 35), values, torch.full_like(values, -1.0), dtype)
        assert y.isnan().all()


def test_nan_and_infinity_stay_in_their_row() -> None:
    x = torch.randn(1, 3, 100)
    x[0, 1, 7] = math.nan
    y = rms_norm(x, torch.ones(100))
    assert y[0, 1].isnan().all() and y[0, [0, 2]].isfinite().all()


def test_concurrent_callers_get_their_own_results() -> None:
    weight = torch.ones(4096)
    xs = [torch.randn(1, 128, 4096) for _ in range(4)]
    expected = [rms_norm(x, weight, 1) for x in xs]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(rms_norm(xs[i], weight, 2), expected[i]):
                failures.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads() -> None:
    x, weight = torch.randn(1, 128, 4096), torch.ones(4096)
    expected = rms_norm(x, weight, 2)  # the parent's threads are running now
    expected_bytes = expected.numpy().tobytes()
    y = torch.empty_like(x)
    child = os.fork()
    if child == 0:
        _C.cpu.rms_norm(x.data_ptr(), 0, 4096, weight.data_ptr(), y.data_ptr(), 1, 128, 4096, 0, 1e-6, 2)
        # No torch op here: its threads are not fork-safe.
        threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 2
        os._exit(0 if y.numpy().tobytes() == expected_bytes and threads == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(rms_norm(x, weight, 2), expected)


def call(**change: object) -> None:
    x, y = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
    args = {"x": x.data_ptr(), "batch_stride": 0, "token_stride": 8, "weight": x.data_ptr(), "y": y.data_ptr()}
    args |= {"batch": 1, "tokens": 2, "dim": 8, "dtype": 0, "eps": 1e-6, "threads": 0}
    _C.cpu.rms_norm(*(args | change).values())


def test_arguments_are_checked_by_name() -> None:
    call()
    with pytest.raises(TypeError, match=r"rms_norm: x\.batch_stride: "):
        call(batch_stride=1.5)
    with pytest.raises(TypeError, match=r"rms_norm: weight: "):
        call(weight=None)
    with pytest.raises(OverflowError, match=r"rms_norm: dim: must fit in 32 bits"):
        call(dim=2**31)
    with pytest.raises(OverflowError, match=r"rms_norm: tokens: "):
        call(tokens=2**63)
    with pytest.raises(ValueError, match=r"rms_norm: dtype: must be 0"):
        call(dtype=3)
    with pytest.raises(TypeError, match=r"rms_norm: eps: "):
        call(eps="1")
    with pytest.raises(TypeError, match=r"rms_norm: threads: "):
        call(threads="1")
    with pytest.raises(TypeError, match="rms_norm takes 11 arguments, got 12"):
        call(more=1)
    with pytest.raises(RuntimeError, match=r"^rms_norm: x, weight and y must not be null"):
        call(x=0)
    with pytest.raises(RuntimeError, match=r"^rms_norm: dim must be at least 1"):
        call(dim=0)


def test_residual_dtype_is_float32_or_the_compute_dtype() -> None:
    x, delta = torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="residual must be float32 or of the compute dtype"):
        gated_residual(x, delta, None)
    assert CODES[torch.bfloat16] == 2


def test_unknown_instruction_set() -> None:
    active = _C.cpu_isa
    with pytest.raises(ValueError, match="'neon9' is not one of"):
        _C.cpu.set_isa("neon9")
    assert _C.cpu_isa == active
