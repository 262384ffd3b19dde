"""The quantising passes on the GPU: against the CPU's bits, against float64, and against the passes that round.

What has the same float32 row has the same codes on every backend. Behind a norm, whose sums each backend adds in an
order of its own, codes may be one step off where a value lies between two.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lingbot_kernels import ops, reference

PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]
# The last three: more vectors a thread, and rows that no block holds.
SHAPES = [
    (1, 7, 5120), (2, 33, 1536), (1, 3, 3072), (2, 5, 200), (1, 9, 130), (1, 2, 77), (1, 1, 1),
    (1, 5, 13824), (1, 3, 16384), (1, 2, 20480),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Codes = tuple[Tensor, Tensor]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=[(False, True), (True, True), (True, False)], ids=["rotated", "signed", "signs alone"])
def form(request: pytest.FixtureRequest, shape: tuple[int, int, int]) -> dict[str, object]:
    signed, rotate = request.param
    signs = 2 * torch.randint(0, 2, (-(-shape[2] // 128) * 128,), device="cuda", dtype=torch.int8) - 1
    return {"signs": signs if signed else None, "rotate": rotate}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, device="cuda") * 2 + 0.5).to(dtype)


def on_cpu(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value


def served(op: str, backend: str, *args: object, **form: object) -> tuple[Tensor, ...]:
    try:
        return getattr(ops, op)(*args, **form, backend=backend)
    except ops.BackendUnavailable as error:
        if backend == "triton":
            pytest.skip(str(error))
        raise


def assert_same(got: Codes, expected: Codes) -> None:
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    a, b = (x[1].cpu() for x in (got, expected))
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def assert_close(got: Codes, exact: Codes) -> None:
    apart = (got[0].int() - exact[0].int()).abs()
    assert apart.max() <= 1, f"{int(apart.max())} steps apart"
    assert apart.count_nonzero() <= 1e-3 * apart.numel() + 2, f"{int(apart.count_nonzero())} of {apart.numel()} differ"
    torch.testing.assert_close(got[1], exact[1], rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_quantize(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], form: dict) -> None:
    x = rand(*shape, dtype=dtype)
    got = served("rotate_quantize", backend, x, **form)
    cpu_form = {name: on_cpu(value) for name, value in form.items()}
    assert_same(got, ops.rotate_quantize(x.cpu(), **cpu_form, backend="cpu"))
    assert_close(got, reference.rotate_quantize(x.double(), **form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_that_lie_apart(backend: str, dtype: torch.dtype, offset: int, shape: tuple[int, int, int]) -> None:
    wide = rand(shape[0], shape[1], shape[2] + 24, dtype=dtype)
    x = wide[..., offset : offset + shape[2]]
    got = served("rotate_quantize", backend, x)
    assert_same(got, ops.rotate_quantize(x.contiguous(), backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("dim", [77, 200, 1536, 5120, 13824])
def test_rows_without_ordinary_values(backend: str, dim: int, rotate: bool, dtype: torch.dtype) -> None:
    x = rand(1, 6, dim, dtype=dtype)
    x[0, 0] = 0
    x[0, 1, dim // 2] = math.nan
    x[0, 2, dim - 1] = -math.inf
    x[0, 3, 5] = 6e4
    x[0, 4] *= 0
    x[0, 4, 0] = torch.finfo(dtype).smallest_normal
    got = codes, row_scale = served("rotate_quantize", backend, x, None, rotate)
    assert_same(got, ops.rotate_quantize(x.cpu(), None, rotate, backend="cpu"))
    assert (codes[0, :3] == 0).all() and row_scale[0, 0] == 0 and row_scale[0, 1:3].isnan().all()
    assert codes[0, 3].abs().max() == 127


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("residual", DTYPES, ids=str)
def test_layer_norm_modulate_quantize(
    backend: str, residual: torch.dtype, shape: tuple[int, int, int], form: dict, per_batch: bool
) -> None:
    x = rand(*shape, dtype=residual)
    shift, scale = (rand(*((shape[0], shape[2]) if per_batch else shape[2:])) for _ in range(2))
    got = served("layer_norm_modulate_quantize", backend, x, shift, scale, 1e-6, **form)
    assert_close(got, reference.layer_norm_modulate_quantize(x.double(), shift.double(), scale.double(), 1e-6, **form))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_residual_norm_modulate_quantize(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], form: dict, gated: bool
) -> None:
    x, delta = rand(*shape, dtype=dtypes[0]), rand(*shape, dtype=dtypes[1])
    shift, scale, gate = (rand(shape[0], shape[2]) for _ in range(3))
    args = (x, delta, shift, scale, 1e-6, gate if gated else None)
    x_out, *got = served("residual_norm_modulate_quantize", backend, *args, **form)
    assert torch.equal(x_out, served("residual_norm_modulate", backend, *args)[0])
    exact = reference.layer_norm_modulate_quantize(x_out.double(), shift.double(), scale.double(), 1e-6, **form)
    assert_close(tuple(got), exact)


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_gated_residual_camera_norm_quantize(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], form: dict, camera: bool
) -> None:
    residual, compute = dtypes
    x, delta = rand(*shape, dtype=residual), rand(*shape, dtype=compute)
    cam = [rand(*shape, dtype=compute) if camera else None for _ in range(2)]
    weight, bias = rand(shape[2], dtype=compute), rand(shape[2], dtype=compute)
    args = (x, delta, rand(shape[2]), *cam, weight, bias)
    x_out, *got = served("gated_residual_camera_norm_quantize", backend, *args, 1e-6, **form)
    assert torch.equal(x_out, served("gated_residual_camera_norm", backend, *args, 1e-6)[0])
    wide = x_out.double()
    alone = (wide, torch.zeros_like(wide), None, None, None, weight.double(), bias.double())
    exact = reference.gated_residual_camera_norm_quantize(*alone, 1e-6, **form)
    assert_close(tuple(got), exact[1:])


@pytest.mark.parametrize("shape", [(1, 4524, 5120), (1, 1131, 13824)], ids=str)
def test_a_chunks_rows_and_a_replayed_graph(backend: str, shape: tuple[int, int, int]) -> None:
    x = rand(*shape, dtype=torch.bfloat16)
    signs = 2 * torch.randint(0, 2, shape[2:], device="cuda", dtype=torch.int8) - 1
    expected = ops.rotate_quantize(x, signs, backend="reference")
    assert_same(served("rotate_quantize", backend, x, signs), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.rotate_quantize(x, signs, backend=backend)
    x.copy_(x.flip(1).clone())
    graph.replay()
    assert_same(captured, tuple(part.flip(1) for part in expected))


@pytest.mark.parametrize("rotate", [True, False])
def test_the_reference_can_be_captured(rotate: bool) -> None:
    x = torch.randn(1, 5, 200, device="cuda")
    want = reference.rotate_quantize(x, None, rotate)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = reference.rotate_quantize(x, None, rotate)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
