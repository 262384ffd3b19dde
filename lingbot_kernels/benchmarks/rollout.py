"""A rollout with a record of every chunk: its times, its cache hits, what the session holds.

The report (`--json`) is one object:

- environment: see `environment.collect`; device: the name of what ran it.
- model: preset, checkpoint (one of them None), parameters, config (the fields of LingBotConfig).
- settings: device, ranks, dtype, precision, recipe (of int8, else None), backend, seed, chunks, height, width (pixels),
  tokens_per_frame, tokens_per_chunk, schedule (times, sigmas, noise_sigmas), camera ("poses", "actions", "made path" or
  None), camera_scale (None: running maximum), camera_cache, cuda_graphs (whether they may be used), prompt (file or
  "seeded noise").
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

import dataclasses
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.benchmarks import backends, environment
from lingbot_kernels.benchmarks.scene import Scene, SceneSession, StageInputs
from lingbot_kernels.benchmarks.timing import ChunkTimer, ChunkTimes, percentiles, steady
from lingbot_kernels.models.camera import PIXEL_FRAMES_PER_LATENT
from lingbot_kernels.ops._dispatch import requested_backend
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.memory import weights_memory


@dataclass(frozen=True)
class RolloutPlan:
    """How many chunks, and what may be kept between their forwards."""

    chunks: int
    camera_cache: bool = True
    cuda_graphs: bool = True


@dataclass(frozen=True)
class Chunk:
    """A denoised chunk with its inputs, clean latents, times, the session's counters before and after it, and the
    most that the GPU had allocated within it.
    """

    inputs: StageInputs
    latents: Tensor
    times: ChunkTimes
    before: dict[str, Any]
    after: dict[str, Any]
    peak_bytes: int | None


def measure(
    scene: Scene, plan: RolloutPlan, each: Callable[[Chunk, dict[str, Any]], None] = lambda chunk, entry: None
) -> dict[str, Any]:
    """Roll out and report; to be called under the backend that is to serve it.

    Args:
        each: called after every chunk, with it and its entry in the report.
    """
    scene.model.cuda_graphs = plan.cuda_graphs
    state = RealtimeCausalDiTState(camera_cache=plan.camera_cache)
    report: dict[str, Any] = {
        **environment.report_head(scene.model.device),
        "model": scene.describe(),
        "settings": settings(scene, plan),
        "chunks": [],
    }
    for index, chunk in enumerate(timed_chunks(scene, state, plan.chunks)):
        entry = record(index, chunk)
        report["chunks"].append(entry)
        each(chunk, entry)
    report["summary"] = summary(scene, plan, report["chunks"], state.stats())
    return report


def timed_chunks(scene: Scene, state: RealtimeCausalDiTState, count: int) -> Iterator[Chunk]:
    """Denoise `count` chunks, each followed by its context update; on CUDA the host waits once per chunk."""
    device, inputs, timer = scene.model.device, scene.inputs(), ChunkTimer(scene.model.device)
    timer.watch(state)
    session, on_gpu = SceneSession(scene, state, timer), device.type == "cuda"
    for _ in range(count):
        before = state.stats()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        timer.start()
        chunk = next(inputs)
        timer.inputs_ready()
        latents = session.denoise(chunk)
        times = timer.stop()
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
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


def summary(scene: Scene, plan: RolloutPlan, chunks: list[dict[str, Any]], stats: dict[str, Any]) -> dict[str, Any]:
    """The report's summary of its `chunks`, where the session's counters ended at `stats`."""
    model, weights_bytes = scene.model, scene.weights_bytes
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
            "planned": {
                **weights_memory(model.config, model.dtype, model.recipe).parts(),
                **scene.planned_session(plan.camera_cache, plan.cuda_graphs).parts(),
            },
            "weights_bytes": weights_bytes,
            "first_chunk_bytes": peaks[0],
            "steady_chunk_bytes": None if weights_bytes is None else max(peaks[i] for i in chosen),
        },
        "backends": backends.serving(model.config, model.device.type, model.dtype, scene.chunk_tokens, model.recipe),
    }


def settings(scene: Scene, plan: RolloutPlan) -> dict[str, Any]:
    """The report's settings, under the backend now in force."""
    model, camera = scene.model, scene.camera
    return {
        "device": str(model.device),
        "ranks": model.shard_group.ranks,
        "dtype": str(model.dtype).removeprefix("torch."),
        "precision": model.precision,
        "recipe": None if model.recipe is None else model.recipe.to_dict(),
        "backend": requested_backend(),
        "seed": scene.seed,
        "chunks": plan.chunks,
        "height": scene.size[0],
        "width": scene.size[1],
        "tokens_per_frame": scene.frame_tokens,
        "tokens_per_chunk": scene.chunk_tokens,
        "schedule": dataclasses.asdict(scene.schedule),
        "camera": None if camera is None else camera.source,
        "camera_scale": None if camera is None else camera.scale,
        "camera_cache": plan.camera_cache,
        "cuda_graphs": plan.cuda_graphs and model.device.type == "cuda",
        "prompt": scene.prompt,
    }


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
