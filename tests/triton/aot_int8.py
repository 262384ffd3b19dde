"""Compiles the int8 products and the quantising passes for every architecture that they serve, as launched there.

A program of its own since the test process may interpret kernels:
PYTHONPATH=.:bench python tests/triton/aot_int8.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator

import torch
from triton_aot import recorded_launches

from lingbot_kernels.triton import (
    gated_residual_camera_norm_quantize,
    int8_attention,
    int8_linear,
    layer_norm_modulate_quantize,
    residual_norm_modulate_quantize,
    rotate_quantize,
)

EPS, TOKENS = 1e-6, 1131
BF16, F32 = torch.bfloat16, torch.float32
ARCHITECTURES = (80, 90, 100, 120)
# (N, K, activation) of the 14B model's widest product and of its deepest one.
PRODUCTS = ((13824, 5120, "gelu_tanh"), (5120, 13824, None))


def passes(dim: int, residual: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, launch) of every pass on rows of `dim` values and a residual stream of this dtype."""
    x, x_out = torch.empty(2, 1, TOKENS, dim, dtype=residual).unbind(0)
    delta, cam_scale, cam_shift = torch.empty(3, 1, TOKENS, dim, dtype=BF16).unbind(0)
    gate, shift, scale = torch.empty(3, dim).unbind(0)
    weight, bias = torch.empty(2, dim, dtype=BF16).unbind(0)
    signs = torch.empty(dim, dtype=torch.int8)
    out = (torch.empty(1, TOKENS, dim, dtype=torch.int8), torch.empty(1, TOKENS))
    yield "rotate", lambda: rotate_quantize.rotate_quantize(x, signs, True, *out)
    yield (
        "layer_norm",
        lambda: layer_norm_modulate_quantize.layer_norm_modulate_quantize(x, shift, scale, signs, True, *out, EPS),
    )
    yield (
        "residual_norm",
        lambda: residual_norm_modulate_quantize.residual_norm_modulate_quantize(
            x, delta, gate, shift, scale, signs, True, x_out, *out, EPS
        ),
    )
    yield (
        "camera_norm",
        lambda: gated_residual_camera_norm_quantize.gated_residual_camera_norm_quantize(
            x, delta, gate, cam_scale, cam_shift, weight, bias, signs, True, x_out, *out, EPS
        ),
    )


def attend() -> None:
    """A chunk of the 14B model over its ring."""
    q, k = (torch.empty(1, tokens, 40, 128, dtype=torch.int8) for tokens in (4524, 27144))
    v, scales = torch.empty(k.shape, dtype=BF16), [torch.empty(x.shape[:3]) for x in (q, k)]
    out, lse = torch.empty(1, 4524, 5120, dtype=BF16), torch.empty(1, 40, 4524)
    int8_attention.int8_attention(q, scales[0], k, scales[1], v, 27144, 1.0, out, lse)


def cases() -> Iterator[tuple[str, int, Callable[[], None]]]:
    """(name, architecture, launch): on sm_90 all shapes and both residual dtypes, elsewhere the 14B model's in bf16."""
    for arch in ARCHITECTURES:
        yield "int8_attention", arch, attend
        for columns, depth, activation in PRODUCTS:
            for dtype in (BF16, F32) if activation else (BF16,):
                x, w = torch.empty(1, TOKENS, depth, dtype=torch.int8), torch.empty(columns, depth, dtype=torch.int8)
                y, scales = torch.empty(1, TOKENS, columns, dtype=dtype), (torch.empty(1, TOKENS), torch.empty(columns))
                config = int8_linear.launch_config(TOKENS, columns, depth, divmod(arch, 10), dtype.itemsize)

                def product(x=x, w=w, y=y, scales=scales, activation=activation, config=config) -> None:
                    bias = y[0, 0]
                    int8_linear.int8_linear(x, scales[0], w, scales[1], bias, activation, y, config=config)

                yield f"int8_linear-{columns}x{depth}-{dtype}", arch, product
        for dim, residual in ((5120, BF16), *(((5120, F32), (1536, BF16), (13824, BF16)) if arch == 90 else ())):
            for name, launch in passes(dim, residual):
                if dim != 13824 or name == "rotate":  # what GELU leaves is not normalised
                    yield f"{name}-{dim}-{residual}", arch, launch


def main() -> None:
    """Compile every case; one JSON object each."""
    for name, arch, launch in cases():
        with recorded_launches() as launches:
            launch()
        (recorded,) = launches
        row = dataclasses.asdict(recorded.compile(arch))
        sass = row.pop("sass")
        row["tensor_core"] = {unit: f" {unit}." in sass for unit in ("IGMMA", "IMMA")}
        print(json.dumps({"case": f"{name}-sm{arch}", "arch": arch, **row}), flush=True)


if __name__ == "__main__":
    main()
