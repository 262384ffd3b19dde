"""`python -m lingbot_kernels.demo [--precision int8]`: a tiny rollout on whatever is there, compared with the plain
float64 network. It leaves rollout.json and rollout.png in the current directory, and exit code 1 where the error is too
large."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
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
from lingbot_kernels.quantization import recipe_of
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld

CHUNKS = 8
# Relative error of a chunk: of a float32 one, and of one whose products run in int8.
TOLERANCE = {"bfloat16": 1e-5, "int8": 0.02}


def plain_chunks(scene: Scene, weights: dict[str, Tensor], inputs: list[StageInputs]) -> Iterator[Tensor]:
    """The same rollout by the plain network in float64: no ring, no caches, no kernels, no codes."""
    cfg = scene.model.config
    plain = PlainLingBotWorld(cfg, weights, torch.float64)
    context, start_frame = None, 0
    for chunk in inputs:
        noise, renoise = chunk.noise.double(), chunk.renoise.double()
        latents, context = plain.denoise_chunk(
            scene.schedule, noise, renoise, scene.text, start_frame, chunk.camera, context
        )
        start_frame += cfg.frames_per_chunk
        yield latents


def run(folder: Path, chunks: int = CHUNKS, precision: str = "bfloat16") -> dict[str, Any]:
    """Roll out, compare, print, and write the two files into `folder`; the report, with each chunk's relative_error.

    precision: "bfloat16" (that is: as the weights are, float32) or "int8".
    """
    scene = make_scene(SessionOptions(dtype="float32"), chunks)
    weights, recipe = scene.model.state_dict(), recipe_of(precision)
    if recipe is not None:
        scene.model.quantize(recipe)
    done: list[Chunk] = []
    report = measure(scene, RolloutPlan(chunks), lambda chunk, entry: done.append(chunk))
    tables.print_rollout(tables.console(), report)

    print("\nrelative error against the plain network in float64:")
    plain = plain_chunks(scene, weights, [chunk.inputs for chunk in done])
    for expected, chunk, entry in zip(plain, done, report["chunks"], strict=True):
        entry["relative_error"] = relative_error(chunk.latents, expected)
        print(f"  chunk {entry['index']}: {entry['relative_error']:.2e}", flush=True)
    report["tolerance"] = TOLERANCE[precision]
    (folder / "rollout.json").write_text(json.dumps(report, indent=2) + "\n")
    plots.latency_per_chunk(report, folder / "rollout.png")
    return report


def main(arguments: Sequence[str] = ()) -> int:
    """The exit code: 0 where every chunk is within the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m lingbot_kernels.demo", description=__doc__)
    parser.add_argument("--precision", choices=list(TOLERANCE), default="bfloat16", help="of the blocks' products")
    precision = parser.parse_args(arguments).precision
    try:
        plots.require()
    except ImportError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    report = run(Path.cwd(), precision=precision)
    worst = max(chunk["relative_error"] for chunk in report["chunks"])
    good = worst <= report["tolerance"]
    verdict = "within" if good else "NOT within"
    print(f"largest error {worst:.2e}, {verdict} {report['tolerance']:.0e}; see rollout.json and rollout.png")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
