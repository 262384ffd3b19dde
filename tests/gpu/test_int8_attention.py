"""int8_attention on the GPU: CUDA and Triton against float64 at every edge of a tile, errors on three kinds of data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.reference.rotate_quantize import quantize_rows

Operands = dict[str, Any]
TILE_KEYS, TILE_QUERIES = 96, 192  # of the CUDA kernel
EDGES = [n + d for n in (TILE_KEYS, 2 * TILE_KEYS, 5 * TILE_KEYS, 6 * TILE_KEYS) for d in (-1, 0, 1)]


@pytest.fixture
def backend(backend: str) -> str:
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CUDA kernel is for compute capability 9.0")
    return backend


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of x [B, S, heads, head_dim], the scales with their tokens contiguous."""
    codes, scale = quantize_rows(x.float().transpose(1, 2).contiguous(), rotate=False)
    return codes[..., : x.shape[3]].transpose(1, 2).contiguous(), scale.transpose(1, 2)  # filled up to 128


def operands(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    (codes, q_scale), (k_codes, k_scale) = quantized(q), quantized(k)
    return {"q": codes, "q_scale": q_scale, "k_cache": k_codes, "k_scale": k_scale, "v_cache": v}


def rand(*shape: int, mean: float = 0.0) -> Tensor:
    """bfloat16, normal, each channel around a mean of its own."""
    x = torch.randn(*shape, device="cuda")
    return (x + mean * torch.randn(shape[2:], device="cuda")).bfloat16()


def make(batch: int, queries: int, heads: int, head_dim: int, capacity: int) -> Operands:
    q, k = (rand(batch, tokens, heads, head_dim) for tokens in (queries, capacity))
    return operands(q, k, rand(batch, capacity, heads, head_dim, mean=0.5))


def relative_error(x: Tensor, exact: Tensor) -> float:
    assert x.isfinite().all()
    return ((x.double() - exact).norm() / exact.norm()).item()


def assert_close(got: tuple[Tensor, Tensor], given: Operands, keys: int, count: float = 1.0) -> None:
    """Rounded weights and a rounded result: two roundings to bfloat16 that lie 0.17% apart in the norm each."""
    wide = {**given, "v_cache": given["v_cache"].double()}
    out, lse = reference.int8_attention(**wide, num_visible=keys, last_key_count=count)
    assert relative_error(got[0], out) < 0.004
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_number_of_keys_up_to_300(backend: str, head_dim: int) -> None:
    given = make(1, 5, 2, head_dim, 300)
    step = 1 if backend == "cuda" else 23  # Triton compiles each number of its tiles
    for keys in [*range(1, 301, step), 300]:
        assert_close(ops.int8_attention(**given, num_visible=keys, backend=backend), given, keys)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 63, 64, 65, TILE_QUERIES - 1, TILE_QUERIES, TILE_QUERIES + 1, 1000])
def test_edges_of_tiles(backend: str, queries: int, head_dim: int) -> None:
    given = make(2, queries, 3, head_dim, max(EDGES))
    for keys in EDGES if backend == "cuda" else EDGES[:2]:
        for count in (1.0, 41.0):
            got = ops.int8_attention(**given, num_visible=keys, last_key_count=count, backend=backend)
            assert_close(got, given, keys, count)


@pytest.mark.parametrize(("batch", "queries", "heads"), [(1, 1, 1), (1, 300, 5), (2, 500, 40), (1, 4524, 3)])
def test_tiles_that_several_multiprocessors_share(backend: str, batch: int, queries: int, heads: int) -> None:
    given = make(batch, queries, heads, 128, 5000)
    for keys in (4999, 5000):
        assert_close(ops.int8_attention(**given, num_visible=keys, backend=backend), given, keys)


def test_slots_beyond_the_visible_are_not_read(backend: str) -> None:
    given = make(2, 70, 2, 128, 400)
    given["v_cache"][:, 333:], given["k_scale"][:, 333:], given["k_cache"][:, 333:] = math.nan, math.nan, 127
    clean = {name: x[:, :333] if "k" in name or "v" in name else x for name, x in given.items()}
    assert_close(ops.int8_attention(**given, num_visible=333, backend=backend), clean, 333)


