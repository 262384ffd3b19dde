"""fp8 attention with V's mean taken out, as `quality` measures it: exact arithmetic, scales, the row."""

from __future__ import annotations

import fa3_stand_in
import pytest
import torch
from test_quality import make_quality_scene
from torch import Tensor

from lingbot_kernels import Int8Recipe, reference
from lingbot_kernels.benchmarks import fp8_attention as module
from lingbot_kernels.benchmarks.fp8_attention import fp8_attention, to_fp8, without_mean
from lingbot_kernels.benchmarks.quality import FP8_ATTENTION, QualityBench, QualityPlan


def operands(mean: float, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 48).double(), torch.randn(2, 40, 3, 16).double(), torch.randn(2, 40, 3, 16).double()
    return q, k, mean + spread * v


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_mean_comes_out_and_back_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, without the codes: only keys that are seen have a part in the mean."""
    fa3_stand_in.install(monkeypatch)
    q, k, v = operands(3.0)
    v[:, 31:] = torch.nan
    monkeypatch.setattr(module, "to_fp8", lambda x: (x, torch.ones(2, 3)))
    want = reference.windowed_attention(q, k, v, 31)
    assert error(fp8_attention(q, k, v, 31), want) <= 1e-12
    centred, mean = without_mean(v[:, :31])
    assert centred.mean(1).abs().max() < 1e-12 and mean.shape == (2, 1, 3, 16)


def test_a_scale_for_each_head() -> None:
    x = torch.randn(2, 7, 3, 16) * torch.tensor([1.0, 1000.0, 0.0])[:, None]
    codes, scale = to_fp8(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (2, 3) and scale.dtype == torch.float32
    assert codes[:, :, :2].float().abs().amax((1, 3)).eq(448).all() and not codes[:, :, 2].float().any()
    back = codes.float() * scale[:, None, :, None]
    assert ((back - x).abs() <= x.abs() / 16 + scale[:, None, :, None] * 2.0**-9).all()


def test_values_with_a_mean_cost_little_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where products are exact: a mean takes the codes' bits from what differs between the keys."""
    calls = fa3_stand_in.install(monkeypatch)
    q, k, v = (x.bfloat16() for x in operands(2.0, 0.2))
    want = reference.windowed_attention(q.double(), k.double(), v.double(), 40)
    with_mean_out = error(fp8_attention(q, k, v, 40).double(), want)
    monkeypatch.setattr(module, "without_mean", lambda v: (v.float(), torch.zeros(1)))
    assert with_mean_out < 0.5 * error(fp8_attention(q, k, v, 40).double(), want)
    assert calls[0]["descales"] == [((2, 3), torch.float32)] * 3 and calls[0]["dtype"] == torch.float8_e4m3fn


def test_it_is_a_row_of_quality_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_quality_scene(monkeypatch, "loud", 2)
    bench = QualityBench(scene, QualityPlan("loud", Int8Recipe(), 2))
    assert FP8_ATTENTION not in bench.precisions()  # a CPU
    calls = fa3_stand_in.install(monkeypatch)
    monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(bench, "sensitivity", lambda: ({}, {}))
    names = ("bfloat16", "int8", "fp8", FP8_ATTENTION)
    found = bench.precisions()
    monkeypatch.setattr(bench, "precisions", lambda: {name: found[name] for name in names})
    report = bench.run()
    psnr = {name: min(each["psnr_db"]) for name, each in report["teacher_forced"].items()}
    assert calls and psnr["fp8"] < psnr[FP8_ATTENTION] != psnr["int8"] and FP8_ATTENTION in report["free_rollout"]
    assert all("attend" not in vars(block.self_attn) for block in scene.model.blocks)
