"""Launch configurations are pure functions of the shape: no lane idles at the tuned widths, every width is covered."""

from __future__ import annotations

from typing import Any

import pytest

from lingbot_kernels.triton import (
    _rows,
    gated_residual,
    gated_residual_camera_norm,
    gated_residual_camera_norm_quantize,
    int8_linear,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    qk_norm_rope_kv_write,
    qk_norm_rope_pack,
    residual_norm_modulate,
    residual_norm_modulate_quantize,
    rms_norm,
    rope_cos_sin,
    rotate_quantize,
)

QUANTISING = (
    layer_norm_modulate_quantize, residual_norm_modulate_quantize, gated_residual_camera_norm_quantize,
)  # fmt: skip
BF16, WIDE = (2, 2), (4, 2)  # element sizes of a pass: 16-bit, or with a float32 residual stream


@pytest.mark.parametrize("dim", [5120, 3072, 1536, 8192, 4096, 2560, 1280])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tuned_widths_leave_no_lane_idle(dim: int, element_size: int) -> None:
    words = _rows.word_config(dim, element_size)
    assert dim // 2 % words.chunk == 0
    assert words.chunk * 2 * element_size == words.num_warps * 32 * _rows.VECTOR_BYTES
    values = _rows.value_config(dim, (element_size, 2))
    assert dim % values.chunk == 0
    assert values.chunk * element_size == values.num_warps * 32 * _rows.VECTOR_BYTES


def test_tuned_configurations() -> None:
    assert _rows.word_config(5120, 2) == _rows.RowConfig(num_warps=4, chunk=512)
    assert _rows.word_config(1536, 2) == _rows.RowConfig(num_warps=2, chunk=256)
    assert _rows.word_config(5120, 4) == _rows.RowConfig(num_warps=8, chunk=512)
    assert _rows.value_config(5120, (4, 2)) == _rows.RowConfig(num_warps=8, chunk=1024)


def test_long_rows_of_q_k_v_have_programs_of_their_own() -> None:
    split = _rows.RowConfig(num_warps=4, chunk=512, split=True, streaming=False)
    assert qk_norm_rope_kv_write.launch_config(5120, 2, 4524) == split
    assert qk_norm_rope_pack.launch_config(5120, 2, 1131) == split
    assert qk_norm_rope_kv_write.launch_config(5120, 2, 4524, full=False) == _rows.word_config(5120, 2)
    assert qk_norm_rope_kv_write.launch_config(1536, 2, 4524) == _rows.word_config(1536, 2)


def test_passes_take_more_warps_where_rows_are_few_or_short() -> None:
    few, many = _rows.FEW_ROWS, _rows.FEW_ROWS + 1
    wide_row = _rows.RowConfig(num_warps=8, chunk=2048)
    assert layer_norm_modulate.launch_config(5120, BF16, few) == wide_row
    assert layer_norm_modulate.launch_config(5120, BF16, many) == _rows.value_config(5120, BF16)
    assert residual_norm_modulate.launch_config(5120, BF16, few) == wide_row
    assert residual_norm_modulate.launch_config(5120, BF16, many) == _rows.RowConfig(4, 1024, streaming=False)
    assert gated_residual_camera_norm.launch_config(5120, BF16, many) == wide_row
    short_row = _rows.RowConfig(num_warps=4, chunk=1024)
    for rows in (few, many):
        assert layer_norm_modulate.launch_config(1536, BF16, rows) == short_row
        assert residual_norm_modulate.launch_config(1536, BF16, rows) == short_row
        assert rms_norm.launch_config(1536, 2, rows) == _rows.RowConfig(num_warps=4, chunk=512)
        assert rms_norm.launch_config(5120, 2, rows) == _rows.word_config(5120, 2)


@pytest.mark.parametrize("op", [layer_norm_modulate, residual_norm_modulate, gated_residual])
@pytest.mark.parametrize("rows", [1, 1131, 4524])
def test_float32_streams_are_cached_as_usual(op: Any, rows: int) -> None:
    assert op.launch_config(5120, WIDE, rows) == _rows.value_config(5120, WIDE, streaming=False)


