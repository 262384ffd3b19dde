"""Which backend serves a call: precedence, refusals by name, and the automatic choice as a pure function."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from lingbot_kernels import ops
from lingbot_kernels.ops import _dispatch, _native
from lingbot_kernels.ops._winners import Winners

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = "LINGBOT_KERNELS_BACKEND"


def chosen(backend: str | None = None, op: str = "rms_norm", dtype: torch.dtype = torch.float32) -> str:
    return _dispatch.resolve(op, backend, "cpu", dtype, 5, 48)


def test_argument_then_context_then_environment_then_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert chosen() == chosen("auto") == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert (chosen(), chosen("cpu"), chosen("auto")) == ("reference", "cpu", "cpu")
    with ops.use_backend("cpu"):
        assert (chosen(), chosen("reference")) == ("cpu", "reference")
        with ops.use_backend("auto"):
            assert chosen() == "cpu"
        with pytest.raises(ZeroDivisionError), ops.use_backend("reference"):
            assert chosen() == "reference"
            _ = 1 // 0
        assert chosen() == "cpu"
    assert chosen() == "reference"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert chosen() == "cpu"


def test_the_context_belongs_to_its_thread() -> None:
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_an_op_runs_on_the_backend_that_was_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    planned = _native.plan
    monkeypatch.setattr(_native, "plan", lambda op, backend, *a: (calls.append(backend), planned(op, backend, *a))[1])
    op = sys.modules["lingbot_kernels.ops.rms_norm"]._op
    op.forget()
    x, weight = torch.ones(1, 2, 8), torch.ones(8)
    ops.rms_norm(x, weight, 1e-6)
    ops.rms_norm(x, weight, 1e-6, backend="cpu")
    assert calls == ["cpu"] * 2
    ops.rms_norm(x, weight, 1e-6, backend="reference")
    with ops.use_backend("reference"):
        ops.rms_norm(x, weight, 1e-6)
    ops.rms_norm(x.double(), weight.double(), 1e-6)
    assert len(calls) == 2


def test_unknown_names_are_refused_where_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(1, 2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="backend: got 'gpu', must be auto or one of cuda, triton, cpu, reference"):
        ops.rms_norm(x, weight, 1e-6, backend="gpu")
    with pytest.raises(ValueError, match="use_backend: got 'CPU'"), ops.use_backend("CPU"):
        pytest.fail("entered")
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="LINGBOT_KERNELS_BACKEND: got 'fast'"):
        ops.rms_norm(x, weight, 1e-6)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _dispatch._resolve.cache_clear()
    x, weight = torch.ones(1, 2, 8), torch.ones(8)
    for backend in ("cuda", "triton"):
        with pytest.raises(
            ops.BackendUnavailable, match=f"rms_norm: backend '{backend}' can't serve: serves CUDA tensors, not cpu"
        ):
            ops.rms_norm(x, weight, 1e-6, backend=backend)
        with ops.use_backend(backend), pytest.raises(ops.BackendUnavailable, match="serves CUDA tensors"):
            ops.rms_norm(x, weight, 1e-6)
    with pytest.raises(ops.BackendUnavailable, match=r"serves bfloat16, float16 and float32, not float64"):
        ops.rms_norm(x.double(), weight.double(), 1e-6, backend="cpu")
    _dispatch._resolve.cache_clear()


def test_without_the_compiled_core_cpu_says_so_and_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the compiled core is not importable"
    monkeypatch.setattr(_native, "why_not_cpu", lambda: reason)
    _dispatch._resolve.cache_clear()
    try:
        assert chosen() == "reference"
        with pytest.raises(ops.BackendUnavailable, match=reason):
            chosen("cpu")
    finally:
        _dispatch._resolve.cache_clear()


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_op_has_the_reference_and_a_reason_for_each_absent_home(op: str) -> None:
    absent = _dispatch.OPS[op].absent
    assert "reference" not in absent and set(absent) <= set(ops.BACKENDS)
    for backend, reason in absent.items():
        assert _dispatch.why_not(op, backend, "cuda", torch.bfloat16) == reason
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert _dispatch.why_not(op, "reference", "cuda", dtype) is None
    assert (_dispatch.why_not(op, "cpu", "cpu", torch.bfloat16) is None) == ("cpu" not in absent)


def test_the_registry_names_the_public_ops() -> None:
    helpers = {"BACKENDS", "BackendUnavailable", "RingPosition", "use_backend"}
    assert set(_dispatch.OPS) == set(ops.__all__) - helpers


def test_winners_take_the_last_rule_that_applies() -> None:
    winners = Winners("cuda", (("a", 1000, 0, "triton"), ("a", 4000, 2000, "cuda"), ("b", 0, 0, "triton")))
    picked = [winners.pick("a", tokens, dim) for tokens, dim in ((999, 5120), (1000, 5120), (4000, 1536), (4000, 5120))]
    assert picked == ["cuda", "triton", "triton", "cuda"]
    assert (winners.pick("b", 0, 0), winners.pick("c", 9999, 9999)) == ("triton", "cuda")


@pytest.mark.parametrize("best", ["cuda", "triton"])
def test_the_automatic_order_starts_with_the_winner(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "CUDA_WINNERS", Winners("cuda", (("rms_norm", 100, 0, best),)))
    other = "triton" if best == "cuda" else "cuda"
    assert _dispatch.automatic_order("rms_norm", "cuda", 4524, 5120) == (best, other, "reference")
    assert _dispatch.automatic_order("rms_norm", "cuda", 99, 5120) == ("cuda", "triton", "reference")
    assert _dispatch.automatic_order("rms_norm", "cpu", 4524, 5120) == ("cpu", "reference")


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_home_has_its_file(op: str) -> None:
    homes = _dispatch.OPS[op]
    kernel = homes.kernel or op
    assert kernel in _dispatch.OPS
    for backend, path in (
        ("triton", f"lingbot_kernels/triton/{kernel}.py"),
        ("cpu", f"csrc/cpu/{kernel}.cpp"),
        ("cuda", f"csrc/cuda/{kernel}.cu"),
        ("reference", f"lingbot_kernels/reference/{op}.py"),
    ):
        assert (ROOT / path).is_file() == (backend not in homes.absent)
