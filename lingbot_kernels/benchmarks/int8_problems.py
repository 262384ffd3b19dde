"""The bench's problems of eight bits: the passes whose rows leave as int8 codes, and the products of such rows.

Of a pass the gate compares what the codes stand for, codes * row_scale, with the rotated row in float64 before it is
quantised: it may lose 1.25 times what the plain formulation's quantisation loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.problem import (
    EPS,
    Inputs,
    Make,
    Outputs,
    Problem,
    given,
    judged_rows,
    op_problem,
    randn,
    residual_inputs,
    spread_rows,
)
from lingbot_kernels.reference.rotate_quantize import padded_width, quantize_rows, rotated

_CAMERA_NORM = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias", EPS)


def _rotated_row(y: Tensor, signs: Tensor) -> Outputs:
    """In place of codes and scale: the rotated row itself, and ones."""
    value = rotated(y, signs, True)
    return value, value.new_ones(value.shape[:-1])


def _stood_for(_: Inputs, outputs: Outputs) -> Outputs:
    """What the last two outputs, codes and their scale, stand for, after the outputs before them."""
    *others, codes, row_scale = outputs
    return (*others, codes.to(row_scale.dtype) * row_scale.unsqueeze(-1))


def _problem(
    op: str, case: str, shape: tuple[int, ...], dtype: torch.dtype, sizes: dict[str, int],
    make: Make, arguments: tuple[Any, ...],
) -> Problem:  # fmt: skip
    """`op` is a quantising form; `arguments`, see `given`, are those of the op whose y it quantises as well."""
    rounding = getattr(reference, op.removesuffix("_quantize"), None)

    def plain(inputs: Inputs) -> Outputs:
        values, signs = given(inputs, arguments), inputs["signs"]
        if inputs["x"].dtype != torch.float64:
            return getattr(reference, op)(*values, signs=signs)
        outputs = inputs["x"] if rounding is None else rounding(*values)
        *others, y = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*others, *_rotated_row(y, signs))

    def bind(inputs: Inputs, backend: str) -> Callable[[], Outputs]:
        return partial(getattr(ops, op), *given(inputs, arguments), signs=inputs["signs"], backend=backend)

    return Problem(case, shape, dtype, op, make, bind, plain, sizes=sizes, judged=_stood_for)


def _signs(dim: int, device: torch.device) -> Inputs:
    return {"signs": (2 * torch.randint(0, 2, (padded_width(dim),), device=device) - 1).to(torch.int8)}


def rotate_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    """Of what attention gives and, as "-ffn", of what GELU gives."""
    for dim, suffix in ((case.dim, ""), (case.ffn_dim, "-ffn")):
        shape = (1, case.tokens, dim)

        def make(device: torch.device, shape: tuple[int, ...] = shape) -> Inputs:
            return {"x": torch.randn(shape, device=device, dtype=dtype), **_signs(shape[2], device)}

        yield _problem("rotate_quantize", case.name + suffix, shape, dtype, {}, make, ("x",))


def norm_problems(case: KernelCase, dtype: torch.dtype, residual: torch.dtype) -> Iterator[Problem]:
    """The quantising forms of the passes between two products, on a stream in the dtype `residual`."""
    dim, sizes = case.dim, {"residual": residual.itemsize}
    name, shape = case.name + ("-r32" if residual != dtype else ""), (1, case.tokens, dim)

    def make(device: torch.device, camera: bool = False) -> Inputs:
        return {**residual_inputs(case, dtype, residual, device, camera), **_signs(dim, device)}

    norm, residual_norm = ("x", "shift", "scale", EPS), ("x", "delta", "shift", "scale", EPS, "gate")
    yield _problem("layer_norm_modulate_quantize", name, shape, dtype, sizes, make, norm)
    yield _problem("residual_norm_modulate_quantize", name, shape, dtype, sizes, make, residual_norm)
    yield _problem(
        "gated_residual_camera_norm_quantize", name + "-camera", shape, dtype, {**sizes, "camera": True},
        partial(make, camera=True), _CAMERA_NORM,
    )  # fmt: skip
    yield _problem("gated_residual_camera_norm_quantize", name, shape, dtype, sizes, make, _CAMERA_NORM)


def product_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    """A layer's products, beside bare ones of the same shape in `dtype`; "-up" has its GELU."""
    tokens, dim, hidden = case.tokens, case.dim, case.ffn_dim
    for name, inner, outer in (("qkv", dim, 3 * dim), ("o", dim, dim), ("up", dim, hidden), ("down", hidden, dim)):
        yield _product(case, f"-{name}", dtype, (tokens, padded_width(inner), outer), name == "up")


