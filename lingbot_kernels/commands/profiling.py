"""Runs and reports `lingbot-kernels profile`: a steady chunk or an op under torch.profiler, and under nsys.

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
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lingbot_kernels import nvtx, plots
from lingbot_kernels.benchmarks.cases import CASES, default_cases
from lingbot_kernels.benchmarks.problems import Problem, problems
from lingbot_kernels.commands import environment, tables, trace_report
from lingbot_kernels.commands._click import blame
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.session import (
    CameraOptions,
    chunk_inputs,
    load_prompt,
    make_camera,
    make_model,
    make_schedule,
    pick_device,
    video_size,
)
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops import BackendUnavailable, use_backend
from lingbot_kernels.ops._dispatch import OPS, requested_backend
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

LEFT_TO_LIBRARIES = ("windowed_attention", "linear_gelu")


@dataclass(frozen=True)
class ProfileOptions:
    session: SessionOptions
    what: str
    name: str | None
    case: str | None
    calls: int
    chunks: int
    no_camera: bool
    nsys: bool | None
    under_nsys: bool
    trace_path: Path
    json_path: Path | None
    plot_path: Path | None


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


def run(options: ProfileOptions) -> None:
    """The command: warm up, record, print, write."""
    if options.plot_path is not None:
        try:
            plots.require()
        except ImportError as error:
            raise click.UsageError(f"--plot: {error}") from error
    device = pick_device(options.session.device)
    nsys = _nsys(options, device)
    backend = options.session.backend
    chosen = contextlib.nullcontext() if backend is None else use_backend(backend)
    with chosen, blame("--backend", BackendUnavailable):
        subject = _rollout(options) if options.what == "rollout" else _op(options, device)
        subject.run()
        if options.under_nsys:
            _record_for_nsys(subject)
            return
        trace = _record(subject.run, device, options.trace_path)
        replayed = None
        if subject.replay is not None:
            subject.replay()
            replayed = trace_report.idle_share(_record(subject.replay, device, None))
    report = make_report(subject, trace, replayed)
    print_report(tables.console(), report)
    click.echo(f"\ntrace: {options.trace_path} (open it in https://ui.perfetto.dev or chrome://tracing)")
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot_path is not None:
        plot_report(report, options.plot_path)
    if nsys is not None:
        _run_nsys(nsys, options.trace_path.with_suffix(".nsys-rep"))


def _rollout(options: ProfileOptions) -> Subject:
    """A session whose window is full, and its next chunks."""
    session = options.session
    model, schedule = make_model(session), make_schedule(session)
    cfg, size = model.config, video_size(session, model.config)
    fill = -(-cfg.window_frames // cfg.frames_per_chunk) + 1
    frames = (fill + 4 * options.chunks + 4) * cfg.frames_per_chunk
    camera = make_camera(CameraOptions(no_camera=options.no_camera), cfg, frames)
    text = load_prompt(None, model, session.seed)
    stage, state = CausalDenoisingStage(model, schedule=schedule), RealtimeCausalDiTState()
    inputs = chunk_inputs(model, schedule, size, camera, session.seed)

    def chunks(count: int, graphs: bool) -> None:
        model.cuda_graphs = graphs
        for _ in range(count):
            chunk = next(inputs)
            stage.denoise_chunk(state, chunk.noise, text=text, camera=chunk.camera, renoise=chunk.renoise)

    chunks(fill, graphs=False)
    assert state.kv_cache is not None
    frame_tokens = state.kv_cache.layout.frame_tokens
    tokens = cfg.frames_per_chunk * frame_tokens
    preset = session.preset or ("tiny" if session.checkpoint is None else session.checkpoint.name)
    return Subject(
        "rollout", f"{preset}, {size[0]}x{size[1]}, {options.chunks} chunk{'s' * (options.chunks > 1)}", model.device,
        model.dtype, tokens, lambda: chunks(options.chunks, graphs=False),
        (lambda: chunks(2 + options.chunks, graphs=True)) if model.device.type == "cuda" else None,
        _bytes_of_a_call(model, tokens, cfg.window_frames * frame_tokens, camera is not None),
    )  # fmt: skip


def _bytes_of_a_call(
    model: CausalLingBotTransformer, tokens: int, visible: int, camera: bool
) -> Callable[[str, str], int]:
    """(op, phase) -> activations that one call reads and writes once; weights only where they are the larger part."""
    cfg, width = model.config, model.dtype.itemsize
    wide, whole = model.residual_dtype.itemsize, tokens * cfg.dim
    table = {
        "rope_cos_sin": tokens * cfg.head_dim * 4,
        "qk_norm_rope_kv_write": 6 * whole * width,
        "k_norm_rope_kv_write": 4 * whole * width,
        "rms_norm": 2 * whole * width,
        "layer_norm_modulate": whole * (wide + width),
        "residual_norm_modulate": whole * (2 * wide + 2 * width),
        "gated_residual_camera_norm": whole * (2 * wide + (4 if camera else 2) * width),
        "gated_residual": whole * (2 * wide + width),
        "linear_gelu": (tokens * (cfg.dim + cfg.ffn_dim) + cfg.dim * cfg.ffn_dim) * width,
    }

    def of(op: str, phase: str) -> int:
        if op == "windowed_attention":
            return 2 * (tokens + (cfg.text_len if phase == "cross_attn" else visible)) * cfg.dim * width
        return table[op]

    return of


def _op(options: ProfileOptions, device: torch.device) -> Subject:
    """Calls of one op on the bench's inputs, a fresh set for each of a few calls."""
    name = options.name
    assert name is not None
    if name not in OPS:
        raise click.BadParameter(f"no op {name!r}; there are {', '.join(OPS)}.", param_hint="NAME")
    case_name = options.case or default_cases(device.type, quick=True)[0]
    if case_name not in CASES:
        raise click.BadParameter(f"no case {case_name!r}; there are {', '.join(CASES)}.", param_hint="--case")
    dtype = getattr(torch, options.session.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    found: list[Problem] = [p for p in problems(CASES[case_name], dtype) if p.op == name]
    if not found:
        raise click.BadParameter(f"{case_name!r} has no problem for {name}.", param_hint="--case")
    problem = found[0]
    torch.manual_seed(options.session.seed)
    backend = "auto" if name in LEFT_TO_LIBRARIES else requested_backend()
    thunks = [problem.bind(problem.make(device), backend) for _ in range(min(4, options.calls))]

    if name == "linear_gelu":  # a plain function, without a range of its own
        thunks = [nvtx.ranged(name)(thunk) for thunk in thunks]

    def calls() -> None:
        for i in range(options.calls):
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(run: Callable[[], None], device: torch.device, path: Path | None) -> dict[str, Any]:
    """Run once under torch.profiler, with ranges; the trace, kept in `path` where one is given."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    _synchronize(device)
    with _ranges(), profile(activities=activities) as recorded:
        run()
        _synchronize(device)
    target = path or Path(f"{Path.cwd()}/.profile-{id(recorded)}.json")
    try:
        recorded.export_chrome_trace(str(target))
        trace: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    finally:
        if path is None:
            target.unlink(missing_ok=True)
    return trace


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
        "environment": environment.collect(),
        "device": environment.device_name(subject.device),
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


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Two tables and what is said in a line."""
    gpu = report["gpu_idle_share"] is not None
    times = ("host ms", "GPU ms", "launches") if gpu else ("ms",)

    def cells(row: dict[str, Any]) -> list[str]:
        host = f"{row['host_us'] / 1e3:.3f}"
        return [host, f"{row['gpu_us'] / 1e3:.3f}", str(row["launches"])] if gpu else [host]

    console.print(
        f"{report['what']}: {report['case']}, {report['dtype']}, {report['tokens']} tokens, {report['device']}"
    )
    if report["phases"]:
        table = _table("Phases (totals)", "phase", "calls", *times)
        for name, row in report["phases"].items():
            table.add_row(name, str(row["calls"]), *cells(row))
        console.print(table)
    table = _table("Ops (totals; bytes of a call)", "op", "in", "calls", *times, "us a call", "MB", "TB/s")
    for row in report["ops"]:
        call = (row["gpu_us"] if gpu else row["host_us"]) / row["calls"]
        rate = "-" if row["tbps"] is None else f"{row['tbps']:.3g}"
        table.add_row(
            row["op"], row["phase"] or "-", str(row["calls"]), *cells(row), f"{call:.1f}",
            f"{row['bytes'] / 1e6:.2f}", rate,
        )  # fmt: skip
    console.print(table)
    if report["launches_per_block"] is not None:
        each = report["launches_per_block"]
        console.print(
            f"launches a block: {each['all']:.1f}, of which {each['outside']:.1f} are neither products nor attention, "
            f"{each['own']:.1f} of these the library's own"
        )
    if gpu:
        console.print(f"GPU idle: {report['gpu_idle_share']:.1%} of the recorded time, launching every kernel")
    if report["gpu_idle_share_graphs"] is not None:
        console.print(f"GPU idle: {report['gpu_idle_share_graphs']:.1%} replaying CUDA graphs")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column == "in" else "right", no_wrap=True)
    return table


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Bars: time of each phase and of each op; the ops' TB/s beside theirs."""
    plots.require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clock = "host_us" if report["gpu_idle_share"] is None else "gpu_us"
    groups = [(name, row[clock] / 1e3, "") for name, row in report["phases"].items()]
    ops = [
        (f"{row['op']}{' in ' + row['phase'] if row['phase'] else ''}", row[clock] / 1e3,
         "" if row["tbps"] is None else f" {row['tbps']:.3g} TB/s")
        for row in report["ops"]
    ]  # fmt: skip
    panels = [(title, bars) for title, bars in (("phases", groups), ("ops", ops)) if bars]
    figure = Figure(figsize=(6.5 * len(panels), 1.2 + 0.3 * max(len(bars) for _, bars in panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color="C0")
        axes.bar_label(drawn, [f"{value:.2f} ms{note}" for _, value, note in bars], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_title(f"{title}, milliseconds in all", fontsize=10)
    figure.suptitle(f"{report['what']}: {report['case']}, {report['dtype']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _nsys(options: ProfileOptions, device: torch.device) -> str | None:
    """The path of nsys where it is to be run."""
    found = shutil.which("nsys")
    if options.nsys and (found is None or device.type != "cuda"):
        missing = "nsys is not on PATH" if found is None else f"nsys records CUDA work, and the device is {device}"
        raise click.UsageError(f"--nsys: {missing}.")
    wanted = options.nsys if options.nsys is not None else device.type == "cuda"
    return found if wanted and not options.under_nsys else None


def _record_for_nsys(subject: Subject) -> None:
    _synchronize(subject.device)
    with _ranges():
        torch.cuda.profiler.start()
        subject.run()
        _synchronize(subject.device)
        torch.cuda.profiler.stop()


def nsys_command(nsys: str, output: Path, arguments: list[str]) -> list[str]:
    """What records `python -m lingbot_kernels <arguments>` between cudaProfilerStart and Stop."""
    return [
        nsys, "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx",
        "--sample=none", "--cpuctxsw=none", "--force-overwrite=true", f"--output={output.with_suffix('')}",
        sys.executable, "-m", "lingbot_kernels", *arguments,
    ]  # fmt: skip


def _run_nsys(nsys: str, output: Path) -> None:
    """The same command once more, under nsys."""
    done = subprocess.run(nsys_command(nsys, output, [*sys.argv[1:], "--under-nsys"]), check=False)
    if done.returncode != 0:
        raise click.ClickException(f"nsys ended with exit code {done.returncode}")
    click.echo(f"nsys: {output}")
