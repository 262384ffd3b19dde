"""The norm + RoPE ops on the GPU: every backend, dtype, shape, stride and wrap against float64."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_good, ulps_apart
from official_bits import assert_official_bits, measure_shares
from torch import Tensor

from lingbot_kernels import RingPosition, ops, reference

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
    (3, 24, 6, 1, 8, 1, 5),
    (64, 128, 4, 1, 8, 2, 6),
    (1, 10, 3, 2, 4, 0, 2),
]


def make(heads: int, head_dim: int, tokens: int, batch: int, capacity: int, dtype: torch.dtype) -> dict[str, Tensor]:
    dim = heads * head_dim
    projection = torch.randn(batch, tokens, 3 * dim, device="cuda").to(dtype)
    q, k, v = projection.chunk(3, dim=-1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": torch.randn(dim, device="cuda").to(dtype),
        "k_weight": torch.randn(dim, device="cuda").to(dtype),
        "cos_sin": ops.rope_cos_sin(tokens, 1000, 12, 4, head_dim, 10000.0, "cuda", backend="reference"),
        "k_cache": torch.randn(batch, capacity, heads, head_dim, device="cuda").to(dtype),
        "v_cache": torch.randn(batch, capacity, heads, head_dim, device="cuda").to(dtype),
    }


def widened(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in args.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["full", "no_v", "write_only", "cursor"])
def test_kv_write(backend: str, dtype: torch.dtype, shape: tuple[int, ...], mode: str) -> None:
    heads, head_dim, tokens, batch, capacity, sink, start = shape
    args = make(heads, head_dim, tokens, batch, capacity, dtype)
    cursor = torch.tensor([start], dtype=torch.int32, device="cuda") if mode == "cursor" else None
    ring = RingPosition(0 if mode == "cursor" else start, sink, cursor)
    plain, exact = {k: v.clone() for k, v in args.items()}, widened(args)
    slots = ring.slots(tokens, capacity, "cuda")
    before = args["v_cache"].clone(), args["k_cache"].clone()
    for name in ("k_cache", "v_cache"):
        if name == "k_cache" or mode != "no_v":
            args[name][:, slots] = float("nan")
    if mode == "no_v":
        for case in (args, plain, exact):
            case["v"] = None  # type: ignore[assignment]
    if mode == "write_only":
        for case in (args, plain, exact):
            del case["q"], case["q_weight"]
        ops.k_norm_rope_kv_write(**args, ring=ring, eps=1e-6, backend=backend)
        reference.k_norm_rope_kv_write(**plain, ring=ring, eps=1e-6)
        reference.k_norm_rope_kv_write(**exact, ring=ring, eps=1e-6)
    else:
        got = ops.qk_norm_rope_kv_write(**args, ring=ring, eps=1e-6, backend=backend)
        expected = reference.qk_norm_rope_kv_write(**plain, ring=ring, eps=1e-6)
        assert_as_good(got, expected, reference.qk_norm_rope_kv_write(**exact, ring=ring, eps=1e-6))
    assert_as_good(args["k_cache"][:, slots], plain["k_cache"][:, slots], exact["k_cache"][:, slots])
    assert torch.equal(args["v_cache"], plain["v_cache"])
    kept = torch.ones(capacity, dtype=torch.bool, device="cuda")
    kept[slots] = False
    assert torch.equal(args["v_cache"][:, kept], before[0][:, kept])
    assert torch.equal(args["k_cache"][:, kept], before[1][:, kept])


def test_every_wrap_offset(backend: str) -> None:
    heads, head_dim, tokens, capacity, sink = 5, 64, 6, 17, 4
    for start in range(0, 40):
        args = make(heads, head_dim, tokens, 1, capacity, torch.bfloat16)
        plain = {k: v.clone() for k, v in args.items()}
        ring = RingPosition(start, sink)
        ops.qk_norm_rope_kv_write(**args, ring=ring, eps=1e-6, backend=backend)
        reference.qk_norm_rope_kv_write(**plain, ring=ring, eps=1e-6)
        assert torch.equal(args["v_cache"], plain["v_cache"])
        assert ulps_apart(args["k_cache"], plain["k_cache"]).max() <= 2


@pytest.mark.parametrize("heads,tokens", [(40, 4524), (40, 1131), (12, 4680)])
def test_bits_of_the_official_chain(backend: str, heads: int, tokens: int) -> None:
    assert_official_bits(measure_shares(backend, heads, tokens, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("heads,head_dim,tokens,batch,ranks", [(40, 128, 9, 1, 4), (12, 64, 5, 2, 3), (6, 32, 3, 1, 2)])
def test_pack_and_unpack(
    backend: str, dtype: torch.dtype, parts: int, heads: int, head_dim: int, tokens: int, batch: int, ranks: int
) -> None:
    args = make(heads, head_dim, tokens, batch, tokens, dtype)
    case = [args[n] for n in ("q", "k", "v", "q_weight", "k_weight", "cos_sin")]
    if parts == 2:
        case[0] = case[3] = None  # type: ignore[call-overload]
    wide = [None if x is None else x.double() for x in case]
    got = ops.qk_norm_rope_pack(*case, ranks, 1e-6, backend=backend)
    plain = reference.qk_norm_rope_pack(*case, ranks, 1e-6)
    assert_as_good(got, plain, reference.qk_norm_rope_pack(*wide, ranks, 1e-6))
    packed, own = got[0], heads // ranks
    ring = RingPosition(tokens + 3, 2)
    caches = [
        torch.full((batch, tokens + 4, own, head_dim), float("nan"), device="cuda", dtype=dtype) for _ in range(4)
    ]
    q = ops.qkv_unpack_kv_write(packed, caches[0], caches[1], ring, backend=backend)
    q_plain = reference.qkv_unpack_kv_write(packed, caches[2], caches[3], ring)
    assert torch.equal(caches[0].nan_to_num(), caches[2].nan_to_num())
    assert torch.equal(caches[1].nan_to_num(), caches[3].nan_to_num())
    assert (q is None) == (parts == 2)
    if q is not None:
        assert torch.equal(q, q_plain)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 10, 24])
@pytest.mark.parametrize(
    "start,tokens,stride,width", [(0, 4680, 1560, 52), (1_000_000 * 1508 + 37, 1131, 1508, 52), (5, 1, 6, 3)]
)
def test_rope_table(backend: str, head_dim: int, start: int, tokens: int, stride: int, width: int) -> None:
    out = torch.full((tokens, head_dim), float("nan"), device="cuda")
    ops.rope_cos_sin(tokens, start, stride, width, head_dim, 10000.0, "cuda", out=out, backend=backend)
    exact = reference.rope_cos_sin(tokens, start, stride, width, head_dim, 10000.0, "cpu", dtype=torch.float64)
    assert ulps_apart(out.cpu(), exact.float()).max() <= 1
