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
    Inputs,
    Outputs,
    Problem,
    call_problem,
    judged_rows,
    norm_weight,
    op_problem,
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


def _qkv(case: KernelCase, dtype: torch.dtype, device: torch.device, caches: bool = True) -> Inputs:
    """q, k, v as strided views of one projection [1, S, 3D], norm weights, the RoPE table, and the window."""
    qkv = randn(1, case.tokens, 3 * case.dim, device=device, dtype=dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    return {
        "qkv": qkv, "q": q, "k": k, "v": v,
        "q_weight": norm_weight(case.dim, device, dtype), "k_weight": norm_weight(case.dim, device, dtype),
        "cos_sin": reference.rope_cos_sin(
            case.tokens, case.token_start, case.frame_tokens, case.columns, case.head_dim, THETA, device
        ),
        **(_caches(case, case.tokens, case.heads, device, dtype) if caches else {}),
    }  # fmt: skip


_PACK = ("q", "k", "v", "q_weight", "k_weight", "cos_sin")
_NO_TRITON = ("cuda", "cpu", "reference")


def _rope_problem(case: KernelCase) -> Problem:
    given = (case.tokens, case.token_start, case.frame_tokens, case.columns, case.head_dim, THETA)
    shape = (case.tokens, case.head_dim)

    def bind(inputs: Inputs, backend: str) -> Callable[[], Any]:
        return partial(ops.rope_cos_sin, *given, inputs["out"].device, out=inputs["out"], backend=backend)

    def plain(inputs: Inputs) -> Outputs:
        return (reference.rope_cos_sin(*given, inputs["out"].device, dtype=inputs["out"].dtype),)

    def make(device: torch.device) -> Inputs:
        return {"out": torch.empty(shape, device=device)}

    return Problem(
        case.name, shape, torch.float32, "rope_cos_sin", make, bind, plain, tokens=case.tokens, dim=case.head_dim
    )


def _ring_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    problem, make = partial(op_problem, case.name, (1, case.tokens, case.dim), dtype), partial(_qkv, case, dtype)
    yield problem("qk_norm_rope_kv_write", make, (*_PACK, *CACHES, "ring", EPS))
    yield problem("k_norm_rope_kv_write", make, ("k", "v", "k_weight", "cos_sin", *CACHES, "ring", EPS))
    if not case.wrap:
        yield _int8_ring_problem(case, dtype, with_q=True)
        yield _int8_ring_problem(case, dtype, with_q=False)
        yield from _push_problems(case, dtype)
        yield _int8_push_problem(case, dtype)
    heads, chunk = case.heads // case.ranks, case.ranks * case.tokens
    shape = (chunk, 1, 3, heads, case.head_dim)

    def packed(device: torch.device) -> Inputs:
        return {"packed": randn(*shape, device=device, dtype=dtype), **_caches(case, chunk, heads, device, dtype)}

    yield op_problem(
        case.name, shape, dtype, "qkv_unpack_kv_write", packed, ("packed", *CACHES, "ring"), tokens=chunk,
        dim=heads * case.head_dim,
    )  # fmt: skip


def _int8_ring_problem(case: KernelCase, dtype: torch.dtype, with_q: bool) -> Problem:
    """The write to an int8 ring, or its write-only half; the gate compares what codes and scales stand for."""
    tokens, dim, normed = case.tokens, case.dim, ("q", "k") if with_q else ("k",)
    op = f"{''.join(normed)}_norm_rope_quantize_kv_write"

    def make(device: torch.device) -> Inputs:
        inputs = _qkv(case, dtype, device)
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

    names = (*(_PACK if with_q else ("k", "v", "k_weight", "cos_sin")), "k_codes", "k_codes_scale", "v_cache")
    return op_problem(
        case.name, (1, tokens, dim), dtype, op, make, (*names, "position", EPS),
        plain=partial(_plain_codes, normed, case.head_dim), sizes={"heads": case.heads}, backends=_NO_TRITON,
        judged=stood_for,
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
            **_qkv(case, dtype, device, caches=False),
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

    return Problem(
        case.name, (1, tokens, dim), dtype, "qk_norm_rope_quantize_push", make,
        lambda inputs, backend: partial(push, inputs, backend), partial(_plain_codes, ("q", "k"), case.head_dim),
        sizes={"heads": case.heads}, backends=_NO_TRITON, judged=stood_for,
    )  # fmt: skip


def _push_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    """Both pushes of one rank, every rank's memory being this device's own: what the kernels need without the links."""
    tokens, dim, ranks = case.tokens, case.dim, case.ranks
    heads, first = case.heads // ranks, (ranks - 1) * tokens

    def make(device: torch.device) -> Inputs:
        caches = _caches(case, ranks * tokens, ranks * heads, device, dtype)
        shape = (ranks, 1, caches["k_cache"].shape[1], heads, case.head_dim)
        stacked = {f"{name}s": caches[name].view(shape) for name in CACHES}
        q_outs = randn(ranks, 1, ranks * tokens, heads, case.head_dim, device=device, dtype=dtype)
        return {**_qkv(case, dtype, device, caches=False), **stacked, "q_outs": q_outs, "ring": caches["ring"]}

    def push(function: Callable[..., None], inputs: Inputs, **options: Any) -> None:
        stacks = [list(inputs[name]) for name in ("q_outs", "k_caches", "v_caches")]
        function(*[inputs[name] for name in _PACK], *stacks, inputs["ring"], first, EPS, **options)

    def written(inputs: Inputs, _: Outputs) -> Outputs:
        caches = inputs["k_caches"], inputs["v_caches"]
        slots = inputs["ring"].slots(first + tokens, caches[0].shape[2], caches[0].device)[first:]
        return (inputs["q_outs"][:, :, first:], *(cache[:, :, slots] for cache in caches))

    problem = partial(call_problem, case.name, (1, tokens, dim), dtype, backends=_NO_TRITON)
    yield problem("qk_norm_rope_push", make, push, judged=written)
    column = (ranks - 1) * heads * case.head_dim

    def make_output(device: torch.device) -> Inputs:
        attended = randn(1, ranks * tokens, heads * case.head_dim, device=device, dtype=dtype)
        return {"attended": attended, "outs": randn(ranks, 1, tokens, dim, device=device, dtype=dtype)}

    def output(function: Callable[..., None], inputs: Inputs, **options: Any) -> None:
        function(inputs["attended"], list(inputs["outs"]), column, **options)

    yield problem(
        "attention_output_push", make_output, output,
        judged=lambda inputs, _: (inputs["outs"][..., column:],),
    )  # fmt: skip


def _pack_and_norm(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    tokens, dim = case.tokens, case.dim
    problem = partial(op_problem, case.name, (1, tokens, dim), dtype)

    def make(device: torch.device) -> Inputs:
        return {"x": randn(1, tokens, dim, device=device, dtype=dtype), "weight": norm_weight(dim, device, dtype)}

    yield problem("qk_norm_rope_pack", partial(_qkv, case, dtype, caches=False), (*_PACK, case.ranks, EPS))
    yield problem("rms_norm", make, ("x", "weight", EPS))


def _residual_problems(case: KernelCase, dtype: torch.dtype, residual: torch.dtype) -> Iterator[Problem]:
    name, shape = case.name + ("-r32" if residual != dtype else ""), (1, case.tokens, case.dim)
    sizes = {"residual": residual.itemsize}
    make = partial(residual_inputs, case, dtype, residual)

    def bind(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
        return partial(modulate(ops.layer_norm_modulate, inputs), backend=backend)

    def modulate(function: Callable[..., Tensor], inputs: Inputs) -> Callable[..., Tensor]:
        x = inputs["x"]
        out_dtype = x.dtype if x.dtype == torch.float64 else dtype
        return partial(function, x, inputs["shift"], inputs["scale"], EPS, out_dtype=out_dtype)

    def plain(inputs: Inputs) -> Outputs:
        return (modulate(reference.layer_norm_modulate, inputs)(),)

    yield Problem(name, shape, dtype, "layer_norm_modulate", make, bind, plain, sizes=sizes)
    problem = partial(op_problem, name, shape, dtype, sizes=sizes)
    yield problem("residual_norm_modulate", make, ("x", "delta", "shift", "scale", EPS))
    of_camera = ("x", "delta", "gate", "cam_scale", "cam_shift", "weight", "bias", EPS)
    yield op_problem(
        name + "-camera", shape, dtype, "gated_residual_camera_norm", partial(make, camera=True), of_camera,
        sizes={**sizes, "camera": True},
    )  # fmt: skip
    yield problem("gated_residual_camera_norm", make, of_camera)
    yield problem("gated_residual", make, ("x", "delta", "gate"))


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

    return op_problem(
        name, (1, tokens, keys, heads, head_dim), dtype, "windowed_attention", make, ("q", *CACHES, keys),
        plain=_plain_attention, dim=heads * head_dim, sizes={"visible": keys},
        flops=4 * tokens * keys * heads * head_dim,
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

    yield op_problem(
        case.name, (count, 1, tokens, heads, head_dim), dtype, "merge_segments", make_segments, ("segments", "lse"),
        tokens=tokens, dim=heads * head_dim, bytes=(count + 1) * tokens * heads * head_dim * dtype.itemsize,
        backends=_NO_TRITON,
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

    yield op_problem(
        case.name, (1, case.tokens, dim, hidden), dtype, "linear_gelu", make_linear, ("x", "weight", "bias"),
        plain=plain_linear, sizes={"hidden": hidden},
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
