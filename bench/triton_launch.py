"""Times what a call of a Triton op costs the host: with kernels kept by `_launch.py`, and by plain `kernel[grid](...)`.

python bench/triton_launch.py [--tokens N] [--batches N] [--calls N]: on an NVIDIA GPU, without CUDA graphs. Prints a
JSON line per op and launcher: microseconds of a call of the public function, the median over batches; the two launchers
take turns batch by batch. Few tokens, so that the GPU never has the host wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from lingbot_kernels import ops
from lingbot_kernels.triton import _launch

DIM, HEAD_DIM, EPS = 5120, 128, 1e-6
LAUNCHERS = {"kept": True, "plain": False}


def calls(tokens: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One call of each op at 14B width, bfloat16."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, delta, weight = randn(1, tokens, DIM), randn(1, tokens, DIM), randn(DIM)
    gate, shift, scale = (randn(DIM, dtype=torch.float32) for _ in range(3))
    q, k, v = randn(1, tokens, 3 * DIM).chunk(3, dim=-1)
    k_cache, v_cache = (randn(1, 4 * tokens, DIM // HEAD_DIM, HEAD_DIM) for _ in range(2))
    table = ops.rope_cos_sin(tokens, 0, tokens, 1, HEAD_DIM, 1e4, device)
    ring = ops.RingPosition(2 * tokens, tokens)
    caches = (k_cache, v_cache, ring, EPS)
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, EPS, backend="triton"),
        "residual_norm_modulate": lambda: ops.residual_norm_modulate(
            x, delta, shift, scale, EPS, gate, backend="triton"
        ),
        "qk_norm_rope_kv_write": lambda: ops.qk_norm_rope_kv_write(
            q, k, v, weight, weight, table, *caches, backend="triton"
        ),
    }


def microseconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Of a call, in a batch that finds the GPU idle and is timed until its last launch has been made."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def rows(tokens: int, batches: int, count: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every op by every launcher, in turns."""
    for op, call in calls(tokens, device).items():
        times: dict[str, list[float]] = {launcher: [] for launcher in LAUNCHERS}
        for batch in range(batches + 1):
            for launcher, _launch.use_compiled in LAUNCHERS.items():
                found = microseconds(call, count, device)
                if batch:  # the first compiles, and warms up
                    times[launcher].append(found)
        for launcher, found_us in times.items():
            yield {
                "op": op,
                "launcher": launcher,
                "case": f"s{tokens}-d{DIM}",
                "host_us": round(statistics.median(found_us), 2),
                "least_us": round(min(found_us), 2),
                "batches": batches,
                "calls": count,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--calls", type=int, default=100, help="of a batch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("triton_launch: no CUDA device is available")
    if not _launch.KNOWN_RELEASE:
        raise SystemExit(f"triton_launch: no kernel is kept with triton {triton.__version__}")
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    with torch.inference_mode():
        for row in rows(options.tokens, options.batches, options.calls, torch.device("cuda")):
            print(json.dumps({**row, **where}), flush=True)


if __name__ == "__main__":
    main()
