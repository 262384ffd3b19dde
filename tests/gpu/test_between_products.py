"""The passes between two matrix products on the GPU: every backend and dtype pair against float64."""

from __future__ import annotations

import sys

import pytest
import torch
from compare import assert_as_good
from torch import Tensor

from lingbot_kernels import ops, reference

PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]
SHAPES = [(1, 7, 5120), (2, 33, 1536), (1, 1, 3072), (2, 5, 8192), (1, 13, 130), (1, 9, 77), (1, 3, 64)]


@pytest.fixture(params=PAIRS, ids=str)
def dtypes(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=[False, True], ids=["one vector", "vector a batch"])
def per_batch(request: pytest.FixtureRequest) -> bool:
    return request.param


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, device="cuda") * 2 + 0.5).to(dtype)


def vectors(shape: tuple[int, int, int], count: int, per_batch: bool) -> list[Tensor]:
    return [rand(*((shape[0], shape[2]) if per_batch else (shape[2],))) for _ in range(count)]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def test_layer_norm_modulate(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], per_batch: bool
) -> None:
    x = rand(*shape, dtype=dtypes[0])
    shift, scale = vectors(shape, 2, per_batch)
    got = ops.layer_norm_modulate(x, shift, scale, 1e-6, out_dtype=dtypes[1], backend=backend)
    plain = reference.layer_norm_modulate(x, shift, scale, 1e-6, out_dtype=dtypes[1])
    exact = reference.layer_norm_modulate(*wide(x, shift, scale), 1e-6)
    assert got.dtype == dtypes[1]
    assert_as_good(got, plain, exact)


@pytest.mark.parametrize("gated", [True, False])
def test_residual_norm_modulate(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], per_batch: bool, gated: bool
) -> None:
    x, delta = rand(*shape, dtype=dtypes[0]), rand(*shape, dtype=dtypes[1])
    shift, scale, gate = vectors(shape, 3, per_batch)
    gate = gate if gated else None
    got = ops.residual_norm_modulate(x, delta, shift, scale, 1e-6, gate, backend=backend)
    plain = reference.residual_norm_modulate(x, delta, shift, scale, 1e-6, gate)
    x64, d64, shift64, scale64, gate64 = wide(x, delta, shift, scale, gate)
    exact = reference.residual_norm_modulate(x64, d64, shift64, scale64, 1e-6, gate64)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_as_good(a, b, c)


