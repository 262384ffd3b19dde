"""CUDA graphs of one session's denoise step and context update, replayed while its window is full.

A graph reads the session's own buffers (ring, RoPE table, text and camera pairs) and a device cursor that says where
the ring stands, so one capture serves every later chunk. Latents and time embeddings are copied in before a replay, and
so is a RoPE table that isn't the captured one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.realtime.kv_cache import KVCache
from lingbot_kernels.ring import ChunkPlan

Run = Callable[[Any, Any, Any, bool], "Tensor | None"]
_live: weakref.WeakSet[SessionGraphs] = weakref.WeakSet()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Any  # ChunkInputs whose latents and time embeddings are this graph's own
    kv_cache: KVCache
    out: Tensor | None


class SessionGraphs:
    """The graphs of one session, by kind (denoise step, context update) and shape of the latents.

    Both kinds share one private memory pool: about the activations of one forward, held until `clear`. They must not be
    replayed concurrently: a forward waits for a context update that still runs on another stream.

    Attributes:
        captures, replays: counts since the session began.
        reason: why the last forward ran eagerly; "" where it replayed a graph.
        warming: whether the last forward ran eagerly so that the next of its kind can be captured.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._captured: dict[tuple[bool, torch.Size], _Captured] = {}
        self._warm: set[tuple[bool, torch.Size]] = set()
        self._pool: Any = None
        self.captures = 0
        self.replays = 0
        self.reason = "nothing has run yet"
        self.warming = False

    def ready(self, inputs: Any, kv_cache: KVCache, plan: ChunkPlan, update_cache_only: bool) -> bool:
        """Whether this forward can replay (or capture) a graph; otherwise `reason` says why it runs eagerly."""
        key = (update_cache_only, inputs.latents.shape)
        self.warming = False
        if plan.num_visible < kv_cache.ring.capacity:
            self.reason = "the window is not full yet"
        elif not isinstance(inputs.text_kv, list):
            self.reason = "the text cache is off, so its addresses change"
        elif not isinstance(inputs.camera, list | None):
            self.reason = "the camera cache is off, so its addresses change"
        elif torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling():
            self.reason = "the caller is capturing or compiling"
        elif key not in self._warm:
            self.warming = True
            self._warm.add(key)  # libraries compile and pick their kernels in this eager forward
            self.reason = "the first forward with a full window warms up"
        else:
            self.reason = ""
        return not self.reason

    def run(self, run: Run, inputs: Any, kv_cache: KVCache, plan: ChunkPlan, update_cache_only: bool) -> Tensor | None:
        """Replay the graph of this kind of forward, captured first where there is none for these buffers."""
        key = (update_cache_only, inputs.latents.shape)
        position = kv_cache.device_position(plan)
        found = self._captured.get(key)
        if found is None or not _same_buffers(found, inputs, kv_cache):
            found = self._captured[key] = self._capture(run, inputs, kv_cache, position, update_cache_only)
        found.inputs.latents.copy_(inputs.latents)
        for own, new in zip(found.inputs.time.layers, inputs.time.layers, strict=True):
            own.copy_(new)
        if found.inputs.cos_sin is not inputs.cos_sin:  # the RoPE cache is off
            found.inputs.cos_sin.copy_(inputs.cos_sin)
        found.graph.replay()
        self.replays += 1
        return None if found.out is None else found.out.clone()

    def tensors(self) -> Iterator[Tensor]:
        """The graphs' own inputs."""
        for captured in self._captured.values():
            yield captured.inputs.latents
            yield captured.inputs.cos_sin
            yield from captured.inputs.time.layers

    def _capture(self, run: Run, inputs: Any, kv_cache: KVCache, position: Any, update_cache_only: bool) -> _Captured:
        time = type(inputs.time)(*(layer.clone() for layer in inputs.time.layers))
        own = replace(inputs, latents=inputs.latents.clone(), time=time)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run(own, kv_cache.layers, position, update_cache_only)
        self._pool = graph.pool()
        _live.add(self)
        self.captures += 1
        return _Captured(graph, own, kv_cache, out)


def clear_all() -> None:
    """Drop the graphs of every session: a communicator can't end while a graph that holds an exchange lives."""
    for graphs in list(_live):
        graphs.clear()


def _same_buffers(captured: _Captured, inputs: Any, kv_cache: KVCache) -> bool:
    """Whether a replay would read the very tensors that this forward is about."""
    held = captured.inputs
    return (
        captured.kv_cache is kv_cache
        and _same_pairs(held.text_kv, inputs.text_kv)
        and _same_pairs(held.camera, inputs.camera)
    )


def _same_pairs(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(x is y for pair_a, pair_b in zip(a, b, strict=True) for x, y in zip(pair_a, pair_b, strict=True))