def _product(case: KernelCase, suffix: str, dtype: torch.dtype, sizes: tuple[int, int, int], gelu: bool) -> Problem:
    tokens, inner, outer = sizes
    activation = "gelu_tanh" if gelu else None

    def make(device: torch.device) -> Inputs:
        def codes(*shape: int) -> Tensor:
            return torch.randint(-127, 128, shape, device=device, dtype=torch.int8)

        def scales(*shape: int) -> Tensor:
            return (0.5 + torch.rand(*shape, device=device)) / 127

        return {
            "codes": codes(1, tokens, inner), "x_scale": scales(1, tokens), "w": codes(outer, inner),
            "w_scale": scales(outer) * inner**-0.5, "bias": randn(outer, device=device, dtype=dtype),
            "x": randn(1, tokens, inner, device=device, dtype=dtype),  # x and weight: of the bare product
            "weight": randn(outer, inner, device=device, dtype=dtype), "rows": spread_rows(tokens),
        }  # fmt: skip

    def plain(inputs: Inputs) -> Outputs:
        rows = inputs["rows"].to(inputs["codes"].device)
        x, x_scale = inputs["codes"][:, rows], inputs["x_scale"][:, rows]
        w, w_scale, bias = inputs["w"], inputs["w_scale"], inputs["bias"]
        return (reference.int8_linear(x, x_scale, w, w_scale, bias, activation, bias.dtype),)

    return op_problem(
        case.name + suffix, (1, tokens, inner, outer), dtype, "int8_linear", make,
        ("codes", "x_scale", "w", "w_scale", "bias", activation, dtype), plain=plain,
        bytes=(tokens + outer) * inner + tokens * outer * dtype.itemsize, flops=2 * tokens * inner * outer,
        backends=("triton", "cpu", "reference"), judged=judged_rows, ceiling="gemm",
    )  # fmt: skip


def attention_problem(case: KernelCase, visible: int) -> Problem:
    """A chunk's queries over `visible` slots of an int8 ring; V is bfloat16 whatever the case's dtype."""
    tokens, heads, head_dim = case.ranks * case.tokens, case.heads // case.ranks, case.head_dim
    dim = heads * head_dim

    def make(device: torch.device) -> Inputs:
        def quantized(tokens: int) -> tuple[Tensor, Tensor]:
            return quantize_rows(torch.randn(1, heads, tokens, head_dim, device=device), rotate=False)

        (q, q_scale), (k, k_scale) = ([x.transpose(1, 2) for x in quantized(n)] for n in (tokens, visible))
        return {
            "q": q[..., :head_dim].contiguous(), "q_scale": q_scale,
            "k_cache": k[..., :head_dim].contiguous(), "k_scale": k_scale,  # the codes were filled up to 128
            "v_cache": randn(1, visible, heads, head_dim, device=device, dtype=torch.bfloat16),
            "rows": spread_rows(tokens),
        }  # fmt: skip

    def plain(inputs: Inputs) -> Outputs:
        """The judged rows alone, with the weights rounded to V's dtype."""
        rows, v = inputs["rows"].to(inputs["q"].device), inputs["v_cache"].transpose(1, 2)
        q, q_scale = inputs["q"][:, rows].to(inputs["q_scale"].dtype), inputs["q_scale"][:, rows].unsqueeze(-1)
        k = inputs["k_cache"].to(q.dtype) * inputs["k_scale"].unsqueeze(-1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q * q_scale, k) * head_dim**-0.5
        return ((scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(-2),)

    return op_problem(
        case.name, (1, tokens, visible, heads, head_dim), torch.bfloat16, "int8_attention", make,
        ("q", "q_scale", "k_cache", "k_scale", "v_cache", visible), plain=plain, dim=dim,
        sizes={"heads": heads, "visible": visible}, flops=4 * tokens * visible * dim,
        judged=lambda inputs, outputs: judged_rows(inputs, outputs[:1]), ceiling="",
    )  # fmt: skip
