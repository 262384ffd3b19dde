"""A rollout with a record of every chunk: its times, its cache hits, what the session holds.

The report (`--json`) is one object:

- environment: see `environment.collect`; device: the name of what ran it.
- model: preset, checkpoint (one of them None), parameters, config (the fields of LingBotConfig).
- settings: device, ranks, dtype, backend, seed, chunks, height, width (pixels), tokens_per_frame, tokens_per_chunk,
  schedule (times, sigmas, noise_sigmas), camera ("poses", "actions", "made path" or None), camera_scale (None: running
  maximum), camera_cache, cuda_graphs (whether they may be used), prompt (file or "seeded noise").
- chunks: for each index, start_frame, inputs_ms, denoise_ms (a list, one a step), camera_ms (of the first step, its
  camera modulation; None where nothing of it is kept), context_ms, time_to_chunk_ms (inputs and denoising), total_ms
  (with the context update), visible_tokens, window_full, cache_hits and cache_misses (by store; of the chunk's
  forwards), cuda_graphs (captures and replays in its forwards), peak_memory_bytes (allocated at most on the GPU within
  the chunk; None without one), latents_rms.
- summary: first_chunk_ms (its time to chunk), steady_chunks (their indices), time_to_chunk_ms, denoise_step_ms,
  camera_ms (None as above), context_ms and total_ms (p20, p50, p80 over steady chunks), video_frames_per_chunk,
  frames_per_second (of video, by the median total), cache_bytes (by store, and total), cuda_graphs (captures and
  replays in all), peak_memory_bytes (of the GPU, or of the process), memory (planned: bytes by part, as
  `realtime.memory` tells from shapes before anything is allocated; and what a GPU had allocated, None without one:
  weights_bytes when they were there, first_chunk_bytes and steady_chunk_bytes at most within such chunks), backends (by
  op).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from lingbot_kernels import plots
from lingbot_kernels.commands import backends, environment, tables
from lingbot_kernels.commands._click import blame
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.measure import ChunkTimer, ChunkTimes, percentiles, steady
from lingbot_kernels.commands.session import (
    CameraOptions,
    CameraPath,
    ChunkInputs,
    chunk_inputs,
    load_prompt,
    make_camera,
    make_model,
    make_schedule,
    video_size,
)
from lingbot_kernels.models.camera import CELL, PIXEL_FRAMES_PER_LATENT
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops._dispatch import requested_backend
from lingbot_kernels.parallel import launch
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.memory import session_memory, weights_memory
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage
from lingbot_kernels.stages.schedule import Schedule


@dataclass(frozen=True)
class RolloutOptions:
    session: SessionOptions
    camera: CameraOptions
    chunks: int
    prompt_embeds: Path | None = None
    camera_cache: bool = True
    cuda_graphs: bool = True
    json_path: Path | None = None
    plot_path: Path | None = None
    save_latents: Path | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Chunk:
    """A denoised chunk with its inputs, clean latents, times, the session's counters before and after it, and the
    most that the GPU had allocated within it.
    """

    inputs: ChunkInputs
    latents: Tensor
    times: ChunkTimes
    before: dict[str, Any]
    after: dict[str, Any]
    peak_bytes: int | None


def timed_chunks(
    model: CausalLingBotTransformer,
    schedule: Schedule,
    state: RealtimeCausalDiTState,
    text: Tensor,
    inputs: Iterator[ChunkInputs],
    count: int,
) -> Iterator[Chunk]:
    """Denoise `count` chunks, each followed by its context update; on CUDA the host waits once a chunk."""
    timer = ChunkTimer(model.device)
    timer.watch(state)
    stage = CausalDenoisingStage(model, schedule=schedule, observe=timer.observe)
    on_gpu = model.device.type == "cuda"
    for _ in range(count):
        before = state.stats()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        timer.start()
        chunk = next(inputs)
        timer.inputs_ready()
        latents = stage.denoise_chunk(
            state, chunk.noise, text=text, camera=chunk.camera, renoise=chunk.renoise, update_context=False
        )
        timer.chunk_ready()
        stage.update_context(state, latents, text=text, camera=chunk.camera)
        times = timer.stop()
        peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
        yield Chunk(chunk, latents, times, before, state.stats(), peak)


def record(index: int, chunk: Chunk) -> dict[str, Any]:
    """The report's entry of a chunk."""
    stores = [name for name, counters in chunk.after.items() if isinstance(counters, dict) and "hits" in counters]
    return {
        "index": index,
        "start_frame": chunk.after["chunk_start_frame"],
        "inputs_ms": chunk.times.inputs,
        "denoise_ms": list(chunk.times.denoise),
        "camera_ms": chunk.times.camera,
        "context_ms": chunk.times.context,
        "time_to_chunk_ms": chunk.times.to_chunk,
        "total_ms": chunk.times.total,
        "visible_tokens": chunk.after["visible_tokens"],
        "window_full": chunk.after["visible_tokens"] == chunk.after["capacity_tokens"],
        **{
            f"cache_{kind}": {name: chunk.after[name][kind] - chunk.before[name][kind] for name in stores}
            for kind in ("hits", "misses")
        },
        "cuda_graphs": {
            kind: chunk.after["cuda_graphs"][kind] - chunk.before["cuda_graphs"][kind]
            for kind in ("captures", "replays")
        },
        "peak_memory_bytes": chunk.peak_bytes,
        "latents_rms": chunk.latents.double().square().mean().sqrt().item(),
    }


