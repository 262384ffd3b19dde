"""The bench as a command: rows, exit codes, failures kept apart, the picture."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lingbot_kernels import reference
from lingbot_kernels.benchmarks import environment, kernels, peers
from lingbot_kernels.benchmarks.environment import Environment
from lingbot_kernels.benchmarks.kernel_cases import KERNEL_CASES, default_kernel_cases
from lingbot_kernels.benchmarks.rows import REQUIRED, Row, append_rows, latest, read_rows
from lingbot_kernels.commands.bench_kernels import command

HOT = "qk_norm_rope_kv_write"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(command, ["--device", "cpu", "--quick", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_rows_have_every_field_and_times_behind_green_gates(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    ops = f"{HOT},rms_norm,linear_gelu,windowed_attention"
    output = bench("--cases", "s192-d512", "--backends", "reference,sdpa", "--ops", ops, "--json", str(path))
    found = read_rows(path)
    assert {(row["op"], row["backend"]) for row in found} >= {
        (HOT, "reference"), (HOT, "eager-official"), (HOT, "eager-float32"), (HOT, "flashinfer"),
        ("rms_norm", "reference"), ("linear_gelu", "reference"), ("linear_gelu", "eager"),
        ("windowed_attention", "sdpa"),
    }  # fmt: skip
    for row in found:
        assert set(REQUIRED) <= set(row) and row["precision"] == "bfloat16"
        if row["backend"].startswith("flashinfer") and row["gate"] == "not installed":
            assert row["note"] and row["p50_us"] is None
            continue
        assert row["gate"] == "green", row
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["wall_us"] > 0 and row["commit"] and row["torch"] == torch.__version__
        assert row["gpu"].startswith("CPU") and row["driver"] is None
        assert row["error"] <= 1.25 * row["plain_error"]
        if row["op"] == "windowed_attention":
            assert row["tflops"] > 0 and row["ratio"] is None
        else:
            assert row["ratio"] == pytest.approx(row["p50_us"] / row["ceiling_us"], rel=1e-3)
    hot = next(row for row in found if row["op"] == HOT)
    assert hot["bytes"] == 6 * 192 * 512 * 2 and hot["shape"] == [1, 192, 512] and hot["dtype"] == "bfloat16"
    assert {row["backend"]: row["peer"] for row in found}["eager-official"] is True
    assert output.count("\n") >= len(found)


def test_a_wrong_kernel_is_red_has_no_speed_and_exits_with_1(tmp_path, monkeypatch):
    from lingbot_kernels import ops

    right = ops.rms_norm
    monkeypatch.setattr(
        ops, "rms_norm", lambda x, weight, eps, *, backend: right(x, weight, eps, backend=backend) * 1.01
    )
    path = tmp_path / "rows.jsonl"
    arguments = ("--cases", "s192-d512", "--backends", "reference", "--ops", "rms_norm,gated_residual")
    output = bench(*arguments, "--json", str(path), code=1)
    by_op = {row["op"]: row for row in read_rows(path)}
    red = by_op["rms_norm"]
    assert red["gate"] == "red" and "error" in red["note"] and "red" in output
    assert red["p50_us"] is red["p20_us"] is red["wall_us"] is red["ratio"] is None
    assert red["error"] > 1.25 * red["plain_error"]
    assert by_op["gated_residual"]["gate"] == "green" and by_op["gated_residual"]["p50_us"] > 0


def test_a_failing_op_is_reported_and_the_others_run(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise RuntimeError("launch failed")

    from lingbot_kernels import ops

    monkeypatch.setattr(ops, "rms_norm", refuse)
    path = tmp_path / "rows.jsonl"
    arguments = ("--cases", "s192-d512", "--backends", "reference", "--ops", "rms_norm,gated_residual")
    output = bench(*arguments, "--json", str(path), code=1)
    gates = {row["op"]: (row["gate"], row["note"]) for row in read_rows(path)}
    assert gates["rms_norm"] == ("failed", "RuntimeError: launch failed")
    assert gates["gated_residual"][0] == "green"
    assert "launch failed" in output


def test_a_failing_peer_is_reported_and_does_not_fail_the_run(tmp_path, monkeypatch):
    def refuse(op, case, inputs):
        raise ValueError("num_heads 4 is not served")

    peer = peers.Peer("other", (HOT,), refuse)
    monkeypatch.setattr(kernels, "peers_of", lambda op: [peer])
    path = tmp_path / "rows.jsonl"
    bench("--cases", "s192-d512", "--backends", "reference", "--ops", HOT, "--json", str(path))
    last = read_rows(path)[-1]
    assert (last["backend"], last["peer"], last["gate"]) == ("other", True, "failed")
    assert "num_heads 4" in last["note"]


def test_a_backend_that_cannot_serve_says_why(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench("--cases", "s192-d512", "--backends", "cuda", "--ops", "rms_norm", "--no-peers", "--json", str(path))
    (row,) = read_rows(path)
    assert row["gate"] == "not installed" and row["note"] and row["p50_us"] is None


def test_the_wrap_case_measures_ring_ops_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench("--cases", "s192-d512-wrap", "--backends", "reference", "--json", str(path))
    found = read_rows(path)
    assert {row["op"] for row in found} == {HOT, "k_norm_rope_kv_write", "qkv_unpack_kv_write"}
    assert all(row["gate"] == "green" and not row["peer"] for row in found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "softmax"], "no 'softmax'"),
        (["--cases", "s1"], "no 's1'"),
        (["--backends", "opencl"], "no 'opencl'"),
        (["--device", "tpu9"], "--device"),
        (["--ops", "a,,b"], "separated by commas"),
    ],
)
def test_bad_names_are_usage_errors(arguments, message):
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2 and message in result.output


def test_flashinfer_peers_pass_the_gate_with_stand_ins_of_their_signatures(tmp_path, monkeypatch):
    """Stand-ins compute what FlashInfer documents: so the adapters hand over, and take back, the right things."""

    def turned(x, table, head_dim):
        return reference.apply_rope(x.unflatten(-1, (-1, head_dim)), table)

    def fused(qkv, q_weight, k_weight, *, ppf, pph, ppw, num_heads_q, head_dim, eps, base, interleave, **rest):
        assert (rest["num_frame_channels"], rest["num_height_channels"], rest["num_width_channels"]) == (44, 42, 42)
        assert interleave and num_heads_q * head_dim * 3 == qkv.shape[-1]
        q, k, v = qkv.chunk(3, dim=-1)
        table = reference.rope_cos_sin(ppf * pph * ppw, 0, pph * ppw, ppw, head_dim, base, qkv.device)
        q, k = (turned(reference.rms_norm(x, w, eps), table, head_dim) for x, w in ((q, q_weight), (k, k_weight)))
        return q, k, v.unflatten(-1, (-1, head_dim)).contiguous()

    def rope_inplace(positions, query, key, head_size, cos_sin_cache, is_neox):
        assert not is_neox and query.dim() == 2
        for x in (query, key):
            x.copy_(turned(x[None], cos_sin_cache[positions], head_size).flatten(-2)[0])

    package, norm, rope = (types.ModuleType(name) for name in ("flashinfer", "flashinfer.norm", "flashinfer.rope"))
    package.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    norm.fused_qk_rmsnorm_rope, norm.rmsnorm = fused, reference.rms_norm
    rope.apply_rope_with_cos_sin_cache_inplace = rope_inplace
    for module in (package, norm, rope):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "rows.jsonl"
    bench("--cases", "s192-d512", "--backends", "cpu", "--ops", HOT, "--json", str(path))
    found = {row["backend"]: row for row in read_rows(path)}
    for name in ("flashinfer", "flashinfer-fused"):
        assert found[name]["gate"] == "green" and found[name]["p50_us"] > 0, found[name]
    assert found["flashinfer-fused"]["note"] == "no cache write, no frame offset"


def test_rows_round_trip_and_the_latest_of_a_kind_is_kept(tmp_path):
    environment = Environment("GPU A", "1", "2.11", "13.0", None, "abc", "2026-01-01T00:00:00Z")
    row = Row("kernels", "c", "op", "cuda", False, (1, 2), "bfloat16", 1, 2, "green", 8, p50_us=1.23456789, error=0.0)
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row.to_json(environment)])
    append_rows(path, [{**row.to_json(environment), "p50_us": 2.0}])
    found = read_rows(path)
    assert [r["p50_us"] for r in found] == [1.2346, 2.0]
    assert [r["p50_us"] for r in latest(found)] == [2.0]
    append_rows(path, [{**row.to_json(environment), "precision": "int8"}])
    assert [r["precision"] for r in latest(read_rows(path))] == ["bfloat16", "int8"]
    older = row.to_json(environment)
    del older["precision"]
    path.write_text(json.dumps(older) + "\n")
    assert [r["precision"] for r in read_rows(path)] == ["bfloat16"]
    assert Row("kernels", "c", "op", "b", False, (), "f", 1, 2, "red", 8, error=float("inf")).to_json(environment)[
        "error"
    ] is None  # fmt: skip
    path.write_text(json.dumps({"bench": "kernels"}) + "\n")
    with pytest.raises(ValueError, match="lacks case"):
        read_rows(path)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1"):
        read_rows(path)


def test_commit_names_the_environment_then_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("LINGBOT_KERNELS_COMMIT", "fedcba")
    assert environment.commit_of(tmp_path) == "fedcba"
    monkeypatch.delenv("LINGBOT_KERNELS_COMMIT")
    assert environment.commit_of(tmp_path) is None
    monkeypatch.setattr(environment, "commit_of", lambda: None)
    assert Environment.collect(torch.device("cpu")).commit.startswith("v")
    monkeypatch.undo()
    monkeypatch.delenv("LINGBOT_KERNELS_COMMIT", raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        assert environment._output(*git, *arguments) == ""
    (tmp_path / "file").write_text("1")
    clean = environment.commit_of(tmp_path)
    assert len(clean) == 12 and not clean.endswith("-dirty")
    environment._output(*git, "add", "file")
    assert environment.commit_of(tmp_path) == clean + "-dirty"


def test_a_file_of_other_rows_is_refused_before_anything_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"bench": "model"}\n')
    output = bench("--ops", "rms_norm", "--json", str(path), code=2)
    assert "--json" in output and "lacks case" in output
    assert path.read_text() == '{"bench": "model"}\n'


def test_default_cases_exist_and_cover_the_targets():
    for device in ("cuda", "cpu"):
        for quick in (False, True):
            assert set(default_kernel_cases(device, quick)) <= set(KERNEL_CASES)
    assert {"s4524-d5120", "s4680-d5120", "s1131-d5120", "s4680-d1536"} <= set(default_kernel_cases("cuda", False))


def synthetic_rows() -> list[dict]:
    environment = Environment("Some GPU", "1", "2.11", "13.0", "3.6", "abc", "2026-01-01T00:00:00Z")
    made = []
    for op in (HOT, "k_norm_rope_kv_write", "rms_norm"):
        for backend, time in (("cuda", 100.0), ("triton", 110.0), ("reference", 1600.0), ("eager-official", 1500.0)):
            peer = backend.startswith("eager")
            made.append(
                Row(
                    "kernels", "s4524-d5120", op, backend, peer, (1, 4524, 5120), "bfloat16", 4524, 5120, "green", 1,
                    time, time, time, "copy", 98.0, time / 98, 1.0, None, 9.0,
                ).to_json(environment)
            )  # fmt: skip
    return made


def test_plot_is_a_png_of_one_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    from lingbot_kernels.benchmarks import plots

    path = tmp_path / "plots" / "out.png"
    plots.kernels(synthetic_rows(), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    with pytest.raises(ValueError, match="several GPUs"):
        plots.kernels([*synthetic_rows(), {**synthetic_rows()[0], "gpu": "Another"}], path)
    with pytest.raises(ValueError, match="no green row"):
        plots.kernels([{**row, "gate": "red", "p50_us": None} for row in synthetic_rows()], path)


def test_from_plots_and_updates_without_measuring(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lingbot_kernels.benchmarks import winners

    table = tmp_path / "_winners.py"
    table.write_text(Path(winners._winners.__file__).read_text())
    monkeypatch.setattr(winners._winners, "__file__", str(table))
    path = tmp_path / "rows.jsonl"
    append_rows(path, synthetic_rows())
    arguments = ["--from", str(path), "--plot", str(tmp_path / "out.png"), "--update-winners"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "winners: default cuda, 0 rules" in result.output and (tmp_path / "out.png").exists()
    assert "Some GPU" in table.read_text()
