"""The reference ops against independent formulations: complex RoPE, torch's norms and attention, scalar ring rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lingbot_kernels import reference
from lingbot_kernels.config import PRESETS, LingBotConfig
from lingbot_kernels.reference.rope_cos_sin import rope_frequencies
from lingbot_kernels.ring import RingPosition

EPS = 1e-6


def official_table(positions: list[tuple[int, int, int]], head_dim: int, theta: float) -> torch.Tensor:
    """exp(i * angle) [tokens, head_dim / 2] as the official code makes it: one polar table an axis."""
    spatial = 2 * (head_dim // 6)
    axes = []
    for axis, channels in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        steps = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angles = torch.outer(torch.tensor([float(p[axis]) for p in positions], dtype=torch.float64), theta**-steps)
        axes.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(axes, dim=1)


def official_norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The official chain: float32 norm rounded to x's dtype, times weight, complex float64 rotation."""
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * weight
    pairs = torch.view_as_complex(normed.double().unflatten(-1, (-1, head_dim // 2, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-3).to(x.dtype)


@pytest.mark.parametrize("name", PRESETS)
def test_rope_turns_all_channels_of_a_preset_s_head(name: str) -> None:
    cfg = LingBotConfig.preset(name)
    split = tuple(2 * len(axis) for axis in rope_frequencies(cfg.head_dim, cfg.rope_theta))
    assert sum(split) == cfg.head_dim
    if name.startswith("lingbot-world"):
        assert split == (44, 42, 42)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rope_cos_sin_is_the_official_table(head_dim: int) -> None:
    height, width = 3, 5
    start = 7 * height * width + 4
    positions = [(n // 15, n % 15 // width, n % width) for n in range(start, start + 37)]
    table = official_table(positions, head_dim, 1e4)
    got = reference.rope_cos_sin(37, start, height * width, width, head_dim, 1e4, "cpu", dtype=torch.float64)
    torch.testing.assert_close(got, torch.cat([table.real, table.imag], dim=1), rtol=0, atol=1e-13)
    rounded = torch.full((37, head_dim), float("nan"))
    assert reference.rope_cos_sin(37, start, height * width, width, head_dim, 1e4, "cpu", out=rounded) is rounded
    assert torch.equal(rounded, got.float())


def test_rope_frequencies_split_128_channels_as_44_42_42() -> None:
    t, h, w = reference.rope_frequencies(128, 1e4)
    assert (len(t), len(h), len(w)) == (22, 21, 21)
    assert h == w and t[0] == h[0] == 1.0 and t[11] == 1e4 ** (-22 / 44)


def test_norm_and_rope_equal_the_official_chain_in_bf16_but_for_rare_single_ulps() -> None:
    torch.manual_seed(0)
    heads, head_dim, tokens = 12, 128, 200
    q, k, v = torch.randn(1, tokens, 3, heads * head_dim).bfloat16().unbind(2)
    weight_q, weight_k = (1 + 0.1 * torch.randn(2, heads * head_dim)).bfloat16()
    table = reference.rope_cos_sin(tokens, 1000, 60, 10, head_dim, 1e4, "cpu")
    caches = torch.full((2, 1, 230, heads, head_dim), float("nan"), dtype=torch.bfloat16)
    got_q = reference.qk_norm_rope_kv_write(
        q, k, v, weight_q, weight_k, table, caches[0], caches[1], RingPosition(20), EPS
    )
    positions = [(n // 60, n % 60 // 10, n % 10) for n in range(1000, 1000 + tokens)]
    complex_table = official_table(positions, head_dim, 1e4)
    for got, x, weight in ((got_q, q, weight_q), (caches[0, :, 20:220].flatten(-2), k, weight_k)):
        want = official_norm_rope(x, weight, complex_table, head_dim)
        distance = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
        assert distance.max() <= 1
        assert (distance > 0).sum() <= 1e-4 * distance.numel()
    assert torch.equal(caches[1, :, 20:220].flatten(-2), v)
    assert caches[:, :, :20].isnan().all() and caches[:, :, 220:].isnan().all()


@pytest.mark.parametrize("as_cursor", [False, True])
@pytest.mark.parametrize("chunk_start", range(0, 34, 3))
def test_ring_position_equals_the_scalar_rule(chunk_start: int, as_cursor: bool) -> None:
    sink, capacity, tokens = 3, 10, 6
    cursor = torch.tensor([chunk_start], dtype=torch.int32) if as_cursor else None
    ring = RingPosition(-1 if as_cursor else chunk_start, sink, cursor)
    want = [p if p < sink else sink + (p - sink) % (capacity - sink) for p in range(chunk_start, chunk_start + tokens)]
    assert ring.slots(tokens, capacity, "cpu").tolist() == want


def test_ring_position_refuses_a_sink_that_fills_the_cache() -> None:
    with pytest.raises(ValueError, match=r"sink is 10, must lie in 0 \.\. capacity - 1 = 9"):
        RingPosition(0, 10).slots(1, 10, "cpu")


def test_write_only_wraps_and_leaves_other_slots_and_v() -> None:
    torch.manual_seed(0)
    batch, tokens, heads, head_dim = 2, 5, 3, 16
    k = torch.randn(batch, tokens, heads * head_dim, dtype=torch.float64)
    weight = torch.randn(heads * head_dim, dtype=torch.float64)
    table = reference.rope_cos_sin(tokens, 9, 6, 2, head_dim, 1e4, "cpu", dtype=torch.float64)
    before = torch.randn(2, batch, 9, heads, head_dim, dtype=torch.float64)
    caches = before.clone()
    reference.k_norm_rope_kv_write(k, None, weight, table, caches[0], caches[1], RingPosition(13, 2), EPS)
    assert torch.equal(caches[1], before[1])
    normed = F.rms_norm(k, (heads * head_dim,), weight, EPS)
    pairs = torch.view_as_complex(normed.unflatten(-1, (heads, head_dim // 2, 2)))
    rotated = torch.view_as_real(pairs * torch.complex(*table[:, None].chunk(2, -1))).flatten(-2)
    for i, slot in enumerate([6, 7, 8, 2, 3]):
        torch.testing.assert_close(caches[0, :, slot], rotated[:, i], rtol=1e-12, atol=1e-12)
    for slot in (0, 1, 4, 5):
        assert torch.equal(caches[0, :, slot], before[0, :, slot])


@pytest.mark.parametrize("with_q", [True, False])
def test_pack_then_unpack_equals_the_direct_write(with_q: bool) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, head_dim, ranks = 2, 5, 6, 16, 3
    q, k, v = torch.randn(3, batch, tokens, heads * head_dim)
    weights = torch.randn(2, heads * head_dim)
    table = reference.rope_cos_sin(tokens, 9, 6, 2, head_dim, 1e4, "cpu")
    ring = RingPosition(13, 2)
    direct = torch.zeros(2, batch, 9, heads, head_dim)
    q_out = reference.qk_norm_rope_kv_write(q, k, v, weights[0], weights[1], table, direct[0], direct[1], ring, EPS)
    packed = reference.qk_norm_rope_pack(
        q if with_q else None, k, v, weights[0] if with_q else None, weights[1], table, ranks, EPS
    )
    assert packed.shape == (ranks, tokens, batch, 3 if with_q else 2, heads // ranks, head_dim)
    assert packed.is_contiguous()
    for rank in range(ranks):
        own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        caches = torch.zeros(2, batch, 9, heads // ranks, head_dim)
        q_view = reference.qkv_unpack_kv_write(packed[rank], caches[0], caches[1], ring)
        assert torch.equal(caches, direct[:, :, :, own])
        if with_q:
            assert q_view is not None and q_view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
            assert torch.equal(q_view, q_out.unflatten(-1, (heads, head_dim))[:, :, own])
        else:
            assert q_view is None


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
def test_residual_chain_equals_torch_layer_norm(per_batch: bool, with_gate: bool) -> None:
    torch.manual_seed(0)
    batch, tokens, dim = 2, 3, 48
    x, delta = torch.randn(2, batch, tokens, dim, dtype=torch.float64)
    modulation = torch.randn(3, *((batch, dim) if per_batch else (dim,)), dtype=torch.float64)
    shift, scale, gate = (m[:, None] if per_batch else m for m in modulation)
    x_out, y = reference.residual_norm_modulate(
        x, delta, modulation[0], modulation[1], EPS, gate=modulation[2] if with_gate else None
    )
    want = x + delta * gate if with_gate else x + delta
    torch.testing.assert_close(x_out, want)
    torch.testing.assert_close(y, F.layer_norm(want, (dim,), eps=EPS) * (1 + scale) + shift)
    cam_scale, cam_shift = torch.randn(2, batch, tokens, dim, dtype=torch.float64)
    weight, bias = torch.randn(2, dim, dtype=torch.float64)
    for camera in (True, False):
        x_out, y = reference.gated_residual_camera_norm(
            x,
            delta,
            modulation[2] if with_gate else None,
            cam_scale if camera else None,
            cam_shift if camera else None,
            weight,
            bias,
            EPS,
        )
        expected = (1 + cam_scale) * want + cam_shift if camera else want
        torch.testing.assert_close(x_out, expected)
        torch.testing.assert_close(y, F.layer_norm(expected, (dim,), weight, bias, EPS))


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
def test_fused_residual_norm_equals_the_unfused_bits_and_keeps_both_dtypes(residual: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 64).to(residual)
    delta = torch.randn(1, 7, 64).bfloat16()
    shift, scale, gate = torch.randn(3, 64)
    x_out, y = reference.residual_norm_modulate(x, delta, shift, scale, EPS, gate=gate)
    assert (x_out.dtype, y.dtype) == (residual, torch.bfloat16)
    assert torch.equal(x_out, reference.gated_residual(x, delta, gate))
    assert torch.equal(y, reference.layer_norm_modulate(x_out, shift, scale, EPS, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("segments", [None, [(0, 2), (5, 9)]])
def test_windowed_attention_equals_sdpa_over_the_visible_slots(segments: list[tuple[int, int]] | None) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, head_dim, visible = 2, 4, 3, 16, 9
    q = torch.randn(batch, tokens, heads * head_dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, 12, heads, head_dim, dtype=torch.float64)
    k[:, visible:], v[:, visible:] = float("nan"), float("nan")
    seen = range(visible) if segments is None else [i for start, stop in segments for i in range(start, stop)]
    out, lse = reference.windowed_attention_with_lse(q, k, v, visible, segments=segments)
    queries, keys, values = (
        t.transpose(1, 2) for t in (q.unflatten(-1, (heads, head_dim)), k[:, list(seen)], v[:, list(seen)])
    )
    want = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, want)
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys) / head_dim**0.5
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())
    as_heads = reference.windowed_attention(q.unflatten(-1, (heads, head_dim)), k, v, visible, segments=segments)
    assert torch.equal(out, as_heads)


def test_windowed_attention_refuses_slots_that_are_not_visible() -> None:
    q, k = torch.zeros(1, 1, 16), torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match=r"num_visible is 5, must lie in 1 \.\. capacity = 4"):
        reference.windowed_attention(q, k, k, 5)
    with pytest.raises(ValueError, match=r"segments has \(2, 4\).*num_visible = 3"):
        reference.windowed_attention(q, k, k, 3, segments=[(2, 4)])


def test_linear_gelu_rounds_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 24), torch.randn(8, 24), torch.randn(8)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    torch.testing.assert_close(reference.linear_gelu(x.double(), weight.double(), bias.double()), exact)
    low = [t.bfloat16() for t in (x, weight, bias)]
    exact_low = F.gelu(F.linear(*(t.double() for t in low)), approximate="tanh")
    # One bf16 rounding is at most 2**-8 of the value; 1 + tanh cancels in float32 where the result is tiny.
    assert ((reference.linear_gelu(*low) - exact_low).abs() <= 1.001 * 2**-8 * exact_low.abs() + 1e-6).all()


def test_rms_norm_equals_torch_in_float64_and_rounds_twice_in_bf16() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 7, 96, dtype=torch.float64), torch.randn(96, dtype=torch.float64)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), F.rms_norm(x, (96,), weight, EPS))
    x, weight = x.bfloat16(), weight.bfloat16()
    once = F.rms_norm(x.float(), (96,), None, EPS).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight, EPS), once * weight)
