"""int8_attention: backends against float64, the weight of the last key, what stays visible, refusals, registration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from lingbot_kernels import ops, reference
from ops.op_case import BACKENDS, assert_refused, check_registration

Arguments = dict[str, Any]


def make(batch: int = 2, queries: int = 5, heads: int = 3, head_dim: int = 64, capacity: int = 40) -> Arguments:
    """Operands with V's mean away from zero; slots from num_visible on hold NaN, which nobody may read."""
    torch.manual_seed(0)
    visible = capacity - 3
    arguments = {
        "q": torch.randint(-127, 128, (batch, queries, heads, head_dim), dtype=torch.int8),
        "q_scale": 0.01 + 0.02 * torch.rand(batch, queries, heads),
        "k_cache": torch.randint(-127, 128, (batch, capacity, heads, head_dim), dtype=torch.int8),
        "k_scale": (0.01 + 0.02 * torch.rand(batch, heads, capacity)).transpose(1, 2),
        "v_cache": (torch.randn(batch, capacity, heads, head_dim) + 0.5).bfloat16(),
        "num_visible": visible,
    }
    arguments["v_cache"][:, visible:] = math.nan
    arguments["k_scale"][:, visible:] = math.nan
    return arguments


def exact(arguments: Arguments) -> tuple[Tensor, Tensor]:
    return reference.int8_attention(**{**arguments, "v_cache": arguments["v_cache"].double()})


def assert_close(got: tuple[Tensor, Tensor], arguments: Arguments) -> None:
    out, lse = exact(arguments)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32 and got[0].shape == out.shape
    assert (got[0].double() - out).norm() <= 0.004 * out.norm()
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, head_dim: int) -> None:
    arguments = make(head_dim=head_dim)
    got, again = (ops.int8_attention(**arguments, backend=backend) for _ in range(2))
    assert_close(got, arguments)
    assert all(map(same_bits, got, again))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [1, 2, 16, 37])
