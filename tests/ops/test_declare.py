"""Declarations of ops: the schema that follows from a signature, and where each value goes in a backend's function."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import _C, ops
from lingbot_kernels.ops import _dispatch
from lingbot_kernels.ops._bind import BoundLaunch, core_recipe, reference_recipe, triton_recipes
from lingbot_kernels.ops._declare import Addresses, Launch, Output, Signature, Varying, Written
from lingbot_kernels.ops._library import KernelOp
from lingbot_kernels.ring import RingPosition

DECLARED = {
    name: op
    for name in ops.__all__
    if isinstance(op := getattr(sys.modules.get(f"lingbot_kernels.ops.{name}"), "_op", None), KernelOp)
}


def declaration(
    x: Tensor, out: Written, outs: Sequence[Written], bias: Tensor | None, ring: RingPosition, first: Varying, n: int,
    eps: float, rotate: bool, name: str | None, dtype: torch.dtype, sizes: Sequence[int],
) -> Launch:  # fmt: skip
    return Launch()


def test_the_schema_follows_from_the_annotations() -> None:
    signature = Signature(declaration)
    assert signature.schema == (
        "Tensor x, Tensor(a!) out, Tensor(b!)[] outs, Tensor? bias, SymInt chunk_start, Tensor? cursor, SymInt sink, "
        "SymInt first, SymInt n, float eps, bool rotate, str? name, ScalarType dtype, SymInt[] sizes"
    )
    assert signature.written == ["out", "outs"] and signature.varying == ["chunk_start", "first"]
    assert signature.differing == ["x", "out", "outs", "bias", "chunk_start", "cursor", "first"]


def test_a_ring_position_is_put_together_again() -> None:
    signature, cursor = Signature(declaration), torch.zeros(1, dtype=torch.int32)
    values: dict[str, Any] = dict.fromkeys(signature.names) | {"chunk_start": 9, "cursor": cursor, "sink": 2, "n": 5}
    arguments = signature.arguments(tuple(values.values()))
    assert arguments["ring"] == RingPosition(9, 2, cursor) and arguments["n"] == 5
    assert set(arguments) == {*values, "ring"} - {"chunk_start", "cursor", "sink"}


@pytest.mark.parametrize("name", [name for name in DECLARED if "triton" not in _dispatch.OPS[name].absent])
def test_triton_takes_what_the_declaration_names(name: str) -> None:
    pytest.importorskip("triton")
    op = DECLARED[name]
    why_not, launcher = triton_recipes(op._kernel, op._signature)  # refuses a parameter of another name
    assert len(launcher.outputs) == len(op._signature.returns)
    assert launcher.slots and (why_not.slots or why_not.constants)


def scaled(x: Tensor, weight: Tensor, eps: float) -> Launch:
    batch, tokens, dim = x.shape
    return Launch([Output(x)], {"batch": batch, "tokens": tokens, "dim": dim, "dtype": x.dtype})


def test_fields_are_filled_by_name() -> None:
    signature = Signature(scaled, returns=("y",))
    x, weight = torch.randn(2, 3, 16)[..., :8], torch.randn(8)
    call = (x, weight, 1e-6)
    launch = scaled(*call)
    bound = BoundLaunch(core_recipe(_C.cpu.rms_norm, signature, frozenset(launch.fields)), call, launch)
    fields = _C.cpu.rms_norm.__doc__.removeprefix("rms_norm(").removesuffix(")").split(", ")
    handed = dict(zip(fields, bound.fill(call), strict=True))
    assert (handed["x.ptr"], handed["weight"]) == (x.data_ptr(), weight.data_ptr())
    assert (handed["x.batch_stride"], handed["x.token_stride"], handed["eps"]) == (48, 16, 1e-6)
    assert (handed["batch"], handed["tokens"], handed["dim"], handed["dtype"]) == (2, 3, 8, 0)
    assert torch.equal(bound.run(call, bound.fill(call)), ops.rms_norm(x, weight, 1e-6, backend="cpu"))


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"size": 1}, "size: got them from the declaration, must be fields of the core's struct"),
        ({"batch": None}, "batch: got no value from the declaration, must have one"),
    ],
)
def test_fields_and_values_must_agree(changed: dict[str, Any], message: str) -> None:
    fields = {name: 1 for name in ("batch", "tokens", "dim", "dtype")} | changed
    given = frozenset(name for name, value in fields.items() if value is not None)
    with pytest.raises(TypeError, match=message):
        core_recipe(_C.cpu.rms_norm, Signature(scaled, returns=("y",)), given)


def test_dtypes_without_a_code_are_refused() -> None:
    call = (torch.randn(1, 2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64), 1e-6)
    launch = scaled(*call)
    recipe = core_recipe(_C.cpu.rms_norm, Signature(scaled, returns=("y",)), frozenset(launch.fields))
    with pytest.raises(TypeError, match=r"dtype: got torch.float64, must be float32, float16 or bfloat16"):
        BoundLaunch(recipe, call, launch)
    with pytest.raises(TypeError, match=r"dtype: got torch.float64, must be float32, float16 or bfloat16"):
        ops.layer_norm_modulate(torch.randn(1, 2, 8), torch.zeros(8), torch.zeros(8), 1e-6, torch.float64)


def test_the_reference_gets_the_arguments_by_name() -> None:
    def formula(**values: Any) -> Tensor:
        return values["x"] * 2

    signature = Signature(scaled, returns=("y",))
    call = (torch.ones(1, 2, 8), torch.ones(8), 1e-6)
    bound = BoundLaunch(reference_recipe(formula, signature), call, scaled(*call))
    assert torch.equal(bound.run(call, bound.fill(call)), call[0] * 2)
    op_without_outputs = BoundLaunch(reference_recipe(formula, Signature(scaled)), call, scaled(*call))
    assert op_without_outputs.run(call, op_without_outputs.fill(call)) is None


def test_addresses_of_lists_come_after_those_that_are_not_read() -> None:
    def gather(packed: Tensor, lists: Sequence[Tensor]) -> Launch:
        return Launch(fields={"addresses": Addresses(("lists",), unread=2)})

    class Struct:
        __doc__ = "gather(packed, addresses, threads)"

        def __call__(self, packed: int, addresses: int, threads: int) -> None:
            self.seen = (packed, list((ctypes.c_int64 * 4).from_address(addresses)), threads)

    struct, packed, lists = Struct(), torch.ones(2), [torch.ones(1), torch.ones(3)]
    call = (packed, lists)
    launch = gather(*call)
    bound = BoundLaunch(core_recipe(struct, Signature(gather), frozenset(launch.fields)), call, launch)
    bound.run(call, bound.fill(call))
    assert struct.seen == (packed.data_ptr(), [0, 0, *(x.data_ptr() for x in lists)], 0)


def test_a_parameter_that_the_op_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = types.ModuleType("lingbot_kernels.triton.scaled")
    kernel.why_not = lambda x: None  # type: ignore[attr-defined]
    kernel.scaled = lambda x, weight, other, y: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    with pytest.raises(TypeError, match=r"other: got a parameter of .*, must be an argument or output of the op"):
        triton_recipes("scaled", Signature(scaled, returns=("y",)))
