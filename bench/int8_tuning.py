"""Times launch configurations of the int8 product and of the quantising passes, next to bf16, fp8 and a copy.

python bench/int8_tuning.py [--only products|passes] [--json FILE]: on an NVIDIA GPU. A configuration is timed only
after its sums equalled exact integer arithmetic, and its epilogue or codes were those of the reference in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton_aot import recorded_launches

from lingbot_kernels import reference
from lingbot_kernels.benchmarks.timing import Effort, measure, measure_copy, rotated_sets, wall_us
from lingbot_kernels.reference.rotate_quantize import padded_width
from lingbot_kernels.triton import (
    _rows,
    gated_residual_camera_norm_quantize,
    int8_linear,
    layer_norm_modulate_quantize,
    residual_norm_modulate_quantize,
    rotate_quantize,
)

BF16, EPS = torch.bfloat16, 1e-6
EFFORT = Effort(sample_us=1500.0, budget_us=15_000.0, min_samples=7, max_samples=12)
# name -> (N, K, activation)
PRODUCTS_14B = {
    "qkv": (15360, 5120, None), "o": (5120, 5120, None),
    "up": (13824, 5120, "gelu_tanh"), "down": (5120, 13824, None),
}  # fmt: skip
PRODUCTS_1_3B = {
    "qkv": (4608, 1536, None), "o": (1536, 1536, None),
    "up": (8960, 1536, "gelu_tanh"), "down": (1536, 8960, None),
}  # fmt: skip
PRODUCTS = [(name, rows, *shape) for rows in (4524, 2262, 1131) for name, shape in PRODUCTS_14B.items()]
PRODUCTS += [(name, rows, *shape) for rows in (4680, 1170) for name, shape in PRODUCTS_1_3B.items()]
EXACT = (200, 520, 384)  # rows, columns, depth of the check on integers: edges in every direction
# op, tokens, dim
PASSES = [("rotate_quantize", tokens, dim) for tokens in (4524, 2262, 1131) for dim in (5120, 13824)]
PASSES += [
    (op, tokens, 5120)
    for op in ("layer_norm_modulate_quantize", "residual_norm_modulate_quantize", "gated_residual_camera_norm_quantize")
    for tokens in (4524, 2262, 1131)
]
PASSES += [("rotate_quantize", 4680, 8960), ("rotate_quantize", 4680, 1536)]
PASSES += [("residual_norm_modulate_quantize", 4680, 1536)]
Row = dict[str, Any]


def product_configs() -> dict[str, int8_linear.LinearConfig]:
    """Configurations worth trying, by a name that says what they are."""
    make = int8_linear.LinearConfig
    wide, tall, pair = make(128, 256, 128, 8, 4), make(256, 128, 128, 8, 4), make(128, 128, 128, 4, 3)
    configs = [
        *(dataclasses.replace(wide, group_m=group) for group in (8, 16, 32)),
        *(dataclasses.replace(tall, group_m=group) for group in (4, 8, 16)),
        *(dataclasses.replace(pair, group_m=group) for group in (8, 16, 32)),
        make(128, 256, 128, 8, 3, group_m=16),
        make(128, 128, 256, 8, 3),
        make(128, 128, 256, 8, 3, group_m=16),
        make(64, 256, 128, 4, 2),
        make(64, 256, 128, 4, 4),
        make(64, 128, 128, 4, 4),
        make(64, 128, 256, 4, 4),
        make(128, 256, 128, 8, 4, group_m=16, tma=False),
    ]
    return {describe(config): config for config in configs}


def describe(config: int8_linear.LinearConfig) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    source = [] if config.tma else ["pointers"]
    return " ".join([tile, f"w{config.num_warps}", f"s{config.num_stages}", f"g{config.group_m}", *source])


def pass_configs(dim: int) -> dict[str, _rows.RowConfig]:
    """Warps, elements a thread, rows a program, cache hints."""
    configs = {}
    for warps in (2, 4, 8, 16):
        for vector in (4, 8):
            chunk = 32 * warps * vector
            if chunk < 2 * dim and dim <= 8 * chunk * (2 if vector == 4 else 1):
                configs[f"w{warps} v{vector}"] = _rows.RowConfig(warps, chunk, streaming=False)
    for name, config in list(configs.items()):
        if name.endswith("v8"):
            configs[f"{name} streamed"] = dataclasses.replace(config, streaming=True)
            configs[f"{name} rows2"] = dataclasses.replace(config, rows=2)
    return configs


def product_operands(rows: int, columns: int, depth: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, x_scale, w, w_scale, bias: normal values as the passes quantise them, the result's spread about one."""
    bias = torch.randn(columns, device=device, dtype=BF16)
    x, x_scale = quantized(1, rows, depth, device)
    w, w_scale = quantized(1, columns, depth, device)
    return x, x_scale, w[0], w_scale[0] / depth**0.5, bias