@pytest.mark.parametrize("camera", [True, False])
def test_gated_residual_camera_norm(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], per_batch: bool, camera: bool
) -> None:
    residual, compute = dtypes
    x, delta = rand(*shape, dtype=residual), rand(*shape, dtype=compute)
    gate = vectors(shape, 1, per_batch)[0]
    scale, shift = (rand(*shape, dtype=compute), rand(*shape, dtype=compute)) if camera else (None, None)
    weight, bias = rand(shape[2], dtype=compute), rand(shape[2], dtype=compute)
    args = (x, delta, gate, scale, shift, weight, bias)
    got = ops.gated_residual_camera_norm(*args, 1e-6, backend=backend)
    plain = reference.gated_residual_camera_norm(*args, 1e-6)
    exact = reference.gated_residual_camera_norm(*wide(*args), 1e-6)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_as_good(a, b, c)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], per_batch: bool, gated: bool
) -> None:
    x, delta = rand(*shape, dtype=dtypes[0]), rand(*shape, dtype=dtypes[1])
    gate = vectors(shape, 1, per_batch)[0] if gated else None
    got = ops.gated_residual(x, delta, gate, backend=backend)
    assert_as_good(got, reference.gated_residual(x, delta, gate), reference.gated_residual(*wide(x, delta, gate)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_norm(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = rand(shape[0], shape[1], shape[2] + 8, dtype=dtype)[..., : shape[2]]  # strided rows
    weight = rand(shape[2], dtype=dtype)
    if backend == "triton" and shape[2] % 2:
        with pytest.raises(ops.BackendUnavailable, match="must be even"):
            ops.rms_norm(x, weight, 1e-6, backend=backend)
        return
    got = ops.rms_norm(x, weight, 1e-6, backend=backend)
    assert_as_good(got, reference.rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))


def test_linear_gelu() -> None:
    x, weight, bias = rand(3, 37, 256, dtype=torch.bfloat16), rand(512, 256, dtype=torch.bfloat16) / 16, rand(512)
    args = (x, weight, bias.bfloat16())
    plain = torch.nn.functional.gelu(torch.nn.functional.linear(*args), approximate="tanh")
    assert_as_good(ops.linear_gelu(*args), plain, reference.linear_gelu(*(a.double() for a in args)))


@pytest.mark.parametrize("library", ["fa4", "fa3", "cudnn", "sdpa"])
@pytest.mark.parametrize("visible", [200, 333, 512])
@pytest.mark.parametrize("recent", [None, 100, 250])
def test_windowed_attention(library: str, visible: int, recent: int | None) -> None:
    from lingbot_kernels.ops.windowed_attention import why_not

    reason = why_not(library, "cuda", torch.bfloat16, 128)
    if reason is not None:
        pytest.skip(reason)
    heads, head_dim, capacity, tokens, sink = 5, 128, 512, 77, 60
    q = torch.randn(2, tokens, heads * head_dim, device="cuda").bfloat16()
    k, v = (torch.randn(2, capacity, heads, head_dim, device="cuda").bfloat16() for _ in range(2))
    start = visible - tokens if visible < capacity else 3 * capacity + 41
    ring = ops.RingPosition(start, sink)
    k[:, visible:] = float("nan")  # never read
    v[:, visible:] = float("nan")
    got = ops.windowed_attention(q, k, v, visible, ring=ring, recent=recent, backend=library)
    kwargs = {"ring": ring, "recent": recent, "backend": "reference"}
    plain = ops.windowed_attention(q, k, v, visible, **kwargs)
    exact = ops.windowed_attention(q.double(), k.double(), v.double(), visible, **kwargs)
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= 3 * (plain.double() - exact).norm() / exact.norm() + 2.0**-9


@pytest.mark.parametrize("library", ["fa4", "fa3", "cudnn", "sdpa"])
@pytest.mark.parametrize("keys", [2, 41, 130])
def test_a_key_that_counts_for_several(library: str, keys: int) -> None:
    """As near to float64 as the same library over the repeated key."""
    from lingbot_kernels.ops.windowed_attention import why_not

    if (reason := why_not(library, "cuda", torch.bfloat16, 128)) is not None:
        pytest.skip(reason)
    q = torch.randn(2, 300, 5, 128, device="cuda").bfloat16()
    k, v = (torch.randn(2, keys, 5, 128, device="cuda").bfloat16() for _ in range(2))
    long_k, long_v = (torch.cat([x, x[:, -1:].expand(-1, 511 - keys, -1, -1)], dim=1) for x in (k, v))
    exact = ops.windowed_attention(q.double(), long_k.double(), long_v.double(), 511, backend="reference")
    plain = ops.windowed_attention(q, long_k, long_v, 511, backend=library)
    got = ops.windowed_attention(q, k, v, keys, last_key_count=512 - keys, backend=library)
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (got, plain)]
    assert errors[0] <= 1.5 * errors[1], errors


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("segments", [2, 3, 4])
def test_attention_in_segments_of_keys(segments: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lingbot_kernels.ops.windowed_attention"]
    if (reason := module.why_not("fa4", "cuda", torch.bfloat16, 128)) is not None:
        pytest.skip(reason)
    q = torch.randn(batch, 300, 5, 128, device="cuda").bfloat16()
    k, v = (torch.randn(batch, 3060, 5, 128, device="cuda").bfloat16() for _ in range(2))
    exact = ops.windowed_attention(q.double(), k.double(), v.double(), 3060, backend="reference")
    errors = []
    for cuts in (1, segments):
        monkeypatch.setattr(module, "_segments", lambda *_, cuts=cuts: cuts)
        got = ops.windowed_attention(q, k, v, 3060, backend="fa4")
        assert got.shape == (batch, 300, 640) and got.is_contiguous()
        errors.append(float((got.double() - exact).norm() / exact.norm()))
    assert errors[1] <= 1.25 * errors[0], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("heads,head_dim", [(10, 128), (12, 128), (3, 10)])
def test_merge_segments(count: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    out = torch.randn(2 * count, 77, heads, head_dim, device="cuda").to(dtype)
    lse = 2 * torch.randn(2 * count, heads, 77, device="cuda")
    segments, sums = (x.unflatten(0, (2, count)).transpose(0, 1) for x in (out, lse))
    got = ops.merge_segments(segments, sums, backend="cuda")
    plain = reference.merge_segments(segments, sums)
    assert_as_good(got, plain, reference.merge_segments(segments.double(), sums.double()))
