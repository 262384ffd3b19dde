"""Times every launch configuration of the Triton kernels worth trying, next to a copy of the same bytes.

python bench/triton_tuning.py [--ops NAME ...] [--json FILE]: on an NVIDIA GPU; a configuration is timed only after its
outputs passed the check against the reference in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton
from triton_aot import recorded_launches

from lingbot_kernels import reference
from lingbot_kernels.benchmarks.timing import QUICK, measure, measure_copy
from lingbot_kernels.ring import RingPosition
from lingbot_kernels.triton import _rows
from lingbot_kernels.triton import gated_residual as gated
from lingbot_kernels.triton import gated_residual_camera_norm as camera
from lingbot_kernels.triton import layer_norm_modulate as modulate
from lingbot_kernels.triton import qk_norm_rope_kv_write as prologue
from lingbot_kernels.triton import qk_norm_rope_pack as packing
from lingbot_kernels.triton import qkv_unpack_kv_write as unpacking
from lingbot_kernels.triton import residual_norm_modulate as residual
from lingbot_kernels.triton import rms_norm as rms
from lingbot_kernels.triton import rope_cos_sin as table

EPS, THETA, FRAME, WIDTH, RANKS, HEAD_DIM, SINK = 1e-6, 1e4, 1508, 52, 4, 128, 7
SHAPES = [(4524, 5120), (1131, 5120), (4524, 1536), (1131, 1536)]
BF16 = torch.bfloat16
Tensors = Sequence[torch.Tensor]


@dataclass
class TuningCase:
    """One op at one shape: `inputs()` and `outputs()` make fresh tensors, `expected` gives what outputs must hold."""

    inputs: Callable[[], Tensors]
    outputs: Callable[[], Tensors]
    launch: Callable[[Tensors, Tensors, Any], None]
    expected: Callable[[Tensors, Tensors], Tensors]
    configs: dict[str, Any]
    bytes: int  # that must be read and written, per-channel vectors left out


def row_variants(
    length: int, shipped: _rows.RowConfig, make: Callable[[int | None], _rows.RowConfig], split: bool = False
) -> dict[str, Any]:
    """What is launched unasked; then warps a row, rows a program, cache hints; for q, k, v programs of their own."""
    default = make(None)
    variants = {"shipped": shipped, "default": default}
    for warps in (1, 2, 4, 8):
        if length > 12 * make(warps).chunk:  # more vectors a thread than its registers can hold
            continue
        variants[f"w{warps}"] = make(warps)
        if split:
            variants[f"w{warps} split"] = dataclasses.replace(make(warps), split=True)
    variants["plain"] = dataclasses.replace(default, streaming=False)
    for rows in (2, 4):
        variants[f"rows{rows}"] = dataclasses.replace(default, rows=rows)
        if split:
            variants[f"rows{rows} split"] = dataclasses.replace(default, rows=rows, split=True)
    if split:
        variants["plain split"] = dataclasses.replace(default, streaming=False, split=True)
    seen: dict[Any, str] = {}
    return {name: config for name, config in variants.items() if seen.setdefault(config, name) == name}


def make_case(op: str, tokens: int, dim: int, device: str) -> TuningCase:
    """The case of `op`, bf16 (or with a float32 residual stream where the name says so), batch 1."""
    heads = dim // HEAD_DIM
    r_dtype = torch.float32 if op.endswith("float32") else BF16
    row_bytes = tokens * dim * 2
    wide = row_bytes * r_dtype.itemsize // 2

    def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.full(shape, float("nan"), device=device, dtype=dtype)

    shipped_rms = rms.launch_config(dim, 2, tokens)
    words = row_variants(dim // 2, shipped_rms, lambda warps: _rows.word_config(dim, 2, warps))
    if op == "rope_cos_sin":
        configs = {
            f"w{warps} t{rows}": table.RopeCosSinConfig(warps, rows, HEAD_DIM // 2)
            for warps, rows in itertools.product((1, 2, 4), (2, 4, 8, 16))
        }
        return TuningCase(
            lambda: (),
            lambda: (empty(tokens, HEAD_DIM, dtype=torch.float32),),
            lambda i, o, c: table.rope_cos_sin(o[0], 1000 * FRAME, FRAME, WIDTH, THETA, config=c),
            lambda i, o: (
                reference.rope_cos_sin(tokens, 1000 * FRAME, FRAME, WIDTH, HEAD_DIM, THETA, device, dtype=o[0].dtype),
            ),
            {"shipped": table.launch_config(HEAD_DIM), **configs},
            tokens * HEAD_DIM * 4,
        )
    if op in ("qk_norm_rope_kv_write", "k_norm_rope_kv_write", "qk_norm_rope_pack"):
        full = op != "k_norm_rope_kv_write"
        cos_sin = reference.rope_cos_sin(tokens, 1000 * FRAME, FRAME, WIDTH, HEAD_DIM, THETA, device)

        def inputs() -> Tensors:
            return (random(1, tokens, 3, dim), random(2, dim))

        shipped = prologue.launch_config(dim, 2, tokens, full)
        if op == "qk_norm_rope_pack":
            shipped = packing.launch_config(dim, 2, tokens)
        configs = row_variants(dim // 2, shipped, lambda warps: _rows.word_config(dim, 2, warps), split=True)
        if op == "qk_norm_rope_pack":
            return TuningCase(
                inputs,
                lambda: (empty(RANKS, tokens, 1, 3, heads // RANKS, HEAD_DIM),),
                lambda i, o, c: packing.qk_norm_rope_pack(
                    *i[0].unbind(2), i[1][0], i[1][1], cos_sin, o[0], EPS, config=c
                ),
                lambda i, o: (
                    reference.qk_norm_rope_pack(*i[0].unbind(2), i[1][0], i[1][1], cos_sin.to(i[0].dtype), RANKS, EPS),
                ),
                configs,
                6 * row_bytes,
            )

        def launch(i: Tensors, o: Tensors, c: Any) -> None:
            q, k, v = i[0].unbind(2)
            q, q_weight, q_out = (q, i[1][0], o[2]) if full else (None, None, None)
            prologue.qk_norm_rope_kv_write(
                q, k, v, q_weight, i[1][1], cos_sin, q_out, o[0], o[1], 5 * tokens, None, SINK, EPS, config=c
            )

        def expected(i: Tensors, o: Tensors) -> Tensors:
            q, k, v = i[0].unbind(2)
            ring, rotation = RingPosition(5 * tokens, SINK), cos_sin.to(k.dtype)
            if not full:
                reference.k_norm_rope_kv_write(k, v, i[1][1], rotation, o[0], o[1], ring, EPS)
                return (o[0], o[1])
            q_out = reference.qk_norm_rope_kv_write(q, k, v, i[1][0], i[1][1], rotation, o[0], o[1], ring, EPS)
            return (o[0], o[1], q_out)

        def outputs() -> Tensors:
            caches = (empty(1, 2 * tokens, heads, HEAD_DIM), empty(1, 2 * tokens, heads, HEAD_DIM))
            return (*caches, empty(1, tokens, dim)) if full else caches

        return TuningCase(inputs, outputs, launch, expected, configs, (6 if full else 4) * row_bytes)
    if op == "qkv_unpack_kv_write":
        own = heads // RANKS

        def unpacked(i: Tensors, o: Tensors) -> Tensors:
            reference.qkv_unpack_kv_write(i[0], o[0], o[1], RingPosition(5 * tokens, SINK))
            return o

        return TuningCase(
            lambda: (random(tokens, 1, 3, own, HEAD_DIM),),
            lambda: (empty(1, 2 * tokens, own, HEAD_DIM), empty(1, 2 * tokens, own, HEAD_DIM)),
            lambda i, o, c: unpacking.qkv_unpack_kv_write(i[0], o[0], o[1], 5 * tokens, None, SINK, config=c),
            unpacked,
            row_variants(
                dim // RANKS,
                unpacking.launch_config(dim // RANKS, 2, tokens),
                lambda warps: _rows.value_config(dim // RANKS, (2,), warps),
            ),
            4 * row_bytes // RANKS,
        )
    if op == "rms_norm":
        return TuningCase(
            lambda: (random(1, tokens, dim), random(dim)),
            lambda: (empty(1, tokens, dim),),
            lambda i, o, c: rms.rms_norm(i[0], i[1], o[0], EPS, config=c),
            lambda i, o: (reference.rms_norm(i[0], i[1], EPS),),
            words,
            2 * row_bytes,
        )
    sizes = (r_dtype.itemsize, 2)
    passes_of = {
        "layer_norm_modulate": modulate,
        "residual_norm_modulate": residual,
        "gated_residual_camera_norm": camera,
        "gated_residual": gated,
    }
    name = op.removesuffix(" float32")
    if name not in passes_of:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(OPS)}")
    shipped = passes_of[name].launch_config(dim, sizes, tokens)
    values = row_variants(dim, shipped, lambda warps: _rows.value_config(dim, sizes, warps))

    def passes() -> Tensors:
        x, delta = random(1, tokens, dim, dtype=r_dtype), random(1, tokens, dim)
        return (x, delta, *random(3, dim, dtype=torch.float32), random(2, dim), random(2, 1, tokens, dim))

    def both() -> Tensors:
        return (empty(1, tokens, dim, dtype=r_dtype), empty(1, tokens, dim))

    def as_t(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out if x.dtype == torch.float64 else out.to(BF16)

    if name == "layer_norm_modulate":
        return TuningCase(
            lambda: (random(1, tokens, dim, dtype=r_dtype), *random(2, dim, dtype=torch.float32)),
            lambda: (empty(1, tokens, dim),),
            lambda i, o, c: modulate.layer_norm_modulate(*i, o[0], EPS, config=c),
            lambda i, o: (as_t(reference.layer_norm_modulate(*i, EPS), i[0]),),
            values,
            row_bytes + wide,
        )
    if name == "residual_norm_modulate":
        return TuningCase(
            passes,
            both,
            lambda i, o, c: residual.residual_norm_modulate(i[0], i[1], i[2], i[3], i[4], *o, EPS, config=c),
            lambda i, o: reference.residual_norm_modulate(i[0], i[1], i[3], i[4], EPS, i[2]),
            values,
            2 * row_bytes + 2 * wide,
        )
    if name == "gated_residual_camera_norm":
        return TuningCase(
            passes,
            both,
            lambda i, o, c: camera.gated_residual_camera_norm(*i[:3], *i[6], *i[5], *o, EPS, config=c),
            lambda i, o: reference.gated_residual_camera_norm(*i[:3], *i[6], *i[5], EPS),
            values,
            4 * row_bytes + 2 * wide,
        )
    return TuningCase(
        lambda: passes()[:3],
        lambda: (empty(1, tokens, dim, dtype=r_dtype),),
        lambda i, o, c: gated.gated_residual(*i, o[0], config=c),
        lambda i, o: (reference.gated_residual(*i),),
        values,
        row_bytes + 2 * wide,
    )


OPS = [
    "rope_cos_sin",
    "qk_norm_rope_kv_write",
    "k_norm_rope_kv_write",
    "qk_norm_rope_pack",
    "qkv_unpack_kv_write",
    "rms_norm",
    "layer_norm_modulate",
    "residual_norm_modulate",
    "gated_residual_camera_norm",
    "gated_residual",
    "layer_norm_modulate float32",
    "residual_norm_modulate float32",
    "gated_residual_camera_norm float32",
    "gated_residual float32",
]


def shapes_of(op: str) -> list[tuple[int, int]]:
    return [shape for shape in SHAPES if op != "rope_cos_sin" or shape[1] == 5120]


def precompile(job: tuple[str, int, Any, int]) -> str:
    """Compile one configuration into Triton's cache, on the CPU; the registers it takes."""
    op, dim, config, arch = job
    torch.set_num_threads(1)
    case = make_case(op, 8, dim, "cpu")
    outputs = tuple(x[:, :128] if x.dim() == 4 else x for x in case.outputs())
    with recorded_launches() as launches:
        case.launch(case.inputs(), outputs, config)
    compiled = launches[0].compile(arch)
    return f"{compiled.registers}r" + (f" {compiled.spilled_bytes}B spilled" if compiled.spilled_bytes else "")


