"""Tensors to the flat argument lists of `_C.cpu`, and the float64 formulas the results are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_kernels import _C

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Half a step of rounding, relative to the value: float32 stands for the arithmetic itself.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EPS = 1e-6


@dataclass(frozen=True)
class Ring:
    start: int
    sink: int
    capacity: int
    cursor: Tensor | None = None

    def slots(self, tokens: int) -> list[int]:
        start = self.start if self.cursor is None else int(self.cursor)
        body = self.capacity - self.sink
        return [p if p < self.sink else self.sink + (p - self.sink) % body for p in range(start, start + tokens)]

    def args(self) -> tuple[int, ...]:
        return (self.start, ptr(self.cursor), self.sink, self.capacity)


def ptr(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def modulation(m: Tensor | None) -> tuple[int, int]:
    return (ptr(m), 0 if m is None or m.dim() == 1 else m.stride(0))


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def rope_cos_sin(
    tokens: int, start: int, frame_stride: int, width: int, head_dim: int, theta: float = 10000.0, threads: int = 0
) -> Tensor:
    out = poison(tokens, head_dim)
    _C.cpu.rope_cos_sin(out.data_ptr(), tokens, start, frame_stride, width, head_dim, theta, threads)
    return out


def qk_norm_rope_kv_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    ring: Ring,
    threads: int = 0,
) -> Tensor | None:
    q_out = None if q is None else poison(*q.shape, dtype=q.dtype)
    heads, head_dim = k_cache.shape[2:]
    _C.cpu.qk_norm_rope_kv_write(
        *(*rows(q), *rows(k), *rows(v), ptr(q_weight), ptr(k_weight), ptr(cos_sin), *rows(q_out), 0),
        *(*rows(k_cache), *rows(v_cache), *ring.args(), *k.shape[:2], heads, head_dim, CODES[k.dtype], EPS, threads),
    )
    return q_out


def qk_norm_rope_quantize_kv_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    k_scale: Tensor,
    v_cache: Tensor | None,
    ring: Ring,
    threads: int = 0,
) -> tuple[Tensor, Tensor] | None:
    heads, head_dim = k_cache.shape[2:]
    codes = torch.full((*k.shape[:2], heads, head_dim), 77, dtype=torch.int8)
    scale = poison(*k.shape[:2], heads)
    given = q is not None
    _C.cpu.qk_norm_rope_quantize_kv_write(
        *(*rows(q), *rows(k), *rows(v), ptr(q_weight), ptr(k_weight), ptr(cos_sin)),
        *(ptr(codes) * given, ptr(scale) * given, *rows(k_cache), ptr(k_scale), *k_scale.stride(), *rows(v_cache)),
        *(*ring.args(), *k.shape[:2], heads, head_dim, CODES[k.dtype], EPS, threads),
    )
    return (codes, scale) if given else None


def qk_norm_rope_pack(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos_sin: Tensor,
    heads: int,
    ranks: int,
    threads: int = 0,
) -> Tensor:
    batch, tokens, dim = k.shape
    head_dim = dim // heads
    out = poison(ranks, tokens, batch, 2 if q is None else 3, heads // ranks, head_dim, dtype=k.dtype)
    _C.cpu.qk_norm_rope_pack(
        *(*rows(q), *rows(k), *rows(v), ptr(q_weight), ptr(k_weight), ptr(cos_sin), ptr(out), batch, tokens),
        *(heads, head_dim, ranks, CODES[k.dtype], EPS, threads),
    )
    return out


def qkv_unpack_kv_write(packed: Tensor, k_cache: Tensor, v_cache: Tensor, ring: Ring, threads: int = 0) -> None:
    tokens, batch, parts, heads, head_dim = packed.shape
    _C.cpu.qkv_unpack_kv_write(
        *(ptr(packed), parts, *rows(k_cache), *rows(v_cache), *ring.args(), batch, tokens, heads, head_dim),
        *(CODES[packed.dtype], threads),
    )


def rms_norm(x: Tensor, weight: Tensor, threads: int = 0) -> Tensor:
    y = poison(*x.shape, dtype=x.dtype)
    _C.cpu.rms_norm(*rows(x), ptr(weight), ptr(y), *x.shape, CODES[x.dtype], EPS, threads)
    return y


def layer_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, dtype: torch.dtype, threads: int = 0
) -> Tensor:
    y = poison(*x.shape, dtype=dtype)
    codes = (CODES[x.dtype], CODES[dtype])
    _C.cpu.layer_norm_modulate(ptr(x), *modulation(shift), *modulation(scale), ptr(y), *x.shape, *codes, EPS, threads)
    return y


def residual_norm_modulate(
    x: Tensor, delta: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, threads: int = 0
) -> tuple[Tensor, Tensor]:
    x_out, y = poison(*x.shape, dtype=x.dtype), poison(*x.shape, dtype=delta.dtype)
    _C.cpu.residual_norm_modulate(
        *(ptr(x), ptr(delta), *modulation(gate), *modulation(shift), *modulation(scale), ptr(x_out), ptr(y)),
        *(*x.shape, CODES[x.dtype], CODES[delta.dtype], EPS, threads),
    )
    return x_out, y


def gated_residual_camera_norm(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    cam_scale: Tensor | None,
    cam_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    x_out, y = poison(*x.shape, dtype=x.dtype), poison(*x.shape, dtype=delta.dtype)
    _C.cpu.gated_residual_camera_norm(
        *(ptr(x), ptr(delta), *modulation(gate), ptr(cam_scale), ptr(cam_shift), ptr(weight), ptr(bias)),
        *(ptr(x_out), ptr(y), *x.shape, CODES[x.dtype], CODES[delta.dtype], EPS, threads),
    )
    return x_out, y


def gated_residual(x: Tensor, delta: Tensor, gate: Tensor | None, threads: int = 0) -> Tensor:
    x_out = poison(*x.shape, dtype=x.dtype)
    codes = (CODES[x.dtype], CODES[delta.dtype])
    _C.cpu.gated_residual(ptr(x), ptr(delta), *modulation(gate), ptr(x_out), *x.shape, *codes, threads)
    return x_out


def quantized_rows(x: Tensor, signs: Tensor | None, rotate: bool) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Poisoned codes and row scales for rows like x, and the fields that name them."""
    codes = torch.full((*x.shape[:2], -(-x.shape[2] // 128) * 128), 77, dtype=torch.int8)
    row_scale = poison(*x.shape[:2])
    return codes, row_scale, (ptr(codes), ptr(row_scale), ptr(signs), int(rotate))


def rotate_quantize(x: Tensor, signs: Tensor | None, rotate: bool, threads: int = 0) -> tuple[Tensor, Tensor]:
    codes, row_scale, fields = quantized_rows(x, signs, rotate)
    _C.cpu.rotate_quantize(*rows(x), *fields, *x.shape, CODES[x.dtype], threads)
    return codes, row_scale


def layer_norm_modulate_quantize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, signs: Tensor | None, rotate: bool, threads: int = 0
) -> tuple[Tensor, Tensor]:
    codes, row_scale, fields = quantized_rows(x, signs, rotate)
    _C.cpu.layer_norm_modulate_quantize(
        *(ptr(x), *modulation(shift), *modulation(scale), *fields, *x.shape, CODES[x.dtype], EPS, threads)
    )
    return codes, row_scale


def residual_norm_modulate_quantize(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    signs: Tensor | None,
    rotate: bool,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    x_out = poison(*x.shape, dtype=x.dtype)
    codes, row_scale, fields = quantized_rows(x, signs, rotate)
    _C.cpu.residual_norm_modulate_quantize(
        *(ptr(x), ptr(delta), *modulation(gate), *modulation(shift), *modulation(scale), ptr(x_out), *fields),
        *(*x.shape, CODES[x.dtype], CODES[delta.dtype], EPS, threads),
    )
    return x_out, codes, row_scale


def gated_residual_camera_norm_quantize(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    cam_scale: Tensor | None,
    cam_shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    signs: Tensor | None,
    rotate: bool,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    x_out = poison(*x.shape, dtype=x.dtype)
    codes, row_scale, fields = quantized_rows(x, signs, rotate)
    _C.cpu.gated_residual_camera_norm_quantize(
        *(ptr(x), ptr(delta), *modulation(gate), ptr(cam_scale), ptr(cam_shift), ptr(weight), ptr(bias), ptr(x_out)),
        *(*fields, *x.shape, CODES[x.dtype], CODES[delta.dtype], EPS, threads),
    )
    return x_out, codes, row_scale


def int8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype,
    threads: int = 0,
) -> Tensor:  # fmt: skip
    """x [rows, inputs], w [outputs, inputs] -> [rows, outputs]."""
    y = poison(x.shape[0], w.shape[0], dtype=dtype)
    bias_dtype = CODES[dtype if bias is None else bias.dtype]
    _C.cpu.int8_linear(
        *(ptr(x), ptr(x_scale), ptr(w), ptr(w_scale), ptr(bias), ptr(y), x.shape[0], x.shape[1], w.shape[0]),
        *(int(gelu), bias_dtype, CODES[dtype], threads),
    )
    return y


def table64(tokens: int, start: int, frame_stride: int, width: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """cos | sin in float64, one token at a time."""
    out = torch.empty(tokens, head_dim, dtype=torch.float64)
    side = head_dim // 6 * 2
    for i in range(tokens):
        frame, in_frame = divmod(start + i, frame_stride)
        angles = [
            position * theta ** (-2.0 * pair / dim)
            for position, dim in ((frame, head_dim - 2 * side), (in_frame // width, side), (in_frame % width, side))
            for pair in range(dim // 2)
        ]
        angle = torch.tensor(angles, dtype=torch.float64)
        out[i] = torch.cat([angle.cos(), angle.sin()])
    return out


def norm_rope64(x: Tensor, weight: Tensor, cos_sin: Tensor, heads: int) -> Tensor:
    """[B, S, D] -> [B, S, heads, head_dim], as complex products in float64."""
    x64 = x.double()
    y = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    pairs = torch.view_as_complex(y.unflatten(-1, (heads, -1, 2)).contiguous())
    cos, sin = cos_sin.double().chunk(2, -1)
    return torch.view_as_real(pairs * torch.complex(cos, sin)[None, :, None]).flatten(-2)


def norm_rope_plain(x: Tensor, weight: Tensor, cos_sin: Tensor, heads: int) -> Tensor:
    """The plain formulation in x's dtype: what the error is measured by."""
    x32 = x.float()
    y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight
    a, b = y.float().unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos_sin[None, :, None].chunk(2, -1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def layer_norm64(x: Tensor) -> Tensor:
    x64 = x.double()
    centred = x64 - x64.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def per_batch(m: Tensor | None, absent: float) -> Tensor:
    """A modulation vector in float64 that broadcasts over [B, S, D]."""
    if m is None:
        return torch.tensor(absent, dtype=torch.float64)
    return m.double() if m.dim() == 1 else m.double()[:, None]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Finite everywhere, and within tolerance * (|expected| + rms of the expected)."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} values are not finite"
    bound = tolerance * (expected.abs() + expected.square().mean().sqrt())
    excess = (actual.double() - expected).abs() / bound
    assert excess.max() <= 1, f"error is {excess.max():.3g} of what is allowed, at {int(excess.argmax())}"


def assert_as_good(actual: Tensor, plain: Tensor, expected: Tensor) -> None:
    """The error against float64 is at most 1.25 times that of the plain formulation in the same dtype."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).norm()
    plain_error = (plain.double() - expected).norm()
    assert error <= 1.25 * plain_error, f"error {error:.3g}, the plain formulation's is {plain_error:.3g}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def under_every_isa(f: Callable[[], Tensor]) -> list[Tensor]:
    before, results = _C.cpu_isa, []
    for name in _C.cpu.isas:
        _C.cpu.set_isa(name)
        results.append(f())
    _C.cpu.set_isa(before)
    return results