def test_every_width_is_covered_by_powers_of_two_within_the_register_budget() -> None:
    for dim in range(2, _rows.MAX_DIM + 1, 2):
        for config, length in ((_rows.word_config(dim, 2), dim // 2), (_rows.value_config(dim, (2, 2)), dim)):
            assert config.chunk & (config.chunk - 1) == 0
            assert config.num_warps in (1, 2, 4, 8)
            assert -(-length // config.chunk) <= 8  # vectors a thread holds of one row


def test_a_warp_count_can_be_asked_for() -> None:
    assert _rows.word_config(5120, 2, num_warps=2) == _rows.RowConfig(num_warps=2, chunk=256)


def test_cache_hints_follow_streaming() -> None:
    assert (_rows.RowConfig(4, 512).evict, _rows.RowConfig(4, 512).modifier) == ("evict_first", ".cs")
    plain = _rows.RowConfig(4, 512, streaming=False)
    assert (plain.evict, plain.modifier) == ("", "")


@pytest.mark.parametrize(
    ("chunk_start", "sink", "capacity"), [(0, 2, 9), (8, 2, 9), (9, 2, 9), (10**15, 2, 9), (30, 0, 7)]
)
def test_reduced_position_keeps_every_slot(chunk_start: int, sink: int, capacity: int) -> None:
    reduced = _rows.reduced_position(chunk_start, None, sink, capacity)
    assert isinstance(reduced, int) and reduced < capacity

    def slot(p: int) -> int:
        return p if p < sink else sink + (p - sink) % (capacity - sink)

    assert [slot(chunk_start + i) for i in range(2 * capacity)] == [slot(reduced + i) for i in range(2 * capacity)]


@pytest.mark.parametrize("head_dim", [20, 64, 96, 128, 256, 1024])
def test_rope_tiles_stay_small(head_dim: int) -> None:
    config = rope_cos_sin.launch_config(head_dim)
    assert head_dim // 2 <= config.pairs < head_dim
    assert config.tokens * config.pairs <= max(32 * config.num_warps, config.pairs)


@pytest.mark.parametrize("rows", [1, 64, 65, 1131, 4524, 10**6])
@pytest.mark.parametrize("out_size", [2, 4])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_of_the_int8_product_fit_every_gpu(rows: int, out_size: int, capability: tuple[int, int]) -> None:
    limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    for columns, depth in ((15360, 5120), (5120, 13824), (1536, 1536), (8, 128)):
        config = int8_linear.launch_config(rows, columns, depth, capability, out_size)
        assert config.shared_bytes <= limit
        assert config.block_m * config.block_n <= 128 * 32 * config.num_warps  # int32 sums a thread holds
        assert config.tma == (capability[0] in (9, 10))


def test_measured_tiles_of_the_int8_product() -> None:
    wide, pair = (
        int8_linear.LinearConfig(128, 256, 128, 8, 4, group_m=16),
        int8_linear.LinearConfig(128, 128, 128, 4, 3),
    )
    deep, small = int8_linear.LinearConfig(128, 128, 256, 8, 3), int8_linear.LinearConfig(64, 128, 128, 4, 4)
    measured = {
        (4524, 15360, 5120): wide, (4524, 5120, 5120): wide, (4524, 13824, 5120): wide, (4524, 5120, 13824): wide,
        (2262, 15360, 5120): pair, (2262, 5120, 5120): pair, (2262, 13824, 5120): pair, (2262, 5120, 13824): wide,
        (1131, 15360, 5120): pair, (1131, 5120, 5120): pair, (1131, 13824, 5120): pair, (1131, 5120, 13824): deep,
        (4680, 4608, 1536): pair, (4680, 1536, 1536): pair, (4680, 8960, 1536): pair, (4680, 1536, 8960): pair,
        (1170, 4608, 1536): pair, (1170, 1536, 1536): small, (1170, 8960, 1536): pair, (1170, 1536, 8960): small,
    }  # fmt: skip
    assert {shape: int8_linear.launch_config(*shape, (9, 0)) for shape in measured} == measured
    assert int8_linear.launch_config(4524, 15360, 5120, (9, 0), out_size=4).block_n == 128  # 256 would spill


def test_quantised_rows_are_whole_blocks_of_the_rotation() -> None:
    for dim in range(1, _rows.MAX_DIM + 1, 7):
        configs = [rotate_quantize.launch_config(dim, size, 4524) for size in (2, 4)]
        configs += [op.launch_config(dim, BF16, 4524) for op in QUANTISING]
        for config in configs:
            assert config.chunk % 128 == 0
            assert -(-dim // config.chunk) * config.chunk // (32 * config.num_warps) <= 64  # float32 values a thread


def test_measured_configurations_of_the_quantising_passes() -> None:
    def plain(num_warps: int, chunk: int) -> _rows.RowConfig:
        return _rows.RowConfig(num_warps, chunk, streaming=False)

    rotations = {5120: plain(4, 1024), 13824: plain(8, 1024), 8960: plain(8, 1024), 1536: plain(2, 512)}
    assert {dim: rotate_quantize.launch_config(dim, 2, 4524) for dim in rotations} == rotations
    assert residual_norm_modulate_quantize.launch_config(5120, BF16, 4524) == plain(8, 1024)
    assert residual_norm_modulate_quantize.launch_config(1536, BF16, 4524) == plain(4, 512)
    assert gated_residual_camera_norm_quantize.launch_config(5120, BF16, 4524) == plain(8, 2048)
    assert layer_norm_modulate_quantize.launch_config(5120, (2,), 4524) == plain(4, 512)
