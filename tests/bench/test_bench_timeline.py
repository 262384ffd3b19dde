"""The arithmetic of replayed graphs' kernels, on made traces with the names and overlaps of real ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lingbot_kernels.benchmarks import clocks, timeline
from lingbot_kernels.benchmarks.timeline import Kernel, Placed

FLASH = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16_0"
GEMM = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT"
SPLIT = "nvjet_tst_64x64_64x13_4x1_v_bz_splitK_TNT"
REDUCE = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)"
ROWS = "void lingbot::cuda::(anonymous namespace)::{}<(lingbot::Dtype)2, Shape<8, 2, 320> >(lingbot::cuda::Params)"
CAST = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>(int)"
# (name, microseconds, microseconds after the one before began to idle, or, negative, of overlap with it)
FLOOR_LAYER = [
    (GEMM, 1000, 1), (FLASH, 3600, 2), (GEMM, 330, 1), (GEMM, 330, 1), (FLASH, 70, 1), (GEMM, 330, 1),
    (GEMM, 900, 1), (SPLIT, 850, 1), (REDUCE, 20, 1),
]  # fmt: skip
STEP_LAYER = [
    (GEMM, 1010, 1), (ROWS.format("norm_rope_rows"), 100, -5), (FLASH, 3600, 2), (GEMM, 332, 1),
    (ROWS.format("camera_norm_rows"), 98, -4), (GEMM, 332, 1), (ROWS.format("rms_norm_rows"), 33, 0), (FLASH, 70, 3),
    (GEMM, 332, 1), (ROWS.format("residual_norm_rows"), 66, -6), (GEMM, 905, 1), (SPLIT, 855, 1), (REDUCE, 20, 1),
    (ROWS.format("residual_norm_rows"), 68, -2),
]  # fmt: skip
BEFORE, AFTER = [("Memcpy DtoD (Device -> Device)", 4, 30), (CAST, 5, 1), (GEMM, 25, 1)], [(GEMM, 12, 1), (CAST, 3, 1)]


def laid_out(sequence: list[tuple[str, float, float]], start: float = 1e6) -> list[Kernel]:
    kernels, reached = [], start
    for name, duration, gap in sequence:
        kernels.append(Kernel(name, reached + gap, reached + gap + duration))
        reached = kernels[-1].end
    return kernels


def replayed(layer: list[tuple[str, float, float]], layers: int = 3, replays: int = 2) -> list[Kernel]:
    return laid_out([*BEFORE, *layer * layers, *AFTER] * replays)


def test_a_layer_s_lines_add_up() -> None:
    got = timeline.analyse(replayed(STEP_LAYER), 3, 2)
    lines = {line.label: line for line in got.lines}
    assert list(lines) == [
        "self-attention", "self_attn.o", "camera_norm_rows after self_attn.o", "cross_attn.q",
        "rms_norm_rows after cross_attn.q", "cross-attention", "cross_attn.o",
        "residual_norm_rows after cross_attn.o", "ffn.0", "ffn.2", "residual_norm_rows after ffn.2",
        "self_attn.qkv", "norm_rope_rows after self_attn.qkv",
    ]  # fmt: skip
    assert got.layer_us == pytest.approx(sum(duration + gap for _, duration, gap in STEP_LAYER))
    assert got.layer_us == pytest.approx(sum(line.own_us + line.gap_us for line in got.lines))
    assert lines["self_attn.qkv"].own_us == pytest.approx(1010)
    assert lines["ffn.2"].own_us == pytest.approx(875) and lines["ffn.2"].launches == 2
    residual = lines["residual_norm_rows after cross_attn.o"]
    assert (residual.duration_us, residual.own_us, residual.gap_us) == pytest.approx((66, 60, 0))
    assert lines["self-attention"].gap_us == pytest.approx(2)
    assert got.launches_per_block == {"attention": 2, "products": 7, "fused_passes": 5, "other": 0}


def test_a_replay_adds_up() -> None:
    got = timeline.analyse(replayed(STEP_LAYER), 3, 2)
    kernels = replayed(STEP_LAYER)
    assert got.span_us == pytest.approx((kernels[-1].end - kernels[0].start) / 2)
    assert got.span_us == pytest.approx(sum(got.own_us.values()) + got.gaps_us)
    assert got.outside_us == pytest.approx(got.span_us - 3 * got.layer_us)
    # 30 and five of 1 outside of the layers, the trace's first gap is none
    assert got.gaps_us == pytest.approx((3 * (1 + 2 + 1 + 1 + 3 + 1 + 1 + 1 + 1) * 2 + 2 * 4 + 30) / 2)
    assert got.gaps == pytest.approx((3 * 9 * 2 + 2 * 4 + 1) / 2) and got.median_gap_us == pytest.approx(1)


def test_the_floor_has_the_same_places_without_the_passes() -> None:
    got = timeline.analyse(replayed(FLOOR_LAYER), 3, 2)
    assert [line.label for line in got.lines] == [
        "self-attention", "self_attn.o", "cross_attn.q", "cross-attention", "cross_attn.o", "ffn.0", "ffn.2",
        "self_attn.qkv",
    ]  # fmt: skip
    bare = timeline.analyse(laid_out(FLOOR_LAYER * 6), 3, 2)
    assert bare.span_us == pytest.approx(3 * bare.layer_us - 1 / 2)  # but for the gap before the first kernel
    assert bare.own_us["other"] == 0


def test_a_split_projection_and_a_combined_attention_keep_their_places() -> None:
    split = [(GEMM, 700, 1), *FLOOR_LAYER]
    combined = [*split[:3], ("void flash_fwd_splitkv_combine_kernel<128>(Flash_fwd_params)", 9, 1), *split[3:]]
    lines = {line.label: line for line in timeline.analyse(replayed(combined), 3, 2).lines}
    assert lines["self_attn.qkv"].own_us == pytest.approx(1700) and lines["self_attn.qkv"].launches == 2
    assert lines["self-attention"].own_us == pytest.approx(3609)
    assert lines["ffn.0"].own_us == pytest.approx(900)


def test_a_missing_product_is_not_guessed() -> None:
    labels = [line.label for line in timeline.analyse(replayed(FLOOR_LAYER[:-3]), 3, 2).lines]
    assert "product 1 of 3 after cross-attention" not in labels and "product 1 of 2 after cross-attention" in labels
    assert "self_attn.o" in labels and "self_attn.qkv" not in labels


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got 12 attention calls, must be 16"):
        timeline.analyse(replayed(STEP_LAYER), 4, 2)
    with pytest.raises(ValueError, match="layers: got 1"):
        timeline.analyse(replayed(STEP_LAYER), 1, 6)


def test_overlapping_kernels_share_the_time_line() -> None:
    placed = timeline.place([Kernel("a", 10, 20), Kernel("b", 15, 18), Kernel("c", 16, 30), Kernel("d", 32, 33)])
    assert [(item.gap, item.own) for item in placed] == [(0, 10), (0, 0), (0, 10), (2, 1)]
    assert timeline.place([]) == []


def test_a_trace_s_gpu_events_are_read_in_order() -> None:
    kernels = replayed(STEP_LAYER)
    events: list[dict[str, Any]] = [
        {
            "ph": "X", "cat": "gpu_memcpy" if kernel.name.startswith("Memcpy") else "kernel", "name": kernel.name,
            "pid": 0, "tid": 7, "ts": kernel.start, "dur": kernel.end - kernel.start,
            "args": {"device": 0, "stream": 7, "correlation": 11, "grid": [132, 1, 1], "graph node id": 3},
        }
        for kernel in kernels
    ]  # fmt: skip
    events += [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1.0, "dur": 9.0, "args": {}},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "ProfilerStep#0", "ts": 1.0, "dur": 1e7, "args": {}},
        {"ph": "X", "cat": "cuda_sync", "name": "Context Sync", "ts": 1.0, "dur": 1e7, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1.0, "id": 11},
    ]  # fmt: skip
    random.Random(0).shuffle(events)
    assert timeline.read_kernels({"traceEvents": events}) == [
        Kernel(k.name, k.start, pytest.approx(k.end)) for k in kernels
    ]


@pytest.mark.parametrize(
    ("name", "kind", "short"),
    [
        (FLASH, "attention", FLASH),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention", None),
        ("void pytorch_flash::flash_fwd_kernel<Traits<128>, false>(pytorch_flash::Flash_fwd_params)", "attention",
         "flash_fwd_kernel"),
        (GEMM, "products", GEMM),
        (REDUCE, "products", "splitKreduce_kernel"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)", "products", "Kernel2"),
        (ROWS.format("rms_norm_rows"), "fused_passes", "rms_norm_rows"),
        ("residual_norm_modulate_kernel", "fused_passes", "residual_norm_modulate_kernel"),
        (CAST, "other", "unrolled_elementwise_kernel"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(int)", "other", "reduce_kernel"),
        ("Memset (Device)", "other", "Memset "),
    ],
)  # fmt: skip
def test_kernels_are_told_by_their_names(name: str, kind: str, short: str | None) -> None:
    assert timeline.kind(name) == kind
    assert timeline.short_name(name) == (short or name).strip()


def test_the_table_puts_the_step_beside_the_floor() -> None:
    held = {
        "floor": timeline.analyse(replayed(FLOOR_LAYER), 3, 2),
        "step": timeline.analyse(replayed(STEP_LAYER), 3, 2),
    }
    rows = {line[:45].strip(): line[45:].split() for line in timeline.side_by_side(held).splitlines() if line}
    assert rows["self_attn.qkv"] == ["1000.00", "1010.00", "1.00", "10.00"]
    assert rows["norm_rope_rows after self_attn.qkv"] == ["95.00", "0.00", "95.00"]
    more = held["step"].layer_us - held["floor"].layer_us
    assert rows["a layer"][-1] == f"{more:.2f}"
    assert float(rows["all products"][-1]) == pytest.approx(1010 + 3 * 332 + 905 + 875 - (1000 + 990 + 900 + 870))
    assert "launches a block outside products and attention: 5.0" in timeline.side_by_side(held)


def test_clocks_are_medians_of_what_nvidia_smi_says() -> None:
    got = clocks.medians("1980, 690.50, 61\n[N/A], 1, 2\n1755, 700.25, 63\n1740, 699.00, 64\n\n17")
    assert got == {"sm_mhz": 1755, "watts": 699.0, "celsius": 63, "samples": 3}
    assert clocks.medians("") == {}


def test_own_times_are_by_kind() -> None:
    times = timeline.own_times([Placed(Kernel(FLASH, 0, 5), 0, 5), Placed(Kernel(CAST, 5, 6), 0, 1)])
    assert times == {"attention": 5, "products": 0, "fused_passes": 0, "other": 1}
