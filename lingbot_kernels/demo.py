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

from lingbot_kernels.benchmarks import plots, tables
from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.rollout import Chunk, RolloutPlan, measure
from lingbot_kernels.benchmarks.scene import Scene, StageInputs
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.session import make_scene
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld

CHUNKS = 8
TOLERANCE = 1e-5  # relative error of a float32 chunk


def plain_chunks(scene: Scene, inputs: list[StageInputs]) -> Iterator[Tensor]:
    """The same rollout by the plain network in float64: no ring, no caches, no kernels."""
    cfg = scene.model.config
    plain = PlainLingBotWorld(cfg, scene.model.state_dict(), torch.float64)
    context, start_frame = None, 0
    for chunk in inputs:
        noise, renoise = chunk.noise.double(), chunk.renoise.double()
        latents, context = plain.denoise_chunk(
            scene.schedule, noise, renoise, scene.text, start_frame, chunk.camera, context
        )
        start_frame += cfg.frames_per_chunk
        yield latents


def run(folder: Path, chunks: int = CHUNKS) -> dict[str, Any]:
    """Roll out, compare, print, and write the two files into `folder`; the report, with each chunk's relative_error."""
    scene = make_scene(SessionOptions(dtype="float32"), chunks)
    done: list[Chunk] = []
    report = measure(scene, RolloutPlan(chunks), lambda chunk, entry: done.append(chunk))
    tables.print_rollout(tables.console(), report)

    print("\nrelative error against the plain network in float64:")
    plain = plain_chunks(scene, [chunk.inputs for chunk in done])
    for expected, chunk, entry in zip(plain, done, report["chunks"], strict=True):
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
