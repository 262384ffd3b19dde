"""The model bench's step under torch.compile, each block as one graph, beside the same step eager and replayed.

Compile the blocks, `for block in model.blocks: block.compile(fullgraph=True)`: they share one compilation however many
there are. What surrounds them is the session's bookkeeping in Python, which gains nothing and compiles anew with every
timestep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from lingbot_kernels.benchmarks.gate import relative_error, within
from lingbot_kernels.benchmarks.rows import FAILED, GREEN, RED, failure_note
from lingbot_kernels.benchmarks.timeline import event_times

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.model import ModelBench
    from lingbot_kernels.benchmarks.model_session import BenchSession

EAGER, COMPILED, REPLAYED = "lingbot_kernels, no graphs", "torch.compile", "torch.compile, graphs"
_SECONDS = 1.5


@contextlib.contextmanager
def compiled(blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block, each of `blocks` runs compiled, as one graph without a break."""
    held = list(blocks)
    torch._dynamo.reset()
    for block in held:
        block.compile(fullgraph=True)
    try:
        yield
    finally:
        for block in held:
            block._compiled_call_impl = None
        torch._dynamo.reset()


def measure(bench: ModelBench, session: BenchSession, ceiling_ms: float, error: float, plain_error: float) -> bool:
    """Rows of a steady step without graphs, compiled, and compiled within our graphs; whether the gates were green.

    Args:
        error, plain_error: of the compiled model and of the plain formulation against float64, see `ModelBench.gate`.
    """
    gated: dict[str, Any] = {"error": error, "plain_error": plain_error}
    right, gates = within(error, plain_error), []
    latents, camera = session.new_latents(), session.new_camera()
    want = session.step(camera, latents)
    model, graphs = session.model, session.state.graphs

    def time(backend: str, note: str) -> None:
        got = session.step(camera, latents)
        difference = relative_error(got, want)
        gates.append(GREEN if right and difference < 0.05 else RED)
        times = event_times(lambda: session.step(camera, latents), _SECONDS)
        bench.add(
            "denoise_step", backend, times, ceiling_ms, gate=gates[-1], **gated,
            note=f"{note}; differs from the replayed step by {difference:.2g}",
        )  # fmt: skip

    try:
        model.cuda_graphs = False
        time(EAGER, "every kernel launched")
        with compiled(model.blocks):
            session.step(camera, latents)
            time(COMPILED, "blocks compiled, fullgraph=True")
            graphs.clear()
            model.cuda_graphs = True
            for _ in range(3):  # warm up, capture, replay
                session.step(camera, latents)
            if graphs.replays:
                time(REPLAYED, "blocks compiled, fullgraph=True, in a CUDA graph")
            else:
                note = f"no graph was replayed: {graphs.reason or 'not a CUDA device'}"
                bench.add("denoise_step", REPLAYED, gate=FAILED, **gated, note=note)
    except Exception as failure:  # a row of its own, not the end of ours
        bench.add("denoise_step", COMPILED, gate=FAILED, **gated, note=failure_note(failure))
        return False
    finally:
        graphs.clear()
        model.cuda_graphs = True
    return RED not in gates
