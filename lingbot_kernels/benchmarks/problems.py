"""What an op is given in a case, the call that is measured, and the plain formulation that judges it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import ops, reference
from lingbot_kernels.benchmarks.frame_problems import frame_problems
from lingbot_kernels.benchmarks.int8_problems import attention_problem, norm_problems, product_problems, rotate_problems
from lingbot_kernels.benchmarks.kernel_cases import SINK_FRAMES, TEXT_KEYS, WINDOW_FRAMES, KernelCase
from lingbot_kernels.benchmarks.problem import (
    CACHES,
    EPS,
    THETA,
    Bind,
    Inputs,
    Outputs,
    Problem,
    as_tuple,
    judged_rows,
    norm_weight,
    randn,
    residual_inputs,
    spread_rows,
)
from lingbot_kernels.ops.windowed_attention import LIBRARIES
from lingbot_kernels.reference._common import accumulation_dtype
from lingbot_kernels.reference.rotate_quantize import quantize_values
from lingbot_kernels.ring import RingPosition


def _caches(case: KernelCase, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """A window of K and V, and where the chunk goes in it; frames of a third of `tokens` each."""
    frame = tokens // 3
    capacity, sink = WINDOW_FRAMES * frame, SINK_FRAMES * frame
    shape = (1, capacity, heads, case.head_dim)
    caches = {name: randn(*shape, device=device, dtype=dtype) for name in CACHES}
    return {**caches, "ring": RingPosition(case.ring_start(tokens, capacity, sink), sink)}


def _table(case: KernelCase, device: torch.device) -> Tensor:
    return reference.rope_cos_sin(
        case.tokens, case.token_start, case.frame_tokens, case.columns, case.head_dim, THETA, device
    )


def _qkv(case: KernelCase, device: torch.device, dtype: torch.dtype, caches: bool = True) -> Inputs:
    """q, k, v as strided views of one projection [1, S, 3D], norm weights, the RoPE table, and the window."""
    qkv = randn(1, case.tokens, 3 * case.dim, device=device, dtype=dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    return {
        "qkv": qkv, "q": q, "k": k, "v": v,
        "q_weight": norm_weight(case.dim, device, dtype), "k_weight": norm_weight(case.dim, device, dtype),
        "cos_sin": _table(case, device),
        **(_caches(case, case.tokens, case.heads, device, dtype) if caches else {}),
    }  # fmt: skip


_FULL = ("q", "k", "v", "q_weight", "k_weight", "cos_sin", *CACHES, "ring")
_WRITE = ("k", "v", "k_weight", "cos_sin", *CACHES, "ring")
_PACK = ("q", "k", "v", "q_weight", "k_weight", "cos_sin")


def _op(function: Callable[..., Any], names: tuple[str, ...], *rest: Any) -> Bind:
    """Binds an op to `names` of the inputs, then `rest`."""
    return lambda inputs, backend: partial(function, *[inputs[name] for name in names], *rest, backend=backend)


def _plain(function: Callable[..., Any], names: tuple[str, ...], *rest: Any) -> Callable[[Inputs], Outputs]:
    return lambda inputs: as_tuple(function(*[inputs[name] for name in names], *rest))


def _rope_problem(case: KernelCase) -> Problem:
    sizes = (case.tokens, case.token_start, case.frame_tokens, case.columns, case.head_dim, THETA)

    def make(device: torch.device) -> Inputs:
        return {"out": torch.empty(case.tokens, case.head_dim, device=device)}

    def bind(inputs: Inputs, backend: str) -> Callable[[], Any]:
        out = inputs["out"]
        return partial(ops.rope_cos_sin, *sizes, out.device, out=out, backend=backend)

    def plain(inputs: Inputs) -> Outputs:
        return (reference.rope_cos_sin(*sizes, inputs["out"].device, dtype=inputs["out"].dtype),)

    shape = (case.tokens, case.head_dim)
    return Problem(
        "rope_cos_sin", case.name, shape, torch.float32, case.tokens, case.head_dim, make, bind, plain,
        bytes=case.tokens * case.head_dim * 4,
    )  # fmt: skip


def _ring_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    tokens, dim, width = case.tokens, case.dim, dtype.itemsize
    common = (case.name, (1, tokens, dim), dtype, tokens, dim)
    yield Problem(
        "qk_norm_rope_kv_write", *common, lambda device: _qkv(case, device, dtype),
        _op(ops.qk_norm_rope_kv_write, _FULL, EPS), _plain(reference.qk_norm_rope_kv_write, _FULL, EPS),
        bytes=6 * tokens * dim * width,
    )  # fmt: skip
    yield Problem(
        "k_norm_rope_kv_write", *common, lambda device: _qkv(case, device, dtype),
        _op(ops.k_norm_rope_kv_write, _WRITE, EPS), _plain(reference.k_norm_rope_kv_write, _WRITE, EPS),
        bytes=4 * tokens * dim * width,
    )  # fmt: skip
    if not case.wrap:
        yield _int8_ring_problem(case, dtype, with_q=True)
        yield _int8_ring_problem(case, dtype, with_q=False)
        yield from _push_problems(case, dtype)
        yield _int8_push_problem(case, dtype)
    heads, chunk = case.heads // case.ranks, case.ranks * tokens
    names = ("packed", *CACHES, "ring")

    def packed(device: torch.device) -> Inputs:
        buffer = randn(chunk, 1, 3, heads, case.head_dim, device=device, dtype=dtype)
        return {"packed": buffer, **_caches(case, chunk, heads, device, dtype)}

    yield Problem(
        "qkv_unpack_kv_write", case.name, (chunk, 1, 3, heads, case.head_dim), dtype, chunk, heads * case.head_dim,
        packed, _op(ops.qkv_unpack_kv_write, names), _plain(reference.qkv_unpack_kv_write, names),
        bytes=4 * chunk * heads * case.head_dim * width,
    )  # fmt: skip


def _int8_ring_problem(case: KernelCase, dtype: torch.dtype, with_q: bool) -> Problem:
    """The write to an int8 ring, or its write-only half; the gate compares what codes and scales stand for."""
    tokens, dim, normed = case.tokens, case.dim, ("q", "k") if with_q else ("k",)
    op = f"{''.join(normed)}_norm_rope_quantize_kv_write"

    def make(device: torch.device) -> Inputs:
        inputs = _qkv(case, device, dtype)
        shape, position = inputs.pop("k_cache").shape, inputs.pop("ring")
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.zeros(shape[0], shape[2], shape[1], device=device).transpose(1, 2)
        return {**inputs, "position": position, "k_codes": codes, "k_codes_scale": scale}

    def stood_for(inputs: Inputs, outputs: Outputs) -> Outputs:
        if len(outputs) <= 2:  # of the op, which wrote the rest
            slots = inputs["position"].slots(tokens, inputs["k_codes"].shape[1], inputs["k_codes"].device)
            k_codes, k_scale, v = (inputs[name][:, slots] for name in ("k_codes", "k_codes_scale", "v_cache"))
            outputs = (*outputs, k_codes, k_scale, v.flatten(2))
        return _dequantized(outputs)

    given = _PACK if with_q else ("k", "v", "k_weight", "cos_sin")
    names = (*given, "k_codes", "k_codes_scale", "v_cache", "position")
    moved = len(normed) * (dim * dtype.itemsize + dim + 4 * case.heads) + 2 * dim * dtype.itemsize
    return Problem(
        op, case.name, (1, tokens, dim), dtype, tokens, dim, make, _op(getattr(ops, op), names, EPS),
        partial(_plain_codes, normed, case.head_dim), bytes=tokens * moved,
        backends=("cuda", "cpu", "reference"), judged=stood_for,
    )  # fmt: skip


def _plain_codes(normed: Sequence[str], head_dim: int, inputs: Inputs) -> Outputs:
    """Codes and scale of each of `normed`, of float64 the values and ones, and v."""
    rows: list[Tensor] = []
    for name in normed:
        heads = reference.rms_norm(inputs[name], inputs[f"{name}_weight"], EPS).unflatten(-1, (-1, head_dim))
        value = reference.apply_rope(heads.to(accumulation_dtype(heads.dtype)), inputs["cos_sin"])
        exact = value.dtype == torch.float64
        rows += (value, value.new_ones(value.shape[:-1])) if exact else quantize_values(value)
    return (*rows, inputs["v"])


def _dequantized(outputs: Outputs) -> Outputs:
    """What pairs of codes and scales stand for, and v."""
    *rows, v = outputs
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return (*(codes.to(scale.dtype) * scale.unsqueeze(-1) for codes, scale in pairs), v)


def _int8_push_problem(case: KernelCase, dtype: torch.dtype) -> Problem:
    """The push of codes of one rank, every rank's memory being this device's own."""
    tokens, dim, ranks = case.tokens, case.dim, case.ranks
    heads, first = case.heads // ranks, (ranks - 1) * tokens

    def make(device: torch.device) -> Inputs:
        caches = _caches(case, ranks * tokens, ranks * heads, device, dtype)
        capacity = caches["k_cache"].shape[1]
        codes: dict[str, Any] = {"dtype": torch.int8, "device": device}
        return {
            **_qkv(case, device, dtype, caches=False),
            "q_codes": torch.zeros(ranks, 1, ranks * tokens, heads, case.head_dim, **codes),
            "q_codes_scale": torch.zeros(ranks, 1, ranks * tokens, heads, device=device),
            "k_codes": torch.zeros(ranks, 1, capacity, heads, case.head_dim, **codes),
            "k_codes_scale": torch.zeros(ranks, 1, heads, capacity, device=device).transpose(2, 3),
            "v_rings": caches["v_cache"].view(ranks, 1, capacity, heads, case.head_dim),
            "position": caches["ring"],
        }

    def push(inputs: Inputs, backend: str) -> Outputs:
        names = ("q_codes", "q_codes_scale", "k_codes", "k_codes_scale", "v_rings")
        stacks = [list(inputs[name]) for name in names]
        function: Callable[..., None] = ops.qk_norm_rope_quantize_push
        function(*[inputs[name] for name in _PACK], *stacks, inputs["position"], first, EPS, backend=backend)
        return ()

    def stood_for(inputs: Inputs, outputs: Outputs) -> Outputs:
        if not outputs:  # of the op, which wrote them
            slots = inputs["position"].slots(first + tokens, inputs["k_codes"].shape[2], inputs["k_codes"].device)
            q = (inputs[name][:, :, first:] for name in ("q_codes", "q_codes_scale"))
            k = (inputs[name][:, :, slots[first:]] for name in ("k_codes", "k_codes_scale", "v_rings"))
            outputs = tuple(x.movedim(0, 2).flatten(2, 3) for x in (*q, *k))
            outputs = (*outputs[:-1], outputs[-1].flatten(2))
        return _dequantized(outputs)

    moved = 2 * (dim * dtype.itemsize + dim + 4 * case.heads) + 2 * dim * dtype.itemsize
    return Problem(
        "qk_norm_rope_quantize_push", case.name, (1, tokens, dim), dtype, tokens, dim, make,
        lambda inputs, backend: partial(push, inputs, backend),
        partial(_plain_codes, ("q", "k"), case.head_dim), bytes=tokens * moved,
        backends=("cuda", "cpu", "reference"), judged=stood_for,
    )  # fmt: skip


def _push_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    """Both pushes of one rank, every rank's memory being this device's own: what the kernels need without the links."""
    tokens, dim, width, ranks = case.tokens, case.dim, dtype.itemsize, case.ranks
    heads, first = case.heads // ranks, (ranks - 1) * tokens

    def make(device: torch.device) -> Inputs:
        caches = _caches(case, ranks * tokens, ranks * heads, device, dtype)
        shape = (ranks, 1, caches["k_cache"].shape[1], heads, case.head_dim)
        stacked = {f"{name}s": caches[name].view(shape) for name in CACHES}
        q_outs = randn(ranks, 1, ranks * tokens, heads, case.head_dim, device=device, dtype=dtype)
        return {**_qkv(case, device, dtype, caches=False), **stacked, "q_outs": q_outs, "ring": caches["ring"]}

    def push(function: Callable[..., None], inputs: Inputs, **options: Any) -> Outputs:
        stacks = [list(inputs[name]) for name in ("q_outs", "k_caches", "v_caches")]
        function(*[inputs[name] for name in _PACK], *stacks, inputs["ring"], first, EPS, **options)
        return ()

    def written(inputs: Inputs, _: Outputs) -> Outputs:
        caches = inputs["k_caches"], inputs["v_caches"]
        slots = inputs["ring"].slots(first + tokens, caches[0].shape[2], caches[0].device)[first:]
        return (inputs["q_outs"][:, :, first:], *(cache[:, :, slots] for cache in caches))

    common = (case.name, (1, tokens, dim), dtype, tokens, dim)
    yield Problem(
        "qk_norm_rope_push", *common, make,
        lambda inputs, backend: partial(push, ops.qk_norm_rope_push, inputs, backend=backend),
        lambda inputs: push(reference.qk_norm_rope_push, inputs),
        bytes=6 * tokens * dim * width, backends=("cuda", "cpu", "reference"), judged=written,
    )  # fmt: skip
    column = (ranks - 1) * heads * case.head_dim

    def output(function: Callable[..., None], inputs: Inputs, **options: Any) -> Outputs:
        function(inputs["attended"], list(inputs["outs"]), column, **options)
        return ()

    yield Problem(
        "attention_output_push", *common,
        lambda device: {
            "attended": randn(1, ranks * tokens, heads * case.head_dim, device=device, dtype=dtype),
            "outs": randn(ranks, 1, tokens, dim, device=device, dtype=dtype),
        },
        lambda inputs, backend: partial(output, ops.attention_output_push, inputs, backend=backend),
        lambda inputs: output(reference.attention_output_push, inputs),
        bytes=2 * tokens * dim * width, backends=("cuda", "cpu", "reference"),
        judged=lambda inputs, _: (inputs["outs"][..., column:],),
    )  # fmt: skip


def _pack_and_norm(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    tokens, dim, width = case.tokens, case.dim, dtype.itemsize
    common = (case.name, (1, tokens, dim), dtype, tokens, dim)
    yield Problem(
        "qk_norm_rope_pack", *common, lambda device: _qkv(case, device, dtype, caches=False),
        _op(ops.qk_norm_rope_pack, _PACK, case.ranks, EPS), _plain(reference.qk_norm_rope_pack, _PACK, case.ranks, EPS),
        bytes=6 * tokens * dim * width,
    )  # fmt: skip
    names = ("x", "weight")
    yield Problem(
        "rms_norm", *common,
        lambda device: {
            "x": randn(1, tokens, dim, device=device, dtype=dtype), "weight": norm_weight(dim, device, dtype),
        },
        _op(ops.rms_norm, names, EPS), _plain(reference.rms_norm, names, EPS),
        bytes=2 * tokens * dim * width,
    )  # fmt: skip


def _residual_problems(case: KernelCase, dtype: torch.dtype, residual: torch.dtype) -> Iterator[Problem]:
    tokens, dim, width, wide = case.tokens, case.dim, dtype.itemsize, residual.itemsize
    name = case.name + ("-r32" if residual != dtype else "")
    shape = (1, tokens, dim)

    def problem(
        op: str, names: tuple[str, ...], rest: tuple[Any, ...], bytes_per_element: int, suffix: str = ""
    ) -> Problem:
        return Problem(
            op, name + suffix, shape, dtype, tokens, dim,
            lambda device: residual_inputs(case, dtype, residual, device, suffix == "-camera"),
            _op(getattr(ops, op), names, *rest), _plain(getattr(reference, op), names, *rest),
            bytes=bytes_per_element * tokens * dim,
        )  # fmt: skip

    def modulate(function: Callable[..., Tensor], inputs: Inputs, **named: Any) -> Callable[[], Tensor]:
        x = inputs["x"]
        out_dtype = x.dtype if x.dtype == torch.float64 else dtype
        return partial(function, x, inputs["shift"], inputs["scale"], EPS, out_dtype=out_dtype, **named)

    yield Problem(
        "layer_norm_modulate", name, shape, dtype, tokens, dim,
        lambda device: residual_inputs(case, dtype, residual, device, False),
        lambda inputs, backend: modulate(ops.layer_norm_modulate, inputs, backend=backend),
        lambda inputs: (modulate(reference.layer_norm_modulate, inputs)(),),
        bytes=(wide + width) * tokens * dim,
    )  # fmt: skip
    yield problem("residual_norm_modulate", ("x", "delta", "shift", "scale"), (EPS,), 2 * wide + 2 * width)
    camera_norm = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias")
    yield problem("gated_residual_camera_norm", camera_norm, (EPS,), 2 * wide + 4 * width, "-camera")
    yield problem("gated_residual_camera_norm", camera_norm, (EPS,), 2 * wide + 2 * width)
    yield problem("gated_residual", ("x", "delta", "gate"), (), 2 * wide + width)


def _plain_attention(inputs: Inputs) -> Outputs:
    """softmax(q k^T / sqrt(head_dim)) v in the inputs' own dtype, for the judged rows alone."""
    k, v = (inputs[name].transpose(1, 2) for name in CACHES)
    q = inputs["q"][:, inputs["rows"].to(k.device)].unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2),)


