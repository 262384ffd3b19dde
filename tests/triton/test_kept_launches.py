"""Launches by kept kernels: which calls are of one kind, and when the plain launch serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.compiler import CompiledKernel

from lingbot_kernels.triton import _launch

DEVICE = 0
STREAM = 77


class FakeKernel:
    """Counts compilations; what it gives records its launches instead of launching."""

    arg_names = ("x", "y", "n", "stride", "BLOCK", "WIDE")
    __name__ = "fake"

    def __init__(self) -> None:
        self.compiled: list[CompiledKernel] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> CompiledKernel:
            kernel = CompiledKernel.__new__(CompiledKernel)
            kernel.function, kernel.packed_metadata, kernel.module = "function", "metadata", "module"
            kernel.launched = []
            kernel._run = lambda *values: kernel.launched.append(values)
            self.compiled.append(kernel)
            return kernel

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "_can_use_compiled", lambda kernel, first: True)
    active = SimpleNamespace(get_current_device=lambda: DEVICE, get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    fake = FakeKernel()
    fake.arg_names = list(FakeKernel.arg_names)  # type: ignore[assignment]
    return fake


def call(
    kernel: FakeKernel,
    x: Any,
    y: Any,
    n: Any = 5,
    stride: int = 16,
    block: int = 64,
    wide: bool = False,
    warps: int = 4,
) -> None:
    _launch.launch(kernel, (3,), (x, y), (n,), (stride,), {"BLOCK": block, "WIDE": wide}, warps)


def test_the_second_call_of_a_kind_runs_the_kept_kernel(kernel: FakeKernel) -> None:
    x, y = torch.zeros(2, 64).unbind(0)
    call(kernel, x, y)
    call(kernel, y, x, n=9)
    assert len(kernel.compiled) == 1
    (launched,) = kernel.compiled[0].launched
    assert launched[:9] == (3, 1, 1, STREAM, "function", "metadata", None, None, None)
    assert launched[9:] == (y.data_ptr(), x.data_ptr(), 9, 16, 64, False)


def test_what_a_kernel_is_compiled_for_tells_calls_apart(kernel: FakeKernel) -> None:
    x, y = torch.zeros(2, 64).unbind(0)
    other = torch.zeros(65)
    assert other.data_ptr() % 16 == 0
    kinds = [
        {"x": x},
        {"x": other[1:]},  # not aligned
        {"x": None},
        {"x": x.to(torch.float16)},
        {"x": x, "n": torch.zeros(1, dtype=torch.int32)},
        {"x": x, "stride": 1},
        {"x": x, "block": 128},
        {"x": x, "wide": True},
        {"x": x, "warps": 8},
    ]
    for number, kind in enumerate(kinds, 1):
        call(kernel, y=y, **kind)  # type: ignore[arg-type]
        assert len(kernel.compiled) == number
    for kind in kinds:
        call(kernel, y=y, **kind)  # type: ignore[arg-type]
    assert len(kernel.compiled) == len(kinds)
    assert [len(compiled.launched) for compiled in kernel.compiled] == [1] * len(kinds)


def test_counts_of_64_bits_take_the_plain_launch(kernel: FakeKernel) -> None:
    x, y = torch.zeros(2, 64).unbind(0)
    for _ in range(2):
        call(kernel, x, y, n=1 << 31)
    assert len(kernel.compiled) == 2
    assert not _launch._compiled


def test_constants_out_of_order_are_refused(kernel: FakeKernel) -> None:
    x, y = torch.zeros(2, 64).unbind(0)
    with pytest.raises(ValueError, match="constants of fake"):
        _launch.launch(kernel, (3,), (x, y), (5,), (16,), {"WIDE": False, "BLOCK": 64}, 4)


def test_cpu_tensors_take_the_plain_launch() -> None:
    assert not _launch._can_use_compiled(object(), torch.zeros(1))