def quantized(batch: int, rows: int, depth: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal values as codes and scales: what a multiprocessor can do depends on the bits that toggle."""
    values = torch.randn(batch, rows, depth, device=device)
    scale = values.abs().amax(-1) / 127
    return (values / scale.unsqueeze(-1)).round().to(torch.int8), scale


def launch_product(
    operands: Sequence[torch.Tensor], activation: str | None, config: int8_linear.LinearConfig | None
) -> torch.Tensor:
    x, x_scale, w, w_scale, bias = operands
    y = torch.empty(*x.shape[:2], w.shape[0], dtype=BF16, device=x.device)
    int8_linear.int8_linear(x, x_scale, w, w_scale, bias, activation, y, config=config)
    return y


def launch_exact(operands: Sequence[torch.Tensor], config: int8_linear.LinearConfig) -> torch.Tensor:
    """The sums themselves, in float32, which holds them: they stay below 2**24."""
    x, x_scale, w, w_scale, _ = operands
    y = torch.empty(*x.shape[:2], w.shape[0], dtype=torch.float32, device=x.device)
    int8_linear.int8_linear(x, torch.ones_like(x_scale), w, torch.ones_like(w_scale), None, None, y, config=config)
    return y


def make_pass(op: str, tokens: int, dim: int, device: str) -> tuple[Callable[..., None], Callable[[], Any], int]:
    """(launch(config=), check(), bytes read and written) on inputs and outputs of their own.

    check() gives codes and scale in float64, then those that the launch wrote.
    """
    x, delta, cam_scale, cam_shift = torch.randn(4, 1, tokens, dim, device=device, dtype=BF16).unbind(0)
    shift, scale, gate = torch.randn(3, dim, device=device).unbind(0)
    weight, bias = torch.randn(2, dim, device=device, dtype=BF16).unbind(0)
    signs = (2 * torch.randint(0, 2, (padded_width(dim),), device=device) - 1).to(torch.int8)
    codes = torch.full((1, tokens, padded_width(dim)), -128, dtype=torch.int8, device=device)
    row_scale = torch.full((1, tokens), float("nan"), device=device)
    x_out = torch.full_like(x, float("nan"))
    row, out = tokens * dim * 2, (codes, row_scale)
    nbytes = row // 2 + 4 * tokens

    def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.double() for t in tensors]

    if op == "rotate_quantize":
        launch = partial(rotate_quantize.rotate_quantize, x, signs, True, *out)
        return launch, lambda: (*reference.rotate_quantize(x.double(), signs), *out), nbytes + row
    if op == "layer_norm_modulate_quantize":
        launch = partial(
            layer_norm_modulate_quantize.layer_norm_modulate_quantize, x, shift, scale, signs, True, *out, EPS
        )
        nbytes += row
    elif op == "residual_norm_modulate_quantize":
        launch = partial(
            residual_norm_modulate_quantize.residual_norm_modulate_quantize,
            x, delta, gate, shift, scale, signs, True, x_out, *out, EPS,
        )  # fmt: skip
        nbytes += 3 * row
    else:
        launch = partial(
            gated_residual_camera_norm_quantize.gated_residual_camera_norm_quantize,
            x, delta, gate, cam_scale, cam_shift, weight, bias, signs, True, x_out, *out, EPS,
        )  # fmt: skip
        nbytes += 5 * row

    def check() -> tuple[torch.Tensor, ...]:
        if op == "gated_residual_camera_norm_quantize":
            nothing = (torch.zeros_like(x, dtype=torch.float64), None, None, None)
            operands = (*nothing, *double(weight, bias), EPS, signs)
            return *reference.gated_residual_camera_norm_quantize(x_out.double(), *operands)[1:], *out
        normed = x if op == "layer_norm_modulate_quantize" else x_out
        return *reference.layer_norm_modulate_quantize(*double(normed, shift, scale), EPS, signs), *out

    return launch, check, nbytes


def precompile(job: tuple[Any, ...]) -> tuple[str, str]:
    """Compile one configuration into Triton's cache, on the CPU; what it takes."""
    torch.set_num_threads(1)
    kind, arch, *case = job
    with recorded_launches() as launches:
        if kind == "exact":
            launch_exact(product_operands(*EXACT, "cpu"), case[0])
        elif kind == "product":
            columns, depth, activation, config = case
            launch_product(product_operands(8, columns, depth, "cpu"), activation, config)
        else:
            op, dim, config = case
            make_pass(op, 8, dim, "cpu")[0](config=config)
    try:
        compiled = launches[0].compile(arch)
    except Exception as error:
        return repr(job), f"does not compile: {' '.join(str(error).split())[:160]}"
    spilled = f" {compiled.spilled_bytes}B spilled" if compiled.spilled_bytes else ""
    return repr(job), f"{compiled.registers}r{spilled}"


@functools.cache
def wrong_sums(config: int8_linear.LinearConfig) -> str | None:
    """Whether the configuration's sums differ from integer arithmetic, at the edges of its tiles and saturated too."""
    operands = product_operands(*EXACT, "cuda")
    operands[0][:, ::7], operands[2][::5] = -128, -128
    got = launch_exact(operands, config)
    exact = (operands[0].cpu().long() @ operands[2].cpu().long().T).cuda()
    return None if torch.equal(got.long(), exact) else f"{int((got.long() != exact).sum())} sums are wrong"


def wrong_product(got: torch.Tensor, exact: torch.Tensor) -> str | None:
    """bf16's one rounding is at most 2**-8 of the value; float32 before it adds little."""
    bound = 1.01 * 2**-8 * exact.abs() + 1e-5 * exact.abs().max()
    bad = ((got.double() - exact).abs() > bound) | ~got.isfinite()
    return f"{int(bad.sum())} elements are off" if bad.any() else None


def tune_product(
    name: str, rows: int, columns: int, depth: int, activation: str | None, compiled: dict[str, str], arch: int
) -> list[Row]:
    """Check and time every configuration of one product; prints its table."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    nbytes = rows * depth + columns * depth + 2 * rows * columns
    sets = [product_operands(rows, columns, depth, "cuda") for _ in range(min(rotated_sets(nbytes, device), 6))]
    x, x_scale, w, w_scale, bias = sets[0]
    exact = reference.int8_linear(x, x_scale, w, w_scale, bias, activation, torch.float64)
    flops = 2 * rows * columns * depth
    base = {
        "bench": "int8_tuning", "op": "int8_linear", "case": name, "rows": rows, "columns": columns, "depth": depth
    }  # fmt: skip
    found: list[Row] = []

    def add(variant: str, calls: list[Callable[[], Any]], note: str = "", config: Any = None) -> None:
        try:
            us = measure(calls, device, EFFORT).p50_us
        except Exception as error:
            found.append({**base, "variant": variant, "gate": f"raised {type(error).__name__}: {str(error)[:120]}"})
            return
        found.append(
            {**base, "variant": variant, "gate": "ok", "us": us, "tflops": flops / us / 1e6, "note": note}
            | ({"config": dataclasses.asdict(config)} if config else {})
        )

    for variant, config in {"shipped": None, **product_configs()}.items():
        note = compiled.get(repr(("product", arch, columns, depth, activation, config)), "")
        try:
            wrong = (wrong_sums(config) if config else None) or wrong_product(
                launch_product(sets[0], activation, config), exact
            )
        except Exception as error:
            wrong = f"raised {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if wrong:
            found.append({**base, "variant": variant, "gate": wrong})
        else:
            add(variant, [partial(launch_product, one, activation, config) for one in sets], note, config)
    wall = wall_us([partial(launch_product, one, activation, None) for one in sets], device, 100.0)
    plain = [(torch.randn(rows, depth, device=device, dtype=BF16), torch.randn(columns, depth, device=device).to(BF16))
             for _ in sets]  # fmt: skip
    if activation:
        add("torch bf16", [partial(torch._addmm_activation, bias, a, b.t(), use_gelu=True) for a, b in plain])
    else:
        add("torch bf16", [partial(F.linear, a, b, bias) for a, b in plain])
    e4m3 = torch.float8_e4m3fn
    low = [(a.to(e4m3), b.to(e4m3).t()) for a, b in plain]
    scales = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    add(
        "torch fp8 rowwise, no activation" if activation else "torch fp8 rowwise",
        [partial(torch._scaled_mm, a, b, *scales, bias=bias, out_dtype=BF16, use_fast_accum=True) for a, b in low],
    )
    bf16_us = next((row["us"] for row in found if row["variant"] == "torch bf16" and "us" in row), float("nan"))
    print(f"\n{name} {columns} x {depth}, M = {rows}{', GELU' if activation else ''}; host {wall:.0f} us a call")
    show(found, lambda row: f"{row['tflops']:6.0f} TFLOP/s  {row['us'] / bf16_us:5.3f} x bf16  {row['note']}")
    return found


def tune_pass(op: str, tokens: int, dim: int, compiled: dict[str, str], arch: int) -> list[Row]:
    """Check and time every configuration of one pass; prints its table."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    nbytes = make_pass(op, 1, dim, "cuda")[2] * tokens
    cases = [make_pass(op, tokens, dim, "cuda") for _ in range(min(rotated_sets(nbytes, device), 12))]
    copy = measure_copy(nbytes, device, EFFORT).p50_us
    base = {"bench": "int8_tuning", "op": op, "rows": tokens, "dim": dim, "bytes": nbytes, "copy_us": copy}
    found: list[Row] = []
    for variant, config in {"shipped": None, **pass_configs(dim)}.items():
        launch, check, _ = cases[0]
        launch(config=config)
        codes, scale, got_codes, got_scale = check()
        apart = (codes.int() - got_codes.int()).abs()
        row: Row = {**base, "variant": variant, "note": compiled.get(repr(("pass", arch, op, dim, config)), "")}
        if apart.max() > 1 or apart.float().mean() > 1e-3 or not torch.allclose(scale, got_scale, rtol=1e-5, atol=0):
            found.append(
                {**row, "gate": f"{int((apart > 1).sum())} codes wrong, {float(apart.float().mean()):.2g} off"}
            )
            continue
        us = measure([partial(one[0], config=config) for one in cases], device, EFFORT).p50_us
        settings = {"config": dataclasses.asdict(config)} if config else {}
        found.append({**row, "gate": "ok", "us": us, "tbps": nbytes / us / 1e6, "ratio": us / copy, **settings})
    print(f"\n{op} S={tokens} D={dim}  {nbytes / 1e6:.1f} MB, copy {copy:.1f} us")
    show(found, lambda row: f"{row['tbps']:5.2f} TB/s  {row['ratio']:5.3f} x copy  {row['note']}")
    return found


def show(rows: list[Row], tail: Callable[[Row], str]) -> None:
    for row in sorted(rows, key=lambda row: row.get("us", float("inf"))):
        speed = f"{row['us']:8.1f} us  {tail(row)}" if "us" in row else f"FAILED  {row['gate']}"
        print(f"  {row['variant']:38} {speed}", flush=True)


def jobs_for(only: str | None, arch: int) -> list[tuple[Any, ...]]:
    """What is to be compiled, each once."""
    jobs: list[tuple[Any, ...]] = []
    if only != "passes":
        jobs += [("exact", arch, config) for config in product_configs().values()]
        jobs += [
            ("product", arch, columns, depth, activation, config)
            for _, _, columns, depth, activation in PRODUCTS
            for config in product_configs().values()
        ]
    if only != "products":
        jobs += [("pass", arch, op, dim, config) for op, _, dim in PASSES for config in pass_configs(dim).values()]
    return list({repr(job): job for job in jobs}.values())


def main() -> int:
    """Compile everything on all cores, then check and time; returns 1 if any configuration was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["products", "passes"])
    parser.add_argument("--json", type=Path, help="append one JSON object a configuration to this file")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further case after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: nothing to time", file=sys.stderr)
        return 2
    began = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    jobs = jobs_for(arguments.only, arch)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        compiled = dict(pool.map(precompile, jobs, chunksize=2))
    gpu = torch.cuda.get_device_name()
    print(
        f"{gpu}, torch {torch.__version__}, triton {triton.__version__}; "
        f"{len(jobs)} configurations compiled in {time.monotonic() - began:.0f} s"
    )
    for job, text in compiled.items():
        if "spilled" in text or "not compile" in text:
            print(f"  {job}: {text}")
    cases: list[Callable[[], list[Row]]] = []
    if arguments.only != "passes":
        cases += [partial(tune_product, *case, compiled=compiled, arch=arch) for case in PRODUCTS]
    if arguments.only != "products":
        cases += [partial(tune_pass, *case, compiled=compiled, arch=arch) for case in PASSES]
    rows: list[Row] = []
    for i, case in enumerate(cases):
        if time.monotonic() - began > arguments.seconds:
            print(f"\n{len(cases) - i} cases left out: {arguments.seconds:.0f} s are over")
            break
        found = case()
        rows += found
        if arguments.json:
            with arguments.json.open("a") as file:
                file.writelines(json.dumps({"gpu": gpu, **row}) + "\n" for row in found)
        torch.cuda.empty_cache()
    print(f"\n{time.monotonic() - began:.0f} s")
    return int(any(row["gate"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