def cache_bytes(stats: dict[str, Any]) -> dict[str, int]:
    """Bytes by cache, of a session's `stats()`."""
    return {name: held["bytes"] for name, held in stats.items() if isinstance(held, dict) and "bytes" in held}


def planned_memory(
    options: RolloutOptions, model: CausalLingBotTransformer, size: tuple[int, int], camera: bool
) -> dict[str, int]:
    """Bytes by part that weights and session need, on this rank."""
    cfg = model.config
    session = session_memory(
        cfg, (size[0] // CELL // cfg.patch_size[1], size[1] // CELL // cfg.patch_size[2]), model.dtype,
        ranks=model.shard_group.ranks, camera=camera, camera_cache=options.camera_cache,
        time_entries=len(options.session.timesteps) + 1,
        cuda_graphs=options.cuda_graphs and model.device.type == "cuda",
    )  # fmt: skip
    return {**weights_memory(cfg, model.dtype).parts(), **session.parts()}


def summary(
    chunks: list[dict[str, Any]],
    stats: dict[str, Any],
    model: CausalLingBotTransformer,
    tokens: int,
    planned: dict[str, int],
    weights_bytes: int | None,
) -> dict[str, Any]:
    """The report's summary; to be called under the backend that served the rollout.

    Args:
        tokens: of a chunk.
        planned: of `planned_memory`.
        weights_bytes: allocated on the GPU once the weights were there.
    """
    captures = [chunk["cuda_graphs"]["captures"] for chunk in chunks]
    chosen = steady([chunk["window_full"] for chunk in chunks], captures)
    spread = {
        name: percentiles([chunks[i][name] for i in chosen]) for name in ("time_to_chunk_ms", "context_ms", "total_ms")
    }
    frames = PIXEL_FRAMES_PER_LATENT * model.config.frames_per_chunk
    sizes = cache_bytes(stats)
    cameras = [chunks[i]["camera_ms"] for i in chosen if chunks[i]["camera_ms"] is not None]
    peaks = [chunk["peak_memory_bytes"] for chunk in chunks]
    return {
        "first_chunk_ms": chunks[0]["time_to_chunk_ms"],
        "steady_chunks": chosen,
        **spread,
        "camera_ms": percentiles(cameras) if cameras else None,
        "denoise_step_ms": percentiles([time for i in chosen for time in chunks[i]["denoise_ms"]]),
        "video_frames_per_chunk": frames,
        "frames_per_second": 1e3 * frames / spread["total_ms"]["p50"],
        "cache_bytes": {**sizes, "total": sum(sizes.values())},
        "cuda_graphs": stats["cuda_graphs"],
        "peak_memory_bytes": _process_peak() if weights_bytes is None else max(weights_bytes, *peaks),
        "memory": {
            "planned": planned,
            "weights_bytes": weights_bytes,
            "first_chunk_bytes": peaks[0],
            "steady_chunk_bytes": None if weights_bytes is None else max(peaks[i] for i in chosen),
        },
        "backends": backends.serving(model.config, model.device.type, model.dtype, tokens),
    }


def settings(
    options: RolloutOptions,
    model: CausalLingBotTransformer,
    schedule: Schedule,
    size: tuple[int, int],
    camera: CameraPath | None,
) -> dict[str, Any]:
    """The report's settings; to be called under the backend that serves the rollout."""
    _, ph, pw = model.config.patch_size
    tokens = (size[0] // CELL // ph) * (size[1] // CELL // pw)
    return {
        "device": str(model.device),
        "ranks": model.shard_group.ranks,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": requested_backend(),
        "seed": options.session.seed,
        "chunks": options.chunks,
        "height": size[0],
        "width": size[1],
        "tokens_per_frame": tokens,
        "tokens_per_chunk": tokens * model.config.frames_per_chunk,
        "schedule": dataclasses.asdict(schedule),
        "camera": None if camera is None else options.camera.source,
        "camera_scale": None if camera is None else camera.scale,
        "camera_cache": options.camera_cache,
        "cuda_graphs": options.cuda_graphs and model.device.type == "cuda",
        "prompt": "seeded noise" if options.prompt_embeds is None else str(options.prompt_embeds),
    }


def describe_model(options: SessionOptions, model: CausalLingBotTransformer) -> dict[str, Any]:
    """The report's model."""
    return {
        "preset": None if options.checkpoint else options.preset or "tiny",
        "checkpoint": str(options.checkpoint) if options.checkpoint else None,
        "parameters": model.config.num_parameters(),
        "config": model.config.to_dict(),
    }


def run(options: RolloutOptions, group: dist.ProcessGroup | None = None) -> None:
    """The command: run, print, write; over the ranks of `group`, of which rank 0 prints and writes.

    click.ClickException (exit code 1) where the latents are not finite.
    """
    if options.plot_path is not None:
        _require_plots()
    notes = Console(stderr=True, quiet=options.quiet, soft_wrap=True)
    model = make_model(options.session)
    model.cuda_graphs = options.cuda_graphs
    weights_bytes = allocated(model.device)
    if group is not None:
        with blame("torchrun --nproc_per_node"):
            model.shard_sequence(group)
    schedule, size = make_schedule(options.session), video_size(options.session, model.config)
    frames = options.chunks * model.config.frames_per_chunk
    camera = make_camera(options.camera, model.config, frames)
    text = load_prompt(options.prompt_embeds, model, options.session.seed)
    for note in _notes(options, camera, frames):
        notes.print(f"note: {note}", highlight=False)

    state = RealtimeCausalDiTState(camera_cache=options.camera_cache)
    inputs = chunk_inputs(model, schedule, size, camera, options.session.seed)
    chunks: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    report: dict[str, Any] = {
        "environment": environment.collect(),
        "device": environment.device_name(model.device),
        "model": describe_model(options.session, model),
    }
    with (
        backends.chosen_backend(options.session.backend, model.config, model.device, model.dtype),
        _progress(options) as advance,
    ):
        report["settings"] = settings(options, model, schedule, size, camera)
        for index, chunk in enumerate(timed_chunks(model, schedule, state, text, inputs, options.chunks)):
            chunks.append(record(index, chunk))
            if options.save_latents is not None:
                kept.append(chunk.latents.cpu())
            advance(chunks[-1])
        report["chunks"] = chunks
        report["summary"] = summary(
            chunks, state.stats(), model, report["settings"]["tokens_per_chunk"],
            planned_memory(options, model, size, camera is not None), weights_bytes,
        )  # fmt: skip

    if not launch.is_main():
        return
    tables.print_rollout(tables.console(), report)
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot_path is not None:
        plots.latency_per_chunk(report, options.plot_path)
    if options.save_latents is not None:
        _save(options.save_latents, torch.cat(kept, dim=2))
    bad = [chunk["index"] for chunk in chunks if not np.isfinite(chunk["latents_rms"])]
    if bad:
        raise click.ClickException(f"the latents of chunk {bad[0]} are not finite")


def _require_plots() -> None:
    try:
        plots.require()
    except ImportError as error:
        raise click.UsageError(f"--plot: {error}") from error


def _notes(options: RolloutOptions, camera: CameraPath | None, frames: int) -> Iterator[str]:
    if options.session.checkpoint is None:
        yield f"random weights, seed {options.session.seed}: times are real, the latents mean nothing"
    if options.prompt_embeds is None:
        yield f"no --prompt-embeds: the prompt is noise, seed {options.session.seed}"
    if camera is not None and len(camera.trajectory) < frames:
        yield f"the camera path has {len(camera.trajectory)} latent frames of {frames}: the camera then stands still"


@contextlib.contextmanager
def _progress(options: RolloutOptions) -> Iterator[Any]:
    """A function to call after each chunk, with its record; draws on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("chunk"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[latest]}"))
    disabled = options.quiet or not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disabled) as progress:
        task = progress.add_task("rollout", total=options.chunks, latest="")
        yield lambda chunk: progress.update(task, advance=1, latest=f"{chunk['total_ms']:.1f} ms")


def allocated(device: torch.device) -> int | None:
    """Bytes allocated on a GPU now; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _save(path: Path, latents: Tensor) -> None:
    if path.suffix == ".npy":
        np.save(path, latents.numpy())
    else:
        save_file({"latents": latents.contiguous()}, path)
