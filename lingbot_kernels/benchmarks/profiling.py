"""A steady chunk or an op under torch.profiler, and under nsys.

The report (`--json`) is one object:

- environment, device, what ("rollout" or an op's name), case, dtype, tokens (of a chunk, or the op's).
- phases: name -> calls, host_us, gpu_us, launches: forwards of the chunk, then the parts of a forward over all of them.
- ops: a list of op, phase, calls, host_us, gpu_us, launches (totals), bytes (of a call: activations read and written
  once) and tbps (achieved, by GPU time, on a CPU by the host's; None where there is none).
- launches_per_block: all, own (of the library's ops), outside (neither products nor attention), means; None without a
  GPU.
- gpu_idle_share: of the recorded chunks; gpu_idle_share_graphs: of chunks that replay graphs; None without a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from lingbot_kernels import nvtx
from lingbot_kernels.benchmarks import environment, timeline, trace_report
from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.op_bytes import op_bytes
from lingbot_kernels.benchmarks.problems import problems
from lingbot_kernels.benchmarks.scene import Scene, SceneSession, chunks_of_a_window
from lingbot_kernels.benchmarks.timing import settle
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops._dispatch import OPS, requested_backend
from lingbot_kernels.quantization import product_shapes
from lingbot_kernels.reference.rotate_quantize import padded_width

LEFT_TO_LIBRARIES = ("windowed_attention", "linear_gelu")


@dataclass(frozen=True)
class Subject:
    """What is profiled.

    Attributes:
        run: does it once, eagerly; `replay` with CUDA graphs, None where there are none.
        op_bytes: (op, phase) -> bytes of a call.
    """

    what: str
    case: str
    device: torch.device
    dtype: torch.dtype
    tokens: int
    run: Callable[[], None]
    replay: Callable[[], None] | None
    op_bytes: Callable[[str, str], int]


def measure(subject: Subject, keep: Callable[[Path], object]) -> dict[str, Any]:
    """Run the subject once under torch.profiler, and once more with CUDA graphs where it has them; the report.

    Args:
        keep: called with the file of the first run's Chrome trace, which is gone afterwards.
    """
    trace = _record(subject.run, subject.device, keep)
    idle_replayed = None
    if subject.replay is not None:
        subject.replay()
        idle_replayed = trace_report.idle_share(_record(subject.replay, subject.device))
    return make_report(subject, trace, idle_replayed)


def rollout_chunks(cfg: LingBotConfig, chunks: int) -> int:
    """Chunks that the camera's path is made for, where `chunks` of them are recorded."""
    return chunks_of_a_window(cfg) + 4 * chunks + 5


def rollout_subject(scene: Scene, chunks: int) -> Subject:
    """A session whose window is full, and its next `chunks` chunks."""
    model, cfg, inputs = scene.model, scene.model.config, scene.inputs()
    session = SceneSession(scene)

    def roll(count: int, graphs: bool) -> None:
        model.cuda_graphs = graphs
        for _ in range(count):
            session.chunk(next(inputs))

    roll(chunks_of_a_window(cfg) + 1, graphs=False)
    name = scene.preset or Path(str(scene.checkpoint)).name
    return Subject(
        "rollout", f"{name}, {scene.size[0]}x{scene.size[1]}, {chunks} chunk{'s' * (chunks > 1)}", model.device,
        model.dtype, scene.chunk_tokens, lambda: roll(chunks, graphs=False),
        (lambda: roll(2 + chunks, graphs=True)) if model.device.type == "cuda" else None,
        _bytes_of_a_call(model, scene.chunk_tokens, cfg.window_frames * scene.frame_tokens, scene.camera is not None),
    )  # fmt: skip


def _bytes_of_a_call(
    model: CausalLingBotTransformer, tokens: int, visible: int, camera: bool
) -> Callable[[str, str], int]:
    """(op, phase) -> activations that one call reads and writes once; weights only where they are the larger part."""
    cfg, width = model.config, model.dtype.itemsize
    sizes = {"residual": model.residual_dtype.itemsize, "heads": cfg.num_heads, "hidden": cfg.ffn_dim}

    def of(op: str, phase: str) -> int:
        if op in ("int8_linear", "rotate_quantize"):
            return _bytes_of_a_product(model, tokens, op, phase)
        seen = cfg.text_len if op == "windowed_attention" and phase == "cross_attn" else visible
        dim = cfg.head_dim if op == "rope_cos_sin" else cfg.dim
        return op_bytes(op, tokens, dim, width, **sizes, visible=seen, camera=camera)

    return of


