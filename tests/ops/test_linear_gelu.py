"""linear_gelu: torch's product and the reference against float64; refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lingbot_kernels import ops, reference
from ops.op_case import DTYPES, Arguments, Errors, assert_refused


def arguments(dtype: torch.dtype) -> Arguments:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 96), torch.randn(64, 96) / 96**0.5, torch.randn(64)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype: torch.dtype) -> None:
    """The library's product against the plain formulation: linear and GELU, each rounded to the dtype."""
    a = arguments(dtype)
    exact = reference.linear_gelu(**{name: value.double() for name, value in a.items()})
    plain = F.gelu(F.linear(a["x"], a["weight"], a["bias"]), approximate="tanh")
    allowed = (plain.double() - exact).norm()
    for backend in (None, "auto", "reference"):
        got = ops.linear_gelu(**a, backend=backend)
        assert got.dtype == dtype and got.shape == (2, 5, 64)
        assert (got.double() - exact).norm() <= 1.25 * allowed


REFUSALS: dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]] = {
    "weight shape": (lambda a: {"weight": a["weight"][:, 1:]}, ValueError, r"weight: got shape \[64, 95\], must be"),
    "weight dims": (lambda a: {"weight": a["weight"][0]}, ValueError, r"weight: got shape \[96\]"),
    "weight dtype": (lambda a: {"weight": a["weight"].half()}, TypeError, "weight: got torch.float16"),
    "weight meta": (lambda a: {"weight": a["weight"].to("meta")}, TypeError, "weight: got .*on meta"),
    "bias shape": (lambda a: {"bias": a["bias"][1:]}, ValueError, r"bias: got shape \[63\], must be \[64\]"),
    "bias dtype": (lambda a: {"bias": a["bias"].double()}, TypeError, "bias: got torch.float64"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    change, error, message = REFUSALS[case]
    given = arguments(torch.float32)
    assert_refused(ops.linear_gelu, given, change(given), error, message, backends=("auto", "reference"))


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_kernel_backends_say_that_products_are_a_librarys(backend: str) -> None:
    with pytest.raises(ops.BackendUnavailable, match=f"linear_gelu: backend '{backend}' .*matrix products are left"):
        ops.linear_gelu(**arguments(torch.float32), backend=backend)
    with ops.use_backend(backend):  # by context, an op without a home there keeps its automatic choice
        ops.linear_gelu(**arguments(torch.float32))
