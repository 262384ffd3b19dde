"""A session's context update on a CUDA stream of its own, so that the caller's decoder can run meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState


def check_stream(name: str, stream: torch.Stream | None, device: torch.device) -> torch.cuda.Stream | None:
    """The stream to run on; None where there is none, or on a CPU, where all runs in the order of the calls.

    Raises:
        TypeError, ValueError: naming the argument, where it is no stream of the model's device.
    """
    if stream is None:
        return None
    if not isinstance(stream, torch.Stream | torch.cuda.Stream):
        raise TypeError(f"{name}: got {type(stream).__name__}, must be a torch.Stream or None")
    where = stream.device
    if where.type != device.type or (device.type == "cuda" and where != device):
        raise ValueError(f"{name}: got one of {where}, must be of the model's device, {device}")
    if device.type != "cuda":
        return None
    if isinstance(stream, torch.cuda.Stream):
        return stream
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


@contextlib.contextmanager
def on_side_stream(state: RealtimeCausalDiTState, stream: torch.cuda.Stream | None, *inputs: Tensor) -> Iterator[None]:
    """Launch the block's work on `stream`: after all that the current stream was given, before the session's next
    forward. The current stream goes on at once; with None the block runs as it is.

    What the session keeps is used by both streams from then on, so the allocator is told of both: memory that the
    session gives back, even by being dropped, is not handed out while either still works with it. The same goes for
    `inputs`, which the caller may drop.
    """
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            state.wait_for_context()  # of an update before, on yet another stream
            yield
    finally:
        state.context_update = stream.record_event()
        for x in (*inputs, *state.tensors()):
            if x.is_cuda:
                x.record_stream(stream)
                x.record_stream(current)
