"""`lingbot-kernels profile`: the table's arithmetic on a made trace, then rollouts and ops on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_video import SMALL

from lingbot_kernels import nvtx
from lingbot_kernels.benchmarks import profiling, trace_report
from lingbot_kernels.ops._dispatch import OPS

GEMM, FLASH = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "flash_fwd_sm90"
ROWS = "void lingbot::cuda::(anonymous namespace)::rows<Shape<8> >(lingbot::cuda::Params)"
COPY = "void at::native::elementwise_kernel<128, 4, at::native::copy(int)>(int)"


def span(name: str, start: float, stop: float, cat: str = "user_annotation", **args: Any) -> dict[str, Any]:
    prefix = "lingbot_kernels:" if cat == "user_annotation" else ""
    return {
        "ph": "X", "cat": cat, "name": prefix + name, "ts": start, "dur": stop - start, "pid": 1, "tid": 1,
        "args": args,
    }  # fmt: skip


def made_trace() -> dict[str, Any]:
    """A step of two blocks and a context update of one and a half; each launch's kernel runs later, on the GPU."""
    events = [span("chunk", 0, 200), span("step 0", 0, 100), span("context", 100, 190)]
    launches = []

    def block(index: int, start: float, whole: bool) -> None:
        events.append(span(f"block {index}", start, start + 40))
        events.append(span("self_attn", start, start + 20))
        events.append(span("qk_norm_rope_kv_write" if whole else "k_norm_rope_kv_write", start + 5, start + 10))
        launches.extend([(start + 2, GEMM), (start + 6, ROWS)])  # a product, then the op's own kernel
        if whole:
            events.append(span("windowed_attention", start + 11, start + 15))
            events.append(span("ffn", start + 20, start + 40))
            events.append(span("gated_residual", start + 30, start + 35))
            launches.extend([(start + 12, FLASH), (start + 31, ROWS)])

    for index, start, whole in ((0, 5, True), (1, 50, True), (0, 105, True), (1, 148, False)):
        block(index, start, whole)
    for i, (at, name) in enumerate(launches):
        events.append(span("cudaLaunchKernel", at, at + 1, "cuda_runtime", correlation=i))
        # 7 us each, but the first two overlap by 3 us, and 10 us apart from the third on
        start = 1000 + (4 * i if i < 2 else 10 * i)
        events.append(span(name, start, start + 7, "kernel", correlation=i) | {"tid": 7})
    events += [span("someone else's", 1, 2, "cpu_op"), span("elsewhere", 3, 4, "cuda_runtime", correlation=999)]
    events += [{"ph": "M", "name": "process_name", "pid": 1}]
    return {"traceEvents": events[::-1]}  # in any order


def test_a_trace_s_ranges_nest_and_own_their_launches():
    ranges = trace_report.read_ranges(made_trace())
    paths = [r.path for r in ranges]
    assert paths[:4] == [
        ("chunk",), ("chunk", "step 0"), ("chunk", "step 0", "block 0"), ("chunk", "step 0", "block 0", "self_attn"),
    ]  # fmt: skip
    assert ranges[0].launches == 14 and ranges[0].gpu_us == 95 and ranges[0].host_us == 200
    found = trace_report.phases(ranges)
    assert list(found) == ["step 0", "context", "self_attn", "ffn"]
    assert found["step 0"] == trace_report.Sum(1, 100, 53, 8)
    assert found["context"] == trace_report.Sum(1, 90, 42, 6)
    assert found["self_attn"] == trace_report.Sum(4, 80, 74, 11)


def test_launches_are_those_of_whole_blocks():
    ranges = trace_report.read_ranges(made_trace())
    got = trace_report.block_launches(ranges, OPS, profiling.LEFT_TO_LIBRARIES)
    # the write and the residual; not the product, not attention
    assert got == {"all": 4.0, "own": 2.0, "outside": 2.0}
    sums = trace_report.op_sums(ranges, OPS)
    assert sums["qk_norm_rope_kv_write", "self_attn"] == trace_report.Sum(3, 15, 18, 3)
    assert sums["k_norm_rope_kv_write", "self_attn"].calls == 1
    assert sums["windowed_attention", "self_attn"].gpu_us == 21