def test_a_weight_of_one_is_none_and_bits_repeat(backend: str) -> None:
    given = make(1, 4524, 4, 128, 3000)
    first = ops.int8_attention(**given, num_visible=3000, backend=backend)
    for count in [1.0] * 200:
        got = ops.int8_attention(**given, num_visible=3000, last_key_count=count, backend=backend)
        assert torch.equal(first[0], got[0]) and torch.equal(first[1], got[1])


def test_the_last_key_counts_as_so_many_equal_ones(backend: str) -> None:
    given = make(1, 200, 3, 128, 512)
    repeated = {name: x.clone() for name, x in given.items()}
    for name in ("k_cache", "k_scale", "v_cache"):
        repeated[name][:, 100:] = repeated[name][:, 99:100]
    assert_close(ops.int8_attention(**given, num_visible=100, last_key_count=413, backend=backend), repeated, 512)


@pytest.mark.parametrize("growth", [1.0, 30.0, 1000.0])
def test_scores_that_grow_beyond_the_first_tiles(backend: str, growth: float) -> None:
    """The CUDA kernel starts at the last keys: here all of them are small, and earlier ones are huge."""
    given = make(1, 150, 2, 128, 1500)
    given["k_scale"][:, :700] *= 4 * growth
    given["k_scale"][:, 1000:] *= 0.01
    out, lse = ops.int8_attention(**given, num_visible=1500, backend=backend)
    exact = reference.int8_attention(**{**given, "v_cache": given["v_cache"].double()}, num_visible=1500)
    assert relative_error(out, exact[0]) < 0.004
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-3)


def test_rows_of_zeros_and_huge_scales(backend: str) -> None:
    given = make(1, 200, 2, 128, 500)
    given["q"][0, 3], given["q_scale"][0, 4], given["k_scale"][0, 5] = 0, 0.0, 0.0
    given["q_scale"][0, 100:] *= 1e4
    assert_close(ops.int8_attention(**given, num_visible=500, backend=backend), given, 500)


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_cache"])
def test_nan_is_seen(backend: str, name: str) -> None:
    given = make(1, 200, 2, 128, 500)
    given[name][0, 150, 1] = math.nan
    nan = ops.int8_attention(**given, num_visible=500, backend=backend)[0].isnan().unflatten(-1, (2, 128))
    expected = torch.zeros_like(nan)
    if name == "q_scale":
        expected[0, 150, 1] = True
    else:
        expected[0, :, 1] = True
    assert torch.equal(nan, expected)


def test_strided_operands(backend: str) -> None:
    given = make(2, 130, 2, 128, 300)
    given["q"] = torch.cat([given["q"]] * 3, dim=2)[:, :, 2:4]
    given["k_cache"] = torch.cat([given["k_cache"]] * 2, dim=2)[:, :, 2:]
    given["k_scale"], given["q_scale"] = given["k_scale"].contiguous(), given["q_scale"].mT.contiguous().mT
    assert_close(ops.int8_attention(**given, num_visible=299, backend=backend), given, 299)


@pytest.mark.parametrize(("kind", "most"), [("normal", 0.012), ("mean", 0.0019), ("sharp", 0.004)])
def test_error_of_quantised_scores(backend: str, kind: str, most: float) -> None:
    """Against attention in float64 of what was quantised; `sharp`: each query looks for one key."""
    q, k = rand(1, 200, 4, 128), rand(1, 9048, 4, 128, mean=1.0 if kind == "mean" else 0.0)
    v = rand(1, 9048, 4, 128, mean=1.0 if kind == "mean" else 0.0)
    if kind == "sharp":
        q = (q + 4 * k[:, torch.randperm(9048, device="cuda")[:200]].float()).bfloat16()
    out, _ = ops.int8_attention(**operands(q, k, v), num_visible=9048, backend=backend)
    exact = reference.windowed_attention(q.double().flatten(2), k.double(), v.double(), 9048)
    assert relative_error(out, exact) < most


def test_in_a_graph(backend: str) -> None:
    given = make(1, 300, 3, 128, 2000)
    eager = ops.int8_attention(**given, num_visible=1999, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.int8_attention(**given, num_visible=1999, backend=backend)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, eager[0]) and torch.equal(lse, eager[1])
