"""`python -m lingbot_kernels.demo`: a tiny rollout on whatever is there, compared with the plain float64 network.
Leaves rollout.json and rollout.png in the current directory; exit code 1 where the error is too large."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import plots
from lingbot_kernels.commands import environment, tables
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.session import (
    CameraOptions,
    ChunkInputs,
    chunk_inputs,
    load_prompt,
    make_camera,
    make_model,
    make_schedule,
    video_size,
)
from lingbot_kernels.commands.timed_rollout import (
    RolloutOptions,
    allocated,
    describe_model,
    planned_memory,
    record,
    settings,
    summary,
    timed_chunks,
)
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld
from lingbot_kernels.stages.schedule import Schedule

CHUNKS = 8
TOLERANCE = 1e-5  # relative error of a float32 chunk


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected|| in float64, on the CPU."""
    wide = expected.double().cpu()
    return ((value.double().cpu() - wide).norm() / wide.norm()).item()


def plain_chunks(
    model: CausalLingBotTransformer, schedule: Schedule, text: Tensor, inputs: list[ChunkInputs]
) -> Iterator[Tensor]:
    """The same rollout by the plain network in float64: no ring, no caches, no kernels."""
    plain = PlainLingBotWorld(model.config, model.state_dict(), torch.float64)
    context, start_frame = None, 0
    for chunk in inputs:
        noise, renoise = chunk.noise.double(), chunk.renoise.double()
        latents, context = plain.denoise_chunk(schedule, noise, renoise, text, start_frame, chunk.camera, context)
        start_frame += model.config.frames_per_chunk
        yield latents


def run(folder: Path, chunks: int = CHUNKS) -> dict[str, Any]:
    """Roll out, compare, print, and write the two files into `folder`; the report, with each chunk's relative_error."""
    options = SessionOptions(dtype="float32")
    model, schedule = make_model(options), make_schedule(options)
    size, camera = (
        video_size(options, model.config),
        make_camera(CameraOptions(), model.config, chunks * model.config.frames_per_chunk),
    )
    text, weights_bytes = load_prompt(None, model, options.seed), allocated(model.device)
    rollout = RolloutOptions(options, CameraOptions(), chunks)
    state = RealtimeCausalDiTState()
    report: dict[str, Any] = {
        "environment": environment.collect(),
        "device": environment.device_name(model.device),
        "model": describe_model(options, model),
        "settings": settings(rollout, model, schedule, size, camera),
        "chunks": [],
    }
    done = []
    for index, chunk in enumerate(
        timed_chunks(model, schedule, state, text, chunk_inputs(model, schedule, size, camera, options.seed), chunks)
    ):
        report["chunks"].append(record(index, chunk))
        done.append(chunk)
    report["summary"] = summary(
        report["chunks"], state.stats(), model, report["settings"]["tokens_per_chunk"],
        planned_memory(rollout, model, size, camera is not None), weights_bytes,
    )  # fmt: skip
    tables.print_rollout(tables.console(), report)

    print("\nrelative error against the plain network in float64:")
    for expected, chunk, entry in zip(
        plain_chunks(model, schedule, text, [chunk.inputs for chunk in done]), done, report["chunks"], strict=True
    ):
        entry["relative_error"] = relative_error(chunk.latents, expected)
        print(f"  chunk {entry['index']}: {entry['relative_error']:.2e}", flush=True)
    report["tolerance"] = TOLERANCE
    (folder / "rollout.json").write_text(json.dumps(report, indent=2) + "\n")
    plots.latency_per_chunk(report, folder / "rollout.png")
    return report


def main() -> int:
    """The exit code: 0 where every chunk is within the tolerance."""
    try:
        plots.require()
    except ImportError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    report = run(Path.cwd())
    worst = max(chunk["relative_error"] for chunk in report["chunks"])
    good = worst <= TOLERANCE
    verdict = "within" if good else "NOT within"
    print(f"largest error {worst:.2e}, {verdict} {TOLERANCE:.0e}; see rollout.json and rollout.png")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