def failure(got: Tensors, plain: Tensors, exact: Tensors) -> str | None:
    """Why outputs are worse than the plain formulation's in the same dtype, or None. Poison must stay where it was."""
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if not torch.equal(g.isfinite(), e.isfinite()):
            return f"output {i}: {int((g.isfinite() != e.isfinite()).sum())} elements written or left wrongly"
        error, allowed = ((x.double() - e).nan_to_num_(0).norm() for x in (g, p))
        if error > 1.25 * allowed + 2e-7 * e.nan_to_num(0).norm():
            return f"output {i}: error {error:.3g}, the plain formulation's {allowed:.3g}"
    return None


def tune(op: str, tokens: int, dim: int, registers: dict[tuple[str, int, Any], str]) -> list[dict[str, Any]]:
    """Check and time every configuration of one case; prints its table."""
    case = make_case(op, tokens, dim, "cuda")
    torch.manual_seed(0)
    sets = max(2, min(40, 400_000_000 // case.bytes))  # several times the L2
    inputs = [case.inputs() for _ in range(sets)]
    outputs = [case.outputs() for _ in range(sets)]
    device = torch.device("cuda")
    copy = measure_copy(case.bytes, device, QUICK).p50_us

    def expected(dtype: torch.dtype | None) -> Tensors:
        widened = tuple(x if dtype is None else x.to(dtype) for x in inputs[0])
        blank = tuple(torch.full_like(x, float("nan"), dtype=dtype) for x in outputs[0])
        return case.expected(widened, blank)

    plain, exact = expected(None), expected(torch.float64)
    rows = []
    for variant, config in case.configs.items():
        for output in outputs[0]:
            output.fill_(float("nan"))
        case.launch(inputs[0], outputs[0], config)
        wrong = failure(outputs[0], plain, exact)
        row = {"op": op, "tokens": tokens, "dim": dim, "variant": variant, "config": dataclasses.asdict(config)}
        row |= {
            "registers": registers[op, dim, config],
            "copy_us": copy,
            "bytes": case.bytes,
            "gate": wrong or "ok",
        }
        if wrong is None:
            pairs = zip(inputs, outputs, strict=True)
            launches = [lambda i=i, o=o, c=config: case.launch(i, o, c) for i, o in pairs]
            row["us"] = measure(launches, device, QUICK).p50_us
        rows.append(row)
    print(f"\n{op}  S={tokens} D={dim}  {case.bytes / 1e6:.1f} MB  copy {copy:.1f} us")
    for row in sorted(rows, key=lambda row: row.get("us", float("inf"))):
        if "us" not in row:
            print(f"  {row['variant']:16} FAILED  {row['gate']}")
            continue
        speed = f"{row['us']:7.1f} us  {case.bytes / row['us'] / 1e6:5.2f} TB/s  {row['us'] / copy:5.2f} x copy"
        print(f"  {row['variant']:16} {speed}  {row['registers']}", flush=True)
    return rows


def main() -> int:
    """Compile everything on all cores, then check and time; returns 1 if any configuration was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--json", help="append one JSON object a configuration to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: nothing to time", file=sys.stderr)
        return 2
    began = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    jobs = list(
        dict.fromkeys(
            (op, dim, config, 10 * major + minor)
            for op in arguments.ops
            for tokens, dim in shapes_of(op)
            for config in make_case(op, tokens, dim, "cpu").configs.values()
        )
    )
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        registers = {job[:3]: text for job, text in zip(jobs, pool.map(precompile, jobs, chunksize=2), strict=True)}
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"{len(jobs)} configurations compiled in {time.monotonic() - began:.0f} s"
    )
    rows = [row for op in arguments.ops for shape in shapes_of(op) for row in tune(op, *shape, registers)]
    print(f"\n{time.monotonic() - began:.0f} s")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(any(row["gate"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
