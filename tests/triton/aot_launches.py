"""Compiles every kernel for sm_90 as its launcher would launch it at the tuned shapes; prints one JSON object a kernel.

A program of its own since the test process may interpret kernels:
PYTHONPATH=.:bench python tests/triton/aot_launches.py [NAME ...]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator

import torch
from triton_aot import recorded_launches

from lingbot_kernels.triton import (
    gated_residual,
    gated_residual_camera_norm,
    layer_norm_modulate,
    qk_norm_rope_kv_write,
    qk_norm_rope_pack,
    qkv_unpack_kv_write,
    residual_norm_modulate,
    rms_norm,
    rope_cos_sin,
)

EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, launch): widths of the 14B and 1.3B models, bf16, also a float32 residual stream; 3072: the prologue."""
    tokens = 1131
    table = torch.empty(tokens, 128)
    yield "rope_cos_sin", lambda: rope_cos_sin.rope_cos_sin(table, 0, 1508, 52, 1e4)
    for dim in (5120, 1536, 3072):
        heads = dim // 128
        q, k, v = torch.empty(1, tokens, 3, dim, dtype=BF16).unbind(2)
        x, delta, y, x_out = torch.empty(4, 1, tokens, dim, dtype=BF16).unbind(0)
        wide_x, wide_out = torch.empty(2, 1, tokens, dim, dtype=F32).unbind(0)
        w = torch.empty(2, dim, dtype=BF16)
        gate, shift, scale = torch.empty(3, dim).unbind(0)
        caches = torch.empty(2, 1, 2 * tokens, heads, 128, dtype=BF16)
        tail = (caches[0], caches[1], 0, None, 100)

        def full(q=q, k=k, v=v, w=w, y=y, tail=tail) -> None:
            qk_norm_rope_kv_write.qk_norm_rope_kv_write(q, k, v, w[0], w[1], table, y, *tail, EPS)

        def write_only(k=k, v=v, w=w, tail=tail) -> None:
            qk_norm_rope_kv_write.qk_norm_rope_kv_write(None, k, v, None, w[1], table, None, *tail, EPS)

        def cursor(q=q, k=k, v=v, w=w, y=y, caches=caches) -> None:
            at = torch.zeros(1, dtype=torch.int32)
            qk_norm_rope_kv_write.qk_norm_rope_kv_write(
                q, k, v, w[0], w[1], table, y, caches[0], caches[1], 0, at, 100, EPS
            )

        def pack(q=q, k=k, v=v, w=w, heads=heads) -> None:
            out = torch.empty(4, tokens, 1, 3, heads // 4, 128, dtype=BF16)
            qk_norm_rope_pack.qk_norm_rope_pack(q, k, v, w[0], w[1], table, out, EPS)

        def unpack(heads=heads, caches=caches) -> None:
            packed = torch.empty(tokens, 1, 3, heads // 4, 128, dtype=BF16)
            own = caches[..., : heads // 4, :].contiguous()
            qkv_unpack_kv_write.qkv_unpack_kv_write(packed, own[0], own[1], 0, None, 100)

        yield f"qk_norm_rope_kv_write-{dim}", full
        yield f"k_norm_rope_kv_write-{dim}", write_only
        if dim == 3072:
            continue
        yield f"qk_norm_rope_kv_write-cursor-{dim}", cursor
        yield f"qk_norm_rope_pack-{dim}", pack
        yield f"qkv_unpack_kv_write-{dim}", unpack
        yield f"rms_norm-{dim}", lambda x=x, w=w, y=y: rms_norm.rms_norm(x, w[0], y, EPS)
        for name, r, r_out in (("bf16", x, x_out), ("float32", wide_x, wide_out)):

            def modulate(r=r, y=y, shift=shift, scale=scale) -> None:
                layer_norm_modulate.layer_norm_modulate(r, shift, scale, y, EPS)

            def residual(r=r, delta=delta, gate=gate, shift=shift, scale=scale, r_out=r_out, y=y) -> None:
                residual_norm_modulate.residual_norm_modulate(r, delta, gate, shift, scale, r_out, y, EPS)

            def camera(r=r, delta=delta, gate=gate, x=x, x_out=x_out, w=w, r_out=r_out, y=y) -> None:
                gated_residual_camera_norm.gated_residual_camera_norm(
                    r, delta, gate, x, x_out, w[0], w[1], r_out, y, EPS
                )

            def gated(r=r, delta=delta, gate=gate, r_out=r_out) -> None:
                gated_residual.gated_residual(r, delta, gate, r_out)

            yield f"layer_norm_modulate-{name}-{dim}", modulate
            yield f"residual_norm_modulate-{name}-{dim}", residual
            yield f"gated_residual_camera_norm-{name}-{dim}", camera
            yield f"gated_residual-{name}-{dim}", gated


def main(names: list[str]) -> None:
    """Compile the named cases, or all."""
    for name, launch in cases():
        if names and name not in names:
            continue
        with recorded_launches() as launches:
            launch()
        for recorded in launches:
            row = dataclasses.asdict(recorded.compile(arch=90))
            del row["sass"]
            print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