def test_idle_share_is_of_the_union():
    # 11 us of the first two, then 12 kernels of 7 us; from 1000 to 1137.
    assert trace_report.idle_share(made_trace()) == pytest.approx(1 - (11 + 12 * 7) / 137)
    assert trace_report.idle_share({"traceEvents": [span("chunk", 0, 1)]}) is None


def cuda_trace() -> dict[str, Any]:
    """What torch.profiler writes of CUDA: launches by runtime and driver, nested ones too, copies, a replayed graph,
    annotations of the GPU's own, arrows and counters.
    """
    events = [
        span("step 0", 0, 100), span("block 0", 10, 60), span("self_attn", 10, 40), span("rms_norm", 30, 36),
        span("ffn", 45, 60),
        span("aten::linear", 11, 20, "cpu_op"),
        span("cudaLaunchKernelExC", 12, 18, "cuda_runtime", correlation=1),
        span("cuLaunchKernelEx", 13, 17, "cuda_driver", correlation=1),
        span("cuLaunchKernelEx", 31, 33, "cuda_driver", correlation=2),
        span("cudaMemcpyAsync", 48, 50, "cuda_runtime", correlation=3),
        span("cudaLaunchKernel", 52, 54, "cuda_runtime", correlation=4),
        span("cudaGraphLaunch", 70, 75, "cuda_runtime", correlation=5),
        span("cudaDeviceSynchronize", 95, 99, "cuda_runtime", correlation=6),
        span(GEMM, 1000, 1100, "kernel", correlation=1, stream=7),
        span(ROWS, 1090, 1150, "kernel", correlation=2, stream=7),
        span("Memcpy DtoD (Device -> Device)", 1152, 1162, "gpu_memcpy", correlation=3, stream=7),
        span(COPY, 1162, 1172, "kernel", correlation=4, stream=7),
        span(ROWS, 1180, 1190, "kernel", correlation=5, stream=7),
        span(FLASH, 1188, 1198, "kernel", correlation=5, stream=7),
    ]  # fmt: skip
    events += [span("lingbot_kernels:step 0", 1000, 1198, "gpu_user_annotation") | {"tid": 7}]
    events += [span("Context Sync", 1000, 1300, "cuda_sync")]
    events += [{"ph": "s", "id": 1, "cat": "ac2g", "name": "ac2g", "ts": 12, "pid": 1, "tid": 1}]
    return {"schemaVersion": 1, "deviceProperties": [{"name": "NVIDIA H100"}], "traceEvents": events}


def test_a_trace_of_cuda_is_read_as_the_profiler_writes_it():
    ranges = {r.name: r for r in trace_report.read_ranges(cuda_trace())}
    assert (ranges["self_attn"].launches, ranges["self_attn"].gpu_us) == (2, 150)
    assert (ranges["rms_norm"].launches, ranges["rms_norm"].gpu_us) == (1, 50)  # of 60, 10 are the product's
    assert (ranges["ffn"].launches, ranges["ffn"].gpu_us, ranges["ffn"].outside) == (2, 20, 2)
    step = ranges["step 0"]
    assert (step.launches, step.gpu_us, step.outside) == (6, 150 + 20 + 18, 4)
    assert trace_report.idle_share(cuda_trace()) == pytest.approx((2 + 8) / 198)
    got = trace_report.block_launches(list(ranges.values()), OPS, profiling.LEFT_TO_LIBRARIES)
    assert got == {"all": 4.0, "own": 1.0, "outside": 3.0}


def test_a_trace_without_ranges_is_refused():
    with pytest.raises(ValueError, match="LINGBOT_KERNELS_NVTX=1"):
        trace_report.read_ranges({"traceEvents": [span("x", 0, 1, "cpu_op")]})


