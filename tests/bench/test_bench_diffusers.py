"""`bench diffusers` on the tiny preset: rows, gate, one set of weights for both formulations."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")

from lingbot_kernels import ops
from lingbot_kernels.benchmarks import diffusers_wan
from lingbot_kernels.benchmarks.rows import read_rows
from lingbot_kernels.cli import main

SMALL = ["--preset", "tiny", "--layers", "1", "--height", "32", "--width", "32", "--rounds", "1", "--device", "cpu"]


def bench(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", "diffusers", *SMALL, *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench("--no-compiled", "--json", str(path))
    rows = read_rows(path)
    assert [row["backend"] for row in rows] == ["diffusers", "lingbot_kernels", "lingbot_kernels causal"]
    for row in rows:
        assert row["bench"] == "diffusers" and row["gate"] == "green" and row["tokens"] == 12
        assert row["ratio"] == pytest.approx(row["p50_us"] / row["ceiling_us"], rel=1e-3)
        assert 0 < row["error"] <= 1.25 * row["plain_error"]
    assert [row["peer"] for row in rows] == [True, False, False]
    assert rows[0]["ratio"] == 1


def test_compiled_twins_are_compiled_alone(tmp_path, monkeypatch):
    compiled = []
    right = torch.nn.Module.compile

    def compile_block(block, **options):
        compiled.append(block)
        right(block, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    path = tmp_path / "rows.jsonl"
    bench("--no-causal", "--json", str(path))
    rows = {row["backend"]: row for row in read_rows(path)}
    assert list(rows) == ["diffusers", "lingbot_kernels", "diffusers compiled", "lingbot_kernels compiled"]
    assert all(row["gate"] == "green" and row["p50_us"] for row in rows.values())
    plain, fast = compiled
    assert type(plain) is diffusers_wan.wan.WanTransformerBlock and type(fast) is not type(plain)
    assert all(a is b for a, b in zip(plain.parameters(), fast.parameters(), strict=True))


def test_a_wrong_op_fails_the_gate_and_has_no_times(tmp_path, monkeypatch):
    path, right = tmp_path / "rows.jsonl", ops.gated_residual
    monkeypatch.setattr(ops, "gated_residual", lambda x, delta, gate, **named: right(x, delta, 1.1 * gate, **named))
    bench("--no-compiled", "--json", str(path), code=1)
    (row,) = read_rows(path)
    assert row["gate"] == "red" and row["p50_us"] is None


def test_a_variant_that_fails_is_a_row(tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("out of tokens")

    monkeypatch.setattr(diffusers_wan.WanBench, "_causal", lambda bench, fast, values: refuse)
    path = tmp_path / "rows.jsonl"
    bench("--no-compiled", "--json", str(path), code=1)
    rows = {row["backend"]: row for row in read_rows(path)}
    assert rows["lingbot_kernels causal"]["gate"] == "failed" and rows["lingbot_kernels causal"]["p50_us"] is None
    assert rows["lingbot_kernels causal"]["note"] == "RuntimeError: out of tokens"
    assert rows["lingbot_kernels"]["gate"] == "green"


def test_both_formulations_share_their_weights():
    block = diffusers_wan.wan.WanTransformerBlock(24, 32, 2)
    twin = diffusers_wan._shallow_block(block)
    twin.attn1.processor = None
    assert block.attn1.processor is not None
    assert all(a is b for a, b in zip(block.parameters(), twin.parameters(), strict=True))
    assert isinstance(twin, torch.nn.Module) and twin is not block


def test_sizes_are_checked():
    assert "--frames" in bench("--frames", "16", code=2)
    assert "--height" in bench("--height", "40", code=2)