def test_number_of_keys(keys: int, backend: str) -> None:
    arguments = {**make(), "num_visible": keys}
    assert_close(ops.int8_attention(**arguments, backend=backend), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_key_counts_as_so_many_equal_ones(backend: str) -> None:
    arguments = make(capacity=30)
    visible = arguments["num_visible"]
    repeated = dict(arguments)
    for name in ("k_cache", "k_scale", "v_cache"):
        x = arguments[name]
        repeated[name] = torch.cat([x[:, :visible], x[:, visible - 1 : visible].expand(-1, 11, *x.shape[2:])], dim=1)
    repeated["num_visible"] = visible + 11
    weighted = {**arguments, "last_key_count": 12}
    assert_close(ops.int8_attention(**weighted, backend=backend), repeated)
    torch.testing.assert_close(exact(weighted), exact(repeated))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_one_is_none(backend: str) -> None:
    arguments = make()
    got, plain = (ops.int8_attention(**arguments, **given, backend=backend) for given in ({"last_key_count": 1}, {}))
    assert all(map(same_bits, got, plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str) -> None:
    arguments = make(heads=2)
    together = torch.stack([arguments["q"]] * 3, dim=2).flatten(2).unflatten(-1, (6, 64))
    arguments["q"] = together[:, :, 2:4]  # a third of one projection's rows
    arguments["k_scale"] = arguments["k_scale"].contiguous()
    arguments["q_scale"] = arguments["q_scale"].transpose(0, 2).contiguous().transpose(0, 2)
    assert not arguments["q"].is_contiguous()
    assert_close(ops.int8_attention(**arguments, backend=backend), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scales_and_rows_of_zeros(backend: str) -> None:
    arguments = make()
    arguments["q_scale"][0] *= 1e3  # one key takes all
    arguments["q"][1, 0], arguments["q_scale"][1, 1] = 0, 0.0  # every key the same
    out = ops.int8_attention(**arguments, backend=backend)[0]
    assert out.isfinite().all()
    assert_close((out, exact(arguments)[1].float()), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_cache"])
def test_nan_is_seen(name: str, backend: str) -> None:
    arguments = make()
    arguments[name][0, 1, 2] = math.nan
    nan = ops.int8_attention(**arguments, backend=backend)[0].isnan().unflatten(-1, (3, 64))
    expected = torch.zeros_like(nan)
    if name == "q_scale":
        expected[0, 1, 2] = True
    else:
        expected[0, :, 2] = True
    assert torch.equal(nan, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_do(shape: tuple[int, int], backend: str) -> None:
    out, lse = ops.int8_attention(**make(*shape), backend=backend)
    assert out.shape == (*shape, 192) and lse.shape == (shape[0], 3, shape[1])


REFUSED: dict[str, tuple[Arguments, type[Exception], str]] = {
    "q dims": ({"q": torch.zeros(2, 5, 192, dtype=torch.int8)}, ValueError, r"q: got .*\[B, tokens, heads, head_dim\]"),
    "q dtype": ({"q": torch.zeros(2, 5, 3, 64)}, TypeError, "q: got torch.float32, must be torch.int8"),
    "q head_dim": ({"q": torch.zeros(2, 5, 3, 32, dtype=torch.int8)}, ValueError, "q: got 3 heads of 32, must be"),
    "q_scale shape": ({"q_scale": torch.zeros(2, 5)}, ValueError, r"q_scale: got shape \[2, 5\], must be \[2, 5, 3\]"),
    "q_scale dtype": ({"q_scale": torch.zeros(2, 5, 3).double()}, TypeError, "q_scale: got torch.float64"),
    "k batch": ({"k_cache": torch.zeros(1, 40, 3, 64, dtype=torch.int8)}, ValueError, r"k_cache: got .*\[2, tokens, 3"),
    "k_scale": ({"k_scale": torch.zeros(2, 3, 40)}, ValueError, r"k_scale: got shape \[2, 3, 40\], must be \[2, 40, 3"),
    "v shape": ({"v_cache": torch.zeros(2, 39, 3, 64).bfloat16()}, ValueError, r"v_cache: got .*\[2, 40, 3, 64\]"),
    "v half": ({"v_cache": torch.zeros(2, 40, 3, 64).half()}, TypeError, "v_cache: got torch.float16, must be"),
    "v meta": (
        {"v_cache": torch.zeros(2, 40, 3, 64).bfloat16().to("meta")}, TypeError, "v_cache: got .*on meta",
    ),
    "v strides": (
        {"v_cache": torch.zeros(2, 3, 40, 64).bfloat16().mT.contiguous().mT.transpose(1, 2)}, ValueError,
        "v_cache: got strides .*contiguous",
    ),
    "k aligned": (
        {"k_cache": torch.zeros(2, 40, 200, dtype=torch.int8)[..., :192].unflatten(-1, (3, 64))}, ValueError,
        "k_cache: got strides .*multiple of 16 elements",
    ),
    "no key": ({"num_visible": 0}, ValueError, "num_visible: got 0, must be from 1 to the capacity 40"),
    "too many keys": ({"num_visible": 41}, ValueError, "num_visible: got 41, must be"),
    "count": ({"last_key_count": 0.0}, ValueError, "last_key_count: got 0.0, must be positive"),
    "count nan": ({"last_key_count": math.nan}, ValueError, "last_key_count: got nan, must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    change, error, message = REFUSED[case]
    assert_refused(ops.int8_attention, make(), change, error, message)


def test_cuda_serves_one_generation() -> None:
    with pytest.raises(ops.BackendUnavailable, match="serves CUDA tensors, not cpu"):
        ops.int8_attention(**make(), backend="cuda")


def test_registration() -> None:
    arguments = make()
    samples = [(*arguments.values(), count, backend) for backend in BACKENDS for count in (1.0, 7.0)]
    check_registration("int8_attention", samples)