def test_a_rollout_s_profile(invoke, tmp_path):
    pytest.importorskip("matplotlib")
    output = invoke(
        "profile", "rollout", *SMALL, "--trace", "t.json", "--json", "p.json", "--plot", "p.png", "--chunks", 2
    ).output
    assert not nvtx.enabled()
    report = json.loads((tmp_path / "p.json").read_text())
    assert {name: row["calls"] for name, row in report["phases"].items()} == {
        **{f"step {i}": 2 for i in range(4)}, "context": 2, "embeddings": 10, "self_attn": 30, "camera": 28,
        "cross_attn": 28, "ffn": 28, "head": 8,
    }  # fmt: skip
    steps = [report["phases"][f"step {i}"]["host_us"] for i in range(4)]
    parts = sum(report["phases"][name]["host_us"] for name in ("self_attn", "camera", "cross_attn", "ffn"))
    assert 0 < parts < sum(steps) + report["phases"]["context"]["host_us"]
    ops = {(row["op"], row["phase"]): row for row in report["ops"]}
    tokens, dim, width = 3 * 2 * 2, 128, 4
    assert report["tokens"] == tokens
    assert ops["qk_norm_rope_kv_write", "self_attn"]["bytes"] == 6 * tokens * dim * width
    assert ops["qk_norm_rope_kv_write", "self_attn"]["calls"] == 28
    assert ops["k_norm_rope_kv_write", "self_attn"]["calls"] == 2
    assert ops["gated_residual_camera_norm", "camera"]["bytes"] == 6 * tokens * dim * width
    assert ops["windowed_attention", "self_attn"]["bytes"] == 2 * (tokens + 6 * tokens) * dim * width
    assert ops["windowed_attention", "cross_attn"]["bytes"] == 2 * (tokens + 16) * dim * width
    for row in report["ops"]:
        assert row["tbps"] == pytest.approx(row["bytes"] * row["calls"] / row["host_us"] / 1e6)
    assert report["launches_per_block"] is None and report["gpu_idle_share"] is None
    for name in ("step 0", "qk_norm_rope_kv_write", "cross_attn"):
        assert name in output
    assert trace_report.read_ranges(json.loads((tmp_path / "t.json").read_text()))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision", ["int8", "int8_qk"])
def test_a_quantised_rollout_s_profile(invoke, tmp_path, precision):
    own = ["--precision", precision, "--dtype", "bfloat16"]
    invoke("profile", "rollout", *SMALL, *own, "--trace", "t.json", "--json", "p.json")
    report = json.loads((tmp_path / "p.json").read_text())
    ops = {(row["op"], row["phase"]): row for row in report["ops"]}
    tokens, dim, ffn, width = 3 * 2 * 2, 128, 256, 2
    codes = tokens * (dim + 4)
    qkv, out = ((codes + rows * (dim + 4) + tokens * rows * width) for rows in (3 * dim, dim))
    assert ops["int8_linear", "self_attn"]["bytes"] == (qkv + out) // 2
    assert ops["int8_linear", "cross_attn"]["bytes"] == out
    assert ops["rotate_quantize", "ffn"]["bytes"] == tokens * ffn * width + tokens * (ffn + 4)
    assert ops["gated_residual_camera_norm_quantize", "camera"]["bytes"] == 5 * tokens * dim * width + codes
    write = "qk_norm_rope_quantize_kv_write" if precision == "int8_qk" else "qk_norm_rope_kv_write"
    assert ops[write, "self_attn"]["bytes"] > 0 and all(row["bytes"] > 0 for row in report["ops"])


@pytest.mark.parametrize("name", OPS)
def test_every_op_can_be_profiled(name, invoke, tmp_path):
    invoke("profile", "op", name, "--case", "s192-d512", "--calls", 3, "--device", "cpu", "--json", "p.json")
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["what"] == name and report["phases"] == {}
    (row,) = report["ops"]
    assert (row["op"], row["calls"]) == (name, 3) and row["bytes"] > 0 and row["tbps"] > 0


BAD = [
    (["op"], "needs the op's name"),
    (["rollout", "rms_norm"], "takes none"),
    (["op", "softmax"], "no op 'softmax'"),
    (["op", "rms_norm", "--case", "s1"], "no case 's1'"),
    (["op", "rms_norm", "--backend", "cuda", "--device", "cpu"], "can't serve"),
    (["op", "rms_norm", "--case", "s192-d512-wrap", "--device", "cpu"], "has no problem for rms_norm"),
    (["op", "rms_norm", "--nsys", "--device", "cpu"], "--nsys"),
    (["rollout", "--trace", "nowhere/t.json"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_a_bad_argument_is_one_line(arguments, message, invoke, tmp_path):
    output = invoke("profile", *arguments, code=2).output
    assert message in output.replace("\n", " ") and "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_nsys_records_the_same_command():
    command = profiling.nsys_command("/bin/nsys", Path("out/trace.nsys-rep"), ["profile", "op", "rms_norm"])
    assert command[0] == "/bin/nsys" and "--output=out/trace" in command
    assert command[-5:] == ["-m", "lingbot_kernels", "profile", "op", "rms_norm"]
