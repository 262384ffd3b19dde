"""What people run today between the QKV projection and attention, as peers of the norm + RoPE + K/V write ops.

Each does what the op does, to the same inputs, and is judged by the same gate.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.benchmarks.kernel_cases import FRAMES_PER_CHUNK, KernelCase
from lingbot_kernels.benchmarks.problem import CACHES, EPS, THETA, Inputs, Outputs, as_tuple, written_slots

FULL, WRITE = "qk_norm_rope_kv_write", "k_norm_rope_kv_write"


@dataclass(frozen=True)
class Peer:
    """Another way of doing what an op does.

    Attributes:
        name: as in the rows' `backend`.
        ops: that it is a peer of.
        bind: (op, case, inputs) -> the call that is measured.
        missing: what is not installed, or None.
        adapt: (case, inputs) -> inputs as the peer can take them; None where it takes the op's own.
        finish: (inputs, outputs) -> outputs; does for the gate, unmeasured, what the peer leaves undone.
        compiles: whether it compiles for seconds first; left out of quick runs and measured in one case alone.
        note: how it falls short of doing the same.
    """

    name: str
    ops: tuple[str, ...]
    bind: Callable[[str, KernelCase, Inputs], Callable[[], Any]]
    missing: Callable[[], str | None] = lambda: None
    adapt: Callable[[KernelCase, Inputs], Inputs] | None = None
    finish: Callable[[Inputs, Outputs], Outputs] = lambda inputs, outputs: outputs
    compiles: bool = False
    note: str = ""


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * weight


def _rotate_complex(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, S, H, head_dim] times turns, complex128 [S, 1, head_dim / 2], in float64."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def _rotate_real(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [B, S, H, head_dim] turned by cos_sin [S, head_dim], in float32."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def _chain(
    rotate: Callable[[Tensor, Tensor], Tensor], table: Tensor, q: Tensor | None, k: Tensor, v: Tensor,
    q_weight: Tensor, k_weight: Tensor, k_cache: Tensor, v_cache: Tensor, start: int,
) -> Tensor | None:  # fmt: skip
    """RMSNorm, RoPE, then copies of K and V to slots start .. start + S; q None: K and V alone."""
    heads = k_cache.shape[2]
    k_cache[:, start : start + k.shape[1]] = rotate(_norm(k, k_weight).unflatten(-1, (heads, -1)), table)
    v_cache[:, start : start + k.shape[1]] = v.unflatten(-1, (heads, -1))
    return None if q is None else rotate(_norm(q, q_weight).unflatten(-1, (heads, -1)), table).flatten(-2)


def _chain_arguments(op: str, inputs: Inputs) -> tuple[Any, ...]:
    q = inputs["q"] if op == FULL else None
    names = ("k", "v", "q_weight", "k_weight", *CACHES)
    return (q, *[inputs[name] for name in names], inputs["ring"].chunk_start)


def _official(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    cos, sin = inputs["cos_sin"].double()[:, None].chunk(2, dim=-1)
    return functools.partial(_chain, _rotate_complex, torch.complex(cos, sin), *_chain_arguments(op, inputs))


def _real(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    return functools.partial(_chain, _rotate_real, inputs["cos_sin"], *_chain_arguments(op, inputs))


@functools.cache
def _compiled_chain() -> Callable[..., Any]:
    return torch.compile(_chain, dynamic=False)


def _compiled(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    return functools.partial(_compiled_chain(), _rotate_real, inputs["cos_sin"], *_chain_arguments(op, inputs))


def _flashinfer_missing() -> str | None:
    return None if importlib.util.find_spec("flashinfer") else "flashinfer is not installed"


def _flashinfer_sequence(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    from flashinfer.norm import rmsnorm
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    q, k, v, q_weight, k_weight, k_cache, v_cache, start = _chain_arguments(op, inputs)
    tokens, cos_sin = q.shape[1], inputs["cos_sin"]
    positions = torch.arange(tokens, device=q.device)
    k_slots, v_slots = (cache[0, start : start + tokens].flatten(-2) for cache in (k_cache, v_cache))

    def run() -> Tensor:
        q_out, k_out = rmsnorm(q[0], q_weight, eps=EPS), rmsnorm(k[0], k_weight, eps=EPS)
        apply_rope_with_cos_sin_cache_inplace(positions, q_out, k_out, case.head_dim, cos_sin, is_neox=False)
        k_slots.copy_(k_out)
        v_slots.copy_(v[0])
        return q_out[None]

    return run


def _first_frames(case: KernelCase, inputs: Inputs) -> Inputs:
    """The same at frame 0: FlashInfer's fused op knows no frame offset."""
    sizes = (case.tokens, 0, case.frame_tokens, case.columns, case.head_dim, THETA)
    return {**inputs, "cos_sin": reference.rope_cos_sin(*sizes, inputs["cos_sin"].device)}


def _flashinfer_fused(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    from flashinfer.norm import fused_qk_rmsnorm_rope

    spatial = 2 * (case.head_dim // 6)
    return functools.partial(
        fused_qk_rmsnorm_rope, inputs["qkv"], inputs["q_weight"], inputs["k_weight"],
        ppf=FRAMES_PER_CHUNK, pph=case.rows, ppw=case.columns,
        num_frame_channels=case.head_dim - 2 * spatial, num_height_channels=spatial, num_width_channels=spatial,
        num_heads_q=case.heads, num_heads_k=case.heads, num_heads_v=case.heads, head_dim=case.head_dim,
        eps=EPS, base=THETA, interleave=True,
    )  # fmt: skip


def _write_fused(inputs: Inputs, outputs: Outputs) -> Outputs:
    """Copy the fused op's K and V to the ring, and give Q the op's shape."""
    q, k, v = (x.reshape(inputs["q"].shape) for x in outputs)
    for name, x in zip(CACHES, (k, v), strict=True):
        inputs[name][:, written_slots(inputs)] = x.unflatten(-1, inputs[name].shape[2:])
    return (q,)


def _eager_gelu(op: str, case: KernelCase, inputs: Inputs) -> Callable[[], Any]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh")


PEERS = (
    Peer("eager-official", (FULL, WRITE), _official),
    Peer("eager-float32", (FULL, WRITE), _real),
    Peer("torch-compile", (FULL, WRITE), _compiled, compiles=True),
    Peer("flashinfer", (FULL,), _flashinfer_sequence, missing=_flashinfer_missing),
    Peer(
        "flashinfer-fused", (FULL,), _flashinfer_fused, missing=_flashinfer_missing, adapt=_first_frames,
        finish=_write_fused, note="no cache write, no frame offset",
    ),
    Peer("eager", ("linear_gelu",), _eager_gelu),
)  # fmt: skip


def peers_of(op: str) -> list[Peer]:
    return [peer for peer in PEERS if op in peer.ops]


def gate_run(peer: Peer, op: str, case: KernelCase) -> Callable[[Inputs], Outputs]:
    """What the gate judges: the measured call and whatever it leaves undone."""
    return lambda inputs: peer.finish(inputs, as_tuple(peer.bind(op, case, inputs)()))
