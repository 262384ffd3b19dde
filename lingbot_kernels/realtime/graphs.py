"""CUDA graphs of one session's denoise step and context update, replayed while its window is full.

A graph reads the session's own buffers (ring, RoPE table, text and camera pairs) and a device cursor that says where
the ring stands, so one capture serves every later chunk. Latents and time embeddings are copied in before a replay, and
so is a RoPE table that isn't the captured one. What was launched at the capture is what a replay launches: a graph
belongs to the backend choice that stood then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.realtime.chunk_inputs import ChunkInputs, PerBlock, TimeEmbeddings
from lingbot_kernels.realtime.kv_cache import KeyValue, KVCache, RingLayer
from lingbot_kernels.ring import ChunkPlan, ChunkPosition

Run = Callable[[ChunkInputs, Sequence[RingLayer], ChunkPosition, bool], "Tensor | None"]
Pairs = Sequence[KeyValue] | PerBlock | None
_Key = tuple[bool, torch.Size, str]
_live: weakref.WeakSet[SessionGraphs] = weakref.WeakSet()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: ChunkInputs  # latents and time embeddings are this graph's own
    kv_cache: KVCache
    out: Tensor | None


class SessionGraphs:
    """The graphs of one session, by kind (denoise step, context update), shape of the latents and backend choice.

    A prompt with another number of keys warms up anew, and its graph takes the place of the one before.

    All share one private memory pool: about the activations of one forward, held until `clear`. They must not be
    replayed concurrently: a forward waits for a context update that still runs on another stream.

    Attributes:
        captures, replays: counts since the session began.
        reason: why the last forward ran eagerly; "" where it replayed a graph.
        warming: whether the last forward ran eagerly so that the next of its kind can be captured.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop every graph and count."""
        self.drop()
        self.captures = 0
        self.replays = 0
        self.reason = "nothing has run yet"
        self.warming = False
        self.mark()

    def drop(self) -> None:
        """Drop every graph; the counts go on."""
        self._captured: dict[_Key, _Captured] = {}
        self._warm: set[tuple[_Key, int]] = set()  # and the text's keys
        self._new: set[_Key] = set()  # captured since the mark
        self._pool: Any = None

    def mark(self) -> None:
        """What `undo` goes back to."""
        self._marked = (self.captures, self.replays, frozenset(self._warm))
        self._new.clear()

    def undo(self) -> None:
        """Take back what was captured, warmed up and counted since `mark`."""
        self.captures, self.replays, warm = self._marked
        self._warm &= warm
        for key in self._new:
            del self._captured[key]
        self._new.clear()
        if not self._captured:
            self._pool = None

    def ready(
        self, inputs: ChunkInputs, kv_cache: KVCache, plan: ChunkPlan, update_cache_only: bool, backend: str = "auto"
    ) -> bool:
        """Whether this forward can replay (or capture) a graph; otherwise `reason` says why it runs eagerly.

        Args:
            backend: the choice that the ops run under, as `use_backend` or the environment has it now.
        """
        key = (update_cache_only, inputs.latents.shape, backend)
        self.warming = False
        if plan.num_visible < kv_cache.ring.capacity:
            self.reason = "the window is not full yet"
        elif not isinstance(inputs.text_kv, list):
            self.reason = "the text cache is off, so its addresses change"
        elif not isinstance(inputs.camera, list | None):
            self.reason = "the camera cache is off, so its addresses change"
        elif torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling():
            self.reason = "the caller is capturing or compiling"
        elif (key, text_keys := inputs.text_kv[0][0].shape[1] if inputs.text_kv else 0) not in self._warm:
            self.warming = True
            self._warm.add((key, text_keys))  # libraries compile and pick their kernels in this eager forward
            self.reason = "the first forward with a full window warms up"
        else:
            self.reason = ""
        return not self.reason

    def run(
        self,
        run: Run,
        inputs: ChunkInputs,
        kv_cache: KVCache,
        plan: ChunkPlan,
        update_cache_only: bool,
        backend: str = "auto",
    ) -> Tensor | None:
        """Replay the graph of this kind of forward, captured first where there is none for these buffers."""
        key = (update_cache_only, inputs.latents.shape, backend)
        position = kv_cache.device_position(plan)
        found = self._captured.get(key)
        if found is None or not _same_buffers(found, inputs, kv_cache):
            found = self._captured[key] = self._capture(run, inputs, kv_cache, position, update_cache_only)
            self._new.add(key)
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

    def _capture(
        self, run: Run, inputs: ChunkInputs, kv_cache: KVCache, position: ChunkPosition, update_cache_only: bool
    ) -> _Captured:
        time = TimeEmbeddings(inputs.time.blocks.clone(), inputs.time.head.clone())
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


def _same_buffers(captured: _Captured, inputs: ChunkInputs, kv_cache: KVCache) -> bool:
    """Whether a replay would read the very tensors that this forward is about."""
    held = captured.inputs
    return (
        captured.kv_cache is kv_cache
        and _same_pairs(held.text_kv, inputs.text_kv)
        and _same_pairs(held.camera, inputs.camera)
    )


def _same_pairs(a: Pairs, b: Pairs) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return all(x is y for pair_a, pair_b in zip(a, b, strict=True) for x, y in zip(pair_a, pair_b, strict=True))
    return a is None and b is None
