"""Which backend serves an op, and why another can't: every op's homes, on one page.

The order of precedence is: the `backend=` argument, `use_backend(...)`, `LINGBOT_KERNELS_BACKEND`, then `auto`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lingbot_kernels.ops import _native
from lingbot_kernels.ops._winners import CUDA_WINNERS

BACKENDS = ("cuda", "triton", "cpu", "reference")
_LOW_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class OpHomes:
    """Where an op lives.

    Attributes:
        absent: maps a backend it has no home in, on purpose, to the reason.
        kernel: the op whose kernels serve this one in cuda, triton and cpu, where it has none of its own.
        capability: the one compute capability that its CUDA kernel is for (90 for 9.0), where it is for one alone.
    """

    name: str
    absent: Mapping[str, str] = field(default_factory=dict)
    kernel: str | None = None
    capability: int | None = None


_PACKED = "one launch writes to a list of tensors, which Triton can't take; its exchange is the packed one"
_CORE = "not written: the compiled core serves every GPU"
_LIBRARY = "left to a library, which is better at it"
_FRAME = {
    "cuda": "Triton's pass runs at the bandwidth of memory, between convolutions of cuDNN",
    "cpu": "on a CPU the convolutions beside it take all the time",
}
OPS: dict[str, OpHomes] = {
    op.name: op
    for op in (
        OpHomes("rope_cos_sin"),
        OpHomes("qk_norm_rope_kv_write"),
        OpHomes("k_norm_rope_kv_write", kernel="qk_norm_rope_kv_write"),  # without a Q
        OpHomes("qk_norm_rope_quantize_kv_write", {"triton": _CORE}),
        OpHomes("k_norm_rope_quantize_kv_write", {"triton": _CORE}, kernel="qk_norm_rope_quantize_kv_write"),
        OpHomes("qk_norm_rope_pack"),
        OpHomes("qkv_unpack_kv_write"),
        OpHomes("qk_norm_rope_push", {"triton": _PACKED}),
        OpHomes("qk_norm_rope_quantize_push", {"triton": _PACKED}),
        OpHomes("attention_output_push", {"triton": _PACKED}),
        OpHomes("merge_segments", {"triton": "follows flash-attn-4 on CUDA alone, where the compiled core serves"}),
        OpHomes("rms_norm"),
        OpHomes("layer_norm_modulate"),
        OpHomes("residual_norm_modulate"),
        OpHomes("gated_residual_camera_norm"),
        OpHomes("gated_residual"),
        OpHomes("rotate_quantize"),
        OpHomes("layer_norm_modulate_quantize"),
        OpHomes("residual_norm_modulate_quantize"),
        OpHomes("gated_residual_camera_norm_quantize"),
        OpHomes("int8_linear", {"cuda": "left to Triton: 0.94 to 1.29 PFLOP/s at the 14B shapes on an H100"}),
        OpHomes("frame_norm_silu", _FRAME),
        OpHomes("frame_pixels", _FRAME),
        OpHomes("int8_attention", capability=90),
        OpHomes("windowed_attention", dict.fromkeys(("cuda", "triton", "cpu"), f"attention is {_LIBRARY}")),
        OpHomes("linear_gelu", dict.fromkeys(("cuda", "triton", "cpu"), f"matrix products are {_LIBRARY}")),
    )
}

_override: ContextVar[str | None] = ContextVar("lingbot_kernels_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name can't serve the op here; the message says what is missing."""


def _named(backend: str, where: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"{where}: got {backend!r}, must be auto or one of {', '.join(BACKENDS)}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, ops use `backend` ("cuda", "triton", "cpu", "reference" or "auto") unless told otherwise by
    argument.

    An op without a home in that backend (attention and matrix products belong to libraries) keeps its automatic choice.
    """
    token = _override.set(_named(backend, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)


@torch.compiler.assume_constant_result
def requested_backend() -> str:
    """The backend asked for by `use_backend` or the environment; "auto" where there is none."""
    chosen = _override.get()
    if chosen is None:
        chosen = _native.environment("LINGBOT_KERNELS_BACKEND") or "auto"
        return chosen if chosen == "auto" else _named(chosen, "LINGBOT_KERNELS_BACKEND")
    return chosen


@functools.cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not importable ({error})"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None where `backend` can serve `op` on tensors of this device type and dtype, else what is missing."""
    absent = OPS[op].absent.get(backend)
    if absent is not None:
        return absent
    if backend == "reference":
        return None
    if dtype not in _LOW_PRECISION:
        return f"serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if backend == "cpu":
        if device_type != "cpu":
            return f"serves CPU tensors, not {device_type}"
        return _native.why_not_cpu()
    if backend == "triton" and triton_interpreted() and device_type == "cpu":
        return _triton_missing()
    if device_type != "cuda":
        return f"serves CUDA tensors, not {device_type}"
    if backend == "triton":
        return _triton_missing()
    return _native.why_not_cuda() or _other_capability(OPS[op].capability)


def _other_capability(wanted: int | None) -> str | None:
    """Why a kernel for GPUs of this compute capability can't run on the current one."""
    if wanted is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor == wanted:
        return None
    return f"serves GPUs of compute capability {wanted / 10}, not {major}.{minor}"


def demand(op: str, backend: str, reason: str | None) -> None:
    """Raise BackendUnavailable where there is a reason why the chosen backend can't serve this very call."""
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {backend!r} can't serve: {reason}")


def automatic_order(op: str, device_type: str, tokens: int, dim: int) -> tuple[str, ...]:
    """Backends in the order `auto` prefers them, best first: a pure function of the measured winners."""
    if device_type == "cuda":
        best = CUDA_WINNERS.pick(op, tokens, dim)
        return (best, "triton" if best == "cuda" else "cuda", "reference")
    return ("cpu", "reference")


@functools.lru_cache(maxsize=4096)
def _resolve(op: str, backend: str, by_name: bool, device_type: str, dtype: torch.dtype, tokens: int, dim: int) -> str:
    if backend != "auto" and (by_name or backend not in OPS[op].absent):
        demand(op, backend, why_not(op, backend, device_type, dtype))
        return backend
    for candidate in automatic_order(op, device_type, tokens, dim):
        if why_not(op, candidate, device_type, dtype) is None:
            return candidate
    raise AssertionError("the reference serves everything")


def resolve(op: str, backend: str | None, device_type: str, dtype: torch.dtype, tokens: int = 0, dim: int = 0) -> str:
    """The backend that serves this call.

    Raises BackendUnavailable where the one asked for by name can't, ValueError where there is none of that name.
    """
    if backend is None:
        return _resolve(op, requested_backend(), False, device_type, dtype, tokens, dim)
    return _resolve(op, _named(backend, "backend"), True, device_type, dtype, tokens, dim)


def place(x: torch.Tensor) -> tuple[str, torch.dtype, int, int]:
    """(device type, dtype, tokens, dim) of token-major x [B, S, D]; another shape is left to the op's own check to
    refuse.
    """
    tokens, dim = x.shape[1:] if x.dim() == 3 else (0, 0)
    return x.device.type, x.dtype, tokens, dim