def _windowed_attention(name: str, dtype: torch.dtype, tokens: int, keys: int, heads: int, head_dim: int) -> Problem:
    def make(device: torch.device) -> Inputs:
        shape = (1, keys, heads, head_dim)
        caches = {name: randn(*shape, device=device, dtype=dtype) for name in CACHES}
        q = randn(1, tokens, heads * head_dim, device=device, dtype=dtype)
        return {"q": q, **caches, "rows": spread_rows(tokens)}

    return Problem(
        "windowed_attention", name, (1, tokens, keys, heads, head_dim), dtype, tokens, heads * head_dim,
        make, _op(ops.windowed_attention, ("q", *CACHES), keys), _plain_attention,
        bytes=2 * (tokens + keys) * heads * head_dim * dtype.itemsize, flops=4 * tokens * keys * heads * head_dim,
        backends=tuple(name for name in LIBRARIES if name != "reference"), judged=judged_rows, ceiling="",
    )  # fmt: skip


def _library_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    tokens, heads, head_dim = case.ranks * case.tokens, case.heads // case.ranks, case.head_dim
    visible = WINDOW_FRAMES * case.frame_tokens
    yield _windowed_attention(case.name, dtype, tokens, visible, heads, head_dim)
    yield _windowed_attention(f"{case.name}-text", dtype, case.tokens, TEXT_KEYS, case.heads, head_dim)
    yield attention_problem(case, visible)
    count = 4

    def make_segments(device: torch.device) -> Inputs:
        lse = torch.randn(count, 1, heads, tokens, device=device)
        return {"segments": randn(count, 1, tokens, heads, head_dim, device=device, dtype=dtype), "lse": lse}

    names = ("segments", "lse")
    yield Problem(
        "merge_segments", case.name, (count, 1, tokens, heads, head_dim), dtype, tokens, heads * head_dim,
        make_segments, _op(ops.merge_segments, names), _plain(reference.merge_segments, names),
        bytes=(count + 1) * tokens * heads * head_dim * dtype.itemsize, backends=("cuda", "cpu", "reference"),
    )  # fmt: skip
    dim, hidden = case.dim, case.ffn_dim

    def make_linear(device: torch.device) -> Inputs:
        return {
            "x": randn(1, case.tokens, dim, device=device, dtype=dtype),
            "weight": randn(hidden, dim, device=device, dtype=dtype) * dim**-0.5,
            "bias": randn(hidden, device=device, dtype=dtype),
            "rows": spread_rows(case.tokens),
        }

    def plain_linear(inputs: Inputs) -> Outputs:
        x = inputs["x"][:, inputs["rows"].to(inputs["x"].device)]
        return (F.gelu(F.linear(x, inputs["weight"], inputs["bias"]), approximate="tanh"),)

    yield Problem(
        "linear_gelu", case.name, (1, case.tokens, dim, hidden), dtype, case.tokens, dim,
        make_linear, _op(ops.linear_gelu, ("x", "weight", "bias")), plain_linear,
        bytes=(case.tokens * (dim + hidden) + hidden * dim) * dtype.itemsize,
        flops=2 * case.tokens * dim * hidden, backends=("auto", "reference"), judged=judged_rows, ceiling="gemm",
    )  # fmt: skip


def problems(case: KernelCase, dtype: torch.dtype = torch.bfloat16) -> Iterator[Problem]:
    """Every op's problems in this case, in the order data flows through a block."""
    if not case.wrap:
        yield _rope_problem(case)
    yield from _ring_problems(case, dtype)
    if case.wrap:
        return
    yield from _pack_and_norm(case, dtype)
    streams = (dtype, torch.float32) if case.residual_float32 and dtype != torch.float32 else (dtype,)
    for residual in streams:
        yield from _residual_problems(case, dtype, residual)
        yield from norm_problems(case, dtype, residual)
    yield from rotate_problems(case, dtype)
    yield from product_problems(case, dtype)
    yield from frame_problems(case, dtype)
    yield from _library_problems(case, dtype)
