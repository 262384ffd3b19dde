"""One realtime session: its K/V ring, text K/V, what its forwards share, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.realtime.graphs import SessionGraphs
from lingbot_kernels.realtime.kv_cache import CacheLayout, CrossAttentionCache, KVCache, RingMemory
from lingbot_kernels.realtime.runtime_cache import RuntimeCache, Store, TensorIdentity, tensors_in
from lingbot_kernels.ring import ChunkPlan


class RealtimeCausalDiTState:
    """Everything a session keeps between forwards. The model keeps nothing, so sessions can be interleaved freely.

    Attributes:
        kv_cache: self-attention's K/V ring; None before the first forward.
        graphs: CUDA graphs of this session's forwards; unused on other devices.
        context_update: recorded at the end of a context update on a side stream; None where nobody waits for one.
        runtime_cache: stores "rope", "time_embeddings", "camera_modulation" and "text", each with hits, misses, bytes.

    Args:
        rope_cache, time_cache, camera_cache, text_cache: False turns that store off: its values are then computed in
            every forward, with the same bits, and not kept. The camera's is the large one (3.7 GB for the 14B model at
            480p).
        time_entries: timesteps kept, at most; the steps of the schedule and the context update.
    """

    def __init__(
        self,
        *,
        rope_cache: bool = True,
        time_cache: bool = True,
        camera_cache: bool = True,
        text_cache: bool = True,
        time_entries: int = 5,
    ) -> None:
        self.kv_cache: KVCache | None = None
        self.runtime_cache = RuntimeCache(
            rope=Store(1, rope_cache),
            time_embeddings=Store(time_entries, time_cache),
            camera_modulation=Store(1, camera_cache),
            text=Store(1, text_cache),
        )
        self.graphs = SessionGraphs()
        self.agreed_text: tuple[TensorIdentity, str] | None = None  # the prompt that the ranks of a shard compared
        self.context_update: torch.cuda.Event | None = None
        self._owner: object | None = None

    @property
    def switches(self) -> dict[str, Any]:
        """What the session was made with, as keyword arguments."""
        stores = {"rope": "rope", "time": "time_embeddings", "camera": "camera_modulation", "text": "text"}
        enabled = {f"{name}_cache": self.runtime_cache[store].enabled for name, store in stores.items()}
        return {**enabled, "time_entries": self.runtime_cache["time_embeddings"].max_entries}

    @property
    def crossattn_cache(self) -> CrossAttentionCache | None:
        """Text K/V of the current prompt; None before the first forward, or with `text_cache=False`."""
        return next(self.runtime_cache["text"].values(), None)

    @property
    def next_frame(self) -> int:
        """Absolute index of the latent frame after the last one received; 0 for a fresh session."""
        return 0 if self.kv_cache is None else self.kv_cache.ring.end // self.kv_cache.layout.frame_tokens

    @property
    def chunk_start_frame(self) -> int:
        """Absolute index of the current chunk's first latent frame; 0 for a fresh session."""
        return 0 if self.kv_cache is None else self.kv_cache.ring.first_token // self.kv_cache.layout.frame_tokens

    def plan_chunk(
        self,
        owner: object,
        layout: CacheLayout,
        start_frame: int,
        frames: int,
        make_memory: Callable[[CacheLayout], RingMemory | None] = lambda layout: None,
    ) -> ChunkPlan:
        """Check a forward of `frames` latent frames from `start_frame` and say what it does to the ring.

        Allocates the ring at the first call, in what `make_memory` gives, which may refuse by an error of its own. A
        refusal leaves the session as it was.

        Raises:
            ValueError: the session belongs to another model or was made for another layout, or the position is one
                that `KVRing.plan` refuses.
        """
        if self._owner is not None and self._owner is not owner:
            raise ValueError(
                "state: got one that another model (or other weights) began, must be this model's own or fresh; "
                "call state.dispose() to start again"
            )
        if self.kv_cache is not None:
            differences = self.kv_cache.layout.differences(layout)
            if differences:
                raise ValueError(f"state: made for another layout: {'; '.join(differences)}")
        ring = layout.empty_ring() if self.kv_cache is None else self.kv_cache.ring
        plan = ring.plan(start_frame * layout.frame_tokens, frames * layout.frame_tokens)
        if self.kv_cache is None:
            self.kv_cache = KVCache(layout, make_memory(layout))
        self._owner = owner
        return plan

    def wait_for_context(self) -> None:
        """Have the current stream wait for the last context update, where that ran on a side stream."""
        event, self.context_update = self.context_update, None
        if event is not None:
            event.wait(torch.cuda.current_stream(event.device))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the session keeps, the graphs' private pool apart."""
        if self.kv_cache is not None:
            yield from self.kv_cache.tensors()
        for name in self.runtime_cache:
            yield from tensors_in(list(self.runtime_cache[name].values()))
        yield from self.graphs.tensors()

    def nbytes(self) -> int:
        """Bytes of device and host memory that the session's caches hold now."""
        kv = 0 if self.kv_cache is None else self.kv_cache.nbytes()
        memory = None if self.kv_cache is None else self.kv_cache.memory
        return kv + (0 if memory is None else memory.nbytes()) + self.runtime_cache.nbytes()

    def stats(self) -> dict[str, Any]:
        """Position, and for each cache its bytes, entries, hits and misses: plain data, ready for JSON."""
        ring = None if self.kv_cache is None else self.kv_cache.ring
        kv_bytes = 0 if self.kv_cache is None else self.kv_cache.nbytes()
        stores = {
            name: {"hits": s.hits, "misses": s.misses, "entries": s.entries, "bytes": s.bytes}
            for name, s in self.runtime_cache.stats().items()
        }
        return {
            "next_frame": self.next_frame,
            "chunk_start_frame": self.chunk_start_frame,
            "visible_tokens": 0 if ring is None else ring.num_visible,
            "capacity_tokens": 0 if ring is None else ring.capacity,
            "kv_cache": {"bytes": kv_bytes},
            "cuda_graphs": {"captures": self.graphs.captures, "replays": self.graphs.replays},
            **stores,
        }

    def dispose(self) -> None:
        """Free every cache and forget the position. Safe to call twice; the state can start again.

        Waits for a context update that still runs on a side stream.
        """
        event, self.context_update = self.context_update, None
        if event is not None:
            event.synchronize()
        self.kv_cache = None
        self.graphs.clear()
        self.runtime_cache.clear()
        self.agreed_text = None
        self._owner = None
