"""fa3-fwd as a backend of windowed_attention: what it is handed, what it may serve, and when `auto` takes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import fa3_stand_in
import pytest
import torch

from lingbot_kernels import ops, reference
from lingbot_kernels.ops._winners import ATTENTION_WINNERS, AttentionWinners

module: Any = sys.modules["lingbot_kernels.ops.windowed_attention"]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    fa3_stand_in.forget()
    yield
    fa3_stand_in.forget()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), installed: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(module, "_flash_attention_4", lambda: "flash-attn-4 is not importable")
    if installed:
        fa3_stand_in.install(monkeypatch)
    else:
        monkeypatch.setitem(sys.modules, fa3_stand_in.MODULE, None)


@pytest.mark.parametrize(("segments", "count"), [([0, 9], 1.0), ([0, 2, 5, 9], 1.0), ([0, 9], 500.0)])
def test_what_it_is_handed(monkeypatch: pytest.MonkeyPatch, segments: list[int], count: float) -> None:
    """Its arguments, and its log-sum-exp where ranges of keys, or a key that counts for several, are merged."""
    calls = fa3_stand_in.install(monkeypatch)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 48), *torch.randn(2, 2, 13, 3, 16).unbind(0)
    ranges = list(zip(segments[::2], segments[1::2], strict=True))
    want = reference.windowed_attention(q, k, v, 9, segments=ranges, last_key_count=count)
    got = module._op(q, k, v, segments, "fa3", count)
    assert got.is_contiguous() and (got - want).norm() <= 1e-5 * want.norm()
    merged = len(segments) > 2 or count != 1
    seen = [(0, 8), (8, 9)] if count != 1 else ranges
    assert [call.pop("shapes") for call in calls] == [[(2, 4, 3, 16), *[(2, b - a, 3, 16)] * 2] for a, b in seen]
    assert all(
        call == {
            "softmax_scale": 0.25, "causal": False, "return_attn_probs": merged, "dtype": torch.float32,
            "descales": [None] * 3,
        }
        for call in calls
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "installed", "reason"),
    [
        (BF16, 128, (9, 0), True, None),
        (BF16, 64, (9, 0), True, None),
        (torch.float16, 128, (9, 0), True, "serves bfloat16, not float16: fa3-fwd is built without it"),
        (torch.float32, 128, (9, 0), True, "serves bfloat16 and float16, not float32"),
        (BF16, 130, (9, 0), True, "serves head_dim up to 128, a multiple of 8, not 130"),
        (BF16, 128, (10, 0), True, "fa3-fwd serves GPUs of compute capability 9.0, not 10.0"),
        (BF16, 128, (8, 0), True, "fa3-fwd serves GPUs of compute capability 9.0, not 8.0"),
        (BF16, 128, (9, 0), False, "fa3-fwd is not importable"),
    ],
)
def test_what_it_may_serve(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], installed: bool,
    reason: str | None,
) -> None:  # fmt: skip
    on_a_gpu(monkeypatch, capability, installed)
    found = module.why_not("fa3", "cuda", dtype, head_dim)
    assert found == reason if reason is None else reason in found
    if reason is None:
        assert module.resolve_library("fa3", "cuda", dtype, head_dim) == "fa3"
    else:
        with pytest.raises(ops.BackendUnavailable, match="backend 'fa3' can't serve"):
            module.resolve_library("fa3", "cuda", dtype, head_dim)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, installed=False)
    assert "install lingbot-kernels[fa3]" in module.why_not("fa3", "cuda", BF16, 128)
    with pytest.raises(ops.BackendUnavailable, match="backend 'fa3' can't serve: serves CUDA tensors, not cpu"):
        ops.windowed_attention(torch.zeros(1, 2, 16), *torch.zeros(2, 1, 4, 1, 16), 4, backend="fa3")


def test_auto_takes_it_where_it_was_measured_to_win_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    shape = ("cuda", BF16, 128, 4524, 27144, 5120)
    assert not ATTENTION_WINNERS.rules  # none is measured yet
    assert module.resolve_library(None, *shape) == "cudnn"
    monkeypatch.setattr(module, "ATTENTION_WINNERS", AttentionWinners(((4524, 27144, 5120, "fa3"),)))
    module.resolve_library.cache_clear()
    assert module.resolve_library(None, *shape) == module.resolve_library("auto", *shape) == "fa3"
    for other in ((4523, 27144, 5120), (4524, 512, 5120), (4524, 27144, 1536), (0, 0, 0)):
        assert module.resolve_library(None, "cuda", BF16, 128, *other) == "cudnn"
    assert module.resolve_library(None, "cuda", torch.float16, 128, *shape[3:]) == "cudnn"
    assert module.resolve_library(None, "cpu", *shape[1:]) == "sdpa"
    monkeypatch.setitem(sys.modules, fa3_stand_in.MODULE, None)
    fa3_stand_in.forget()
    assert module.resolve_library(None, *shape) == "cudnn"
