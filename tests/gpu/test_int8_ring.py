"""Norm, rotation, quantisation and the write to an int8 ring on the GPU: every dtype, shape, stride and wrap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lingbot_kernels import RingPosition, ops, reference
from lingbot_kernels.reference.rotate_quantize import quantize_values

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# heads, head_dim, tokens, batch, capacity, sink, chunk_start
SHAPES = [
    (40, 128, 7, 1, 21, 4, 0),
    (40, 128, 33, 2, 64, 16, 50),  # wraps
    (24, 128, 1, 1, 5, 0, 7),
    (12, 128, 61, 2, 100, 30, 90),
    (5, 128, 13, 1, 20, 3, 15),
    (20, 256, 9, 1, 12, 0, 8),
    (24, 64, 17, 2, 40, 10, 33),
    (2, 64, 5, 1, 9, 2, 6),
    (9, 32, 5, 1, 9, 2, 6),
    (3, 24, 6, 1, 8, 1, 5),
    (64, 128, 4, 1, 8, 2, 6),
    (1, 10, 3, 2, 4, 0, 2),
    (1, 64, 3, 1, 4, 0, 2),  # less than a warp
    (7, 96, 3, 1, 4, 0, 2),
]
RING = ("k_cache", "k_scale", "v_cache")
POISON = 77
Case = dict[str, Tensor]


def make(heads: int, head_dim: int, tokens: int, batch: int, capacity: int, dtype: torch.dtype) -> Case:
    dim = heads * head_dim
    q, k, v = torch.randn(batch, tokens, 3 * dim, device="cuda").to(dtype).chunk(3, dim=-1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": torch.randn(dim, device="cuda").to(dtype),
        "k_weight": torch.randn(dim, device="cuda").to(dtype),
        "cos_sin": ops.rope_cos_sin(tokens, 1000, 12, 4, head_dim, 10000.0, "cuda", backend="reference"),
        "k_cache": torch.full((batch, capacity, heads, head_dim), POISON, dtype=torch.int8, device="cuda"),
        "k_scale": torch.full((batch, heads, capacity), math.nan, device="cuda").transpose(1, 2),
        "v_cache": torch.full((batch, capacity, heads, head_dim), math.nan, device="cuda").to(dtype),
    }


def call(case: Case, ring: RingPosition, backend: str = "cuda") -> list[Tensor]:
    """q_codes, q_scale (where there is a q) and the ring's three tensors, of the op on a copy of the ring."""
    own = {name: x.clone() if name in RING else x for name, x in case.items()}
    op = ops.qk_norm_rope_quantize_kv_write if "q" in case else ops.k_norm_rope_quantize_kv_write
    return [*(op(**own, ring=ring, eps=1e-6, backend=backend) or ()), *(own[name] for name in RING)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    apart = (got[0].int() - want[0].int()).abs()
    assert apart.max() <= 1, f"{int(apart.max())} steps apart"
    assert apart.count_nonzero() <= 2e-3 * apart.numel() + 2, f"{int(apart.count_nonzero())} of {apart.numel()} differ"
    torch.testing.assert_close(got[1], want[1], rtol=2e-5, atol=0)


def same(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["full", "no_v", "write_only", "cursor"])
def test_codes_and_slots(dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    heads, head_dim, tokens, batch, capacity, sink, start = shape
    case = make(heads, head_dim, tokens, batch, capacity, dtype)
    cursor = torch.tensor([start], dtype=torch.int32, device="cuda") if mode == "cursor" else None
    ring = RingPosition(0 if mode == "cursor" else start, sink, cursor)
    if mode == "no_v":
        case["v"] = None  # type: ignore[assignment]
    if mode == "write_only":
        del case["q"], case["q_weight"]
    got, plain = call(case, ring), call(case, ring, "reference")
    slots = ring.slots(tokens, capacity, "cuda")
    kept = torch.ones(capacity, dtype=torch.bool, device="cuda")
    kept[slots] = False
    *q, k_cache, k_scale, v_cache = got
    *q_plain, k_plain, k_scale_plain, v_plain = plain
    if q:
        assert q[0].shape == (batch, tokens, heads, head_dim) and q[1].shape == (batch, tokens, heads)
        # In 16 bits a value whose sum of squares rounds otherwise is a step of that dtype off on the way.
        if dtype == torch.float32:
            assert_close(q, q_plain)
    if dtype == torch.float32:
        assert_close([k_cache[:, slots], k_scale[:, slots]], [k_plain[:, slots], k_scale_plain[:, slots]])
    assert same(v_cache, v_plain)
    assert (k_cache[:, kept] == POISON).all() and k_scale[:, kept].isnan().all()
    pairs = [(k_cache[:, slots], k_scale[:, slots], k_plain[:, slots], k_scale_plain[:, slots])]
    for codes, scale, codes_plain, scale_plain in [*pairs, *([(*q, *q_plain)] if q else [])]:
        assert codes.int().abs().amax(-1).eq(127).all()
        value, want = (a * b.unsqueeze(-1) for a, b in ((codes, scale), (codes_plain, scale_plain)))
        step = {torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
        size = want.abs().amax(-1, keepdim=True)
        assert ((value - want).abs() <= 1.01 * size / 127 + step * size).all()
        # One code of a few in another step weighs more than one of thousands.
        assert (value - want).norm() <= (2e-3 if want.numel() > 5000 else 2e-2) * want.norm()
    assert all(same(a, b) for a, b in zip(got, call(case, ring), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_float32_forms_values(shape: tuple[int, ...]) -> None:
    """Codes and scales are those of what the float32 form writes, bit for bit where both sum in one order."""
    heads, head_dim, tokens, batch, capacity, sink, start = shape
    case, ring = make(heads, head_dim, tokens, batch, capacity, torch.float32), RingPosition(start, sink)
    codes, scale, k_cache, k_scale, _ = call(case, ring)
    floats = {name: x for name, x in case.items() if name != "k_scale"}
    floats["k_cache"], floats["v_cache"] = (torch.full_like(case["v_cache"], math.nan) for _ in range(2))
    q_out = ops.qk_norm_rope_kv_write(**floats, ring=ring, eps=1e-6, backend="cuda")
    slots = ring.slots(tokens, capacity, "cuda")
    for got, values in (
        ((codes, scale), q_out.unflatten(-1, (heads, head_dim))),
        ((k_cache[:, slots], k_scale[:, slots]), floats["k_cache"][:, slots]),
    ):
        want = quantize_values(values)
        if head_dim in (64, 128, 32, 10):
            assert torch.equal(got[0], want[0]) and same(got[1], want[1])
        else:  # here only the other form has vectors, and adds the squares in another order
            assert_close(list(got), list(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 24])
def test_every_wrap_and_the_write_only_half(head_dim: int, dtype: torch.dtype) -> None:
    heads, tokens, capacity, sink = 5, 6, 17, 4
    case = make(heads, head_dim, tokens, 1, capacity, dtype)
    half = {name: x for name, x in case.items() if name not in ("q", "q_weight")}
    first = call(case, RingPosition(0, sink))
    for start in range(40):
        ring = RingPosition(start, sink)
        got, slots = call(case, ring), ring.slots(tokens, capacity, "cuda")
        assert same(got[0], first[0]) and same(got[1], first[1])
        assert all(same(a[:, slots], b[:, :tokens]) for a, b in zip(got[2:], first[2:], strict=True))
        assert all(same(a, b) for a, b in zip(got[2:], call(half, ring), strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 24])
def test_heads_without_ordinary_values(head_dim: int) -> None:
    case = make(6, head_dim, 5, 1, 9, torch.bfloat16)
    case["q"], case["k"] = case["q"].clone(), case["k"].clone()
    case["q"][0, 0] = 0
    case["q"][0, 1, head_dim : 2 * head_dim] = 0
    case["q"][0, 2, 3] = math.nan
    case["k"][0, 3, 2 * head_dim] = math.inf
    codes, scale, k_cache, k_scale, _ = call(case, RingPosition(0, 2))
    assert not codes[0, 0].any() and not scale[0, 0].any()
    assert not codes[0, 1, 1].any() and scale[0, 1, 1] == 0 and (scale[0, 1, ::2] > 0).all()
    assert not codes[0, 2].any() and scale[0, 2].isnan().all()
    assert not k_cache[0, 3].any() and k_scale[0, 3, 2].isnan()
    assert k_scale[0, :3].isfinite().all() and scale[0, 3:].isfinite().all()


@pytest.mark.parametrize("offset", [1, 8])
def test_operands_that_lie_anywhere(offset: int) -> None:
    """Rows and caches off 16 bytes, and scales as [B, capacity, heads], have the same bits."""
    case, ring = make(8, 64, 9, 2, 14, torch.bfloat16), RingPosition(11, 3)
    want = call(case, ring)
    wide = torch.zeros(2, 9, 8 * 64 + 24, dtype=torch.bfloat16, device="cuda")
    moved = {**case, "q": wide[..., offset : offset + 512], "k_scale": case["k_scale"].contiguous()}
    moved["q"].copy_(case["q"])
    codes = torch.empty(case["k_cache"].numel() + offset, dtype=torch.int8, device="cuda")[offset:]
    moved["k_cache"] = codes.view(case["k_cache"].shape).fill_(POISON)
    own = {name: x.clone() if name in ("k_scale", "v_cache") else x for name, x in moved.items()}
    q = ops.qk_norm_rope_quantize_kv_write(**own, ring=ring, eps=1e-6, backend="cuda")
    got = [*q, *(own[name] for name in RING)]
    slots = ring.slots(9, 14, "cuda")
    for a, b in zip(got, want, strict=True):
        if offset == 8:
            assert same(a.contiguous(), b.contiguous())  # the same kernel: a vector of codes is 8 bytes
        elif a.dtype == torch.int8:  # element by element the sum of squares is added in another order
            a, b = (x[:, slots] if x.shape[1] == 14 else x for x in (a, b))
            assert (a.int() - b.int()).abs().max() <= 2


def test_a_replayed_graph_follows_the_cursor() -> None:
    heads, head_dim, tokens, capacity, sink = 40, 128, 32, 100, 20
    case = make(heads, head_dim, tokens, 1, capacity, torch.bfloat16)
    cursor = torch.zeros(1, dtype=torch.int32, device="cuda")
    ring = RingPosition(0, sink, cursor)
    ops.qk_norm_rope_quantize_kv_write(**case, ring=ring, eps=1e-6, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.qk_norm_rope_quantize_kv_write(**case, ring=ring, eps=1e-6, backend="cuda")
    for start in (0, 32, 64, 85, 96, 3):
        for name in RING:
            case[name].fill_(POISON)
        cursor.fill_(start)
        want = call(case, RingPosition(start, sink))[2:]
        graph.replay()
        assert all(same(case[name], x) for name, x in zip(RING, want, strict=True)), start


@pytest.mark.parametrize("heads,tokens", [(40, 4524), (40, 1131), (12, 4680)])
def test_a_chunk_of_the_real_models_is_what_attention_reads(heads: int, tokens: int) -> None:
    case = make(heads, 128, tokens, 1, 2 * tokens, torch.bfloat16)
    codes, scale, k_cache, k_scale, v_cache = call(case, RingPosition(0, 0))
    exact = {name: case[name].double() for name in ("q", "k", "q_weight", "k_weight", "cos_sin")}
    for got, name in (((codes, scale), "q"), ((k_cache[:, :tokens], k_scale[:, :tokens]), "k")):
        norm = reference.rms_norm(exact[name], exact[f"{name}_weight"], 1e-6).unflatten(-1, (heads, 128))
        true = reference.apply_rope(norm, exact["cos_sin"])
        error = ((got[0] * got[1].unsqueeze(-1)) - true).norm() / true.norm()
        # amax / 127 / sqrt(12) over the rms of a head, whose amax the random weights make large.
        assert error < 0.02, float(error)
    assert same(v_cache[:, :tokens].flatten(2), case["v"].contiguous())