# Phase -> the products in it; what is outside of a block's phases is the camera's.
_PRODUCTS_OF = {
    "self_attn": ("qkv", "self_o"),
    "cross_attn": ("cross_q", "cross_o"),
    "ffn": ("ffn_up", "ffn_down"),
}
_FROM_A_PASS = ("qkv", "cross_q", "ffn_up")  # their rows leave the pass before them as codes


def _bytes_of_a_product(model: CausalLingBotTransformer, tokens: int, op: str, phase: str) -> int:
    """Mean over the phase's calls: its int8 products, weights included, or the rows that no pass made codes of."""
    cfg, recipe, width = model.config, model.recipe, model.dtype.itemsize
    assert recipe is not None
    moved = []
    for product in _PRODUCTS_OF.get(phase, ("camera",)):
        if op == "rotate_quantize" and product in _FROM_A_PASS:
            continue
        count = sum(recipe.has(block, product) for block in range(cfg.num_layers))
        for rows, columns in product_shapes(cfg)[product]:
            codes = tokens * (padded_width(columns) + 4)
            if op == "rotate_quantize":
                each = op_bytes(op, tokens, columns, width)
            else:
                each = codes + rows * (padded_width(columns) + 4) + tokens * rows * width
            moved += [each] * count
    return round(statistics.mean(moved))


def op_subject(name: str, case: KernelCase, device: torch.device, dtype: torch.dtype, count: int, seed: int) -> Subject:
    """`count` calls of one op on the kernel bench's inputs, a fresh set for each of a few calls.

    Raises:
        ValueError: the op isn't measured in this case.
    """
    found = [problem for problem in problems(case, dtype) if problem.op == name]
    if not found:
        raise ValueError(f"{case.name!r} has no problem for {name}.")
    problem = found[0]
    torch.manual_seed(seed)
    backend = "auto" if name in LEFT_TO_LIBRARIES else requested_backend()
    thunks = [problem.bind(problem.make(device), backend) for _ in range(min(4, count))]

    if name == "linear_gelu":  # a plain function, without a range of its own
        thunks = [nvtx.ranged(name)(thunk) for thunk in thunks]

    def calls() -> None:
        for i in range(count):
            thunks[i % len(thunks)]()

    return Subject(
        name, problem.case, device, problem.dtype, problem.tokens, calls, None, lambda op, phase: problem.bytes
    )  # fmt: skip


@contextlib.contextmanager
def _ranges() -> Iterator[None]:
    before = nvtx.enabled()
    nvtx.enable()
    try:
        yield
    finally:
        nvtx.enable(before)


def _record(
    run: Callable[[], None], device: torch.device, keep: Callable[[Path], object] = lambda file: None
) -> dict[str, Any]:
    """The trace of a run, with ranges; `keep` is shown its file."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _ranges():
        return timeline.record_trace(run, device, activities, keep)


def make_report(subject: Subject, trace: dict[str, Any], idle_replayed: float | None) -> dict[str, Any]:
    """The report of a recorded run; its keys are in the module's docstring."""
    ranges = trace_report.read_ranges(trace)
    rows = []
    for (op, phase), held in trace_report.op_sums(ranges, OPS).items():
        size = subject.op_bytes(op, phase)
        busy = (held.gpu_us if subject.device.type == "cuda" else held.host_us) / held.calls
        tbps = size / busy / 1e6 if busy else None  # bytes / us = MB/s
        rows.append({"op": op, "phase": phase, **dataclasses.asdict(held), "bytes": size, "tbps": tbps})
    return {
        **environment.report_head(subject.device),
        "what": subject.what,
        "case": subject.case,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "tokens": subject.tokens,
        "phases": {name: dataclasses.asdict(held) for name, held in trace_report.phases(ranges).items()},
        "ops": rows,
        "launches_per_block": trace_report.block_launches(ranges, OPS, LEFT_TO_LIBRARIES),
        "gpu_idle_share": trace_report.idle_share(trace),
        "gpu_idle_share_graphs": idle_replayed,
    }


def record_for_nsys(subject: Subject) -> None:
    """Run the subject between cudaProfilerStart and Stop, with ranges: what `nsys_command`'s program does."""
    settle(subject.device)
    with _ranges():
        torch.cuda.profiler.start()
        subject.run()
        settle(subject.device)
        torch.cuda.profiler.stop()


def nsys_command(nsys: str, output: Path, arguments: list[str]) -> list[str]:
    """What records `python -m lingbot_kernels <arguments>` between cudaProfilerStart and Stop."""
    return [
        nsys, "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx",
        "--sample=none", "--cpuctxsw=none", "--force-overwrite=true", f"--output={output.with_suffix('')}",
        sys.executable, "-m", "lingbot_kernels", *arguments,
    ]  # fmt: skip
