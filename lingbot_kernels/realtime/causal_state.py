"""One realtime session: its K/V ring, text K/V, what its forwards share, and where it stands."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.realtime import saved_session
from lingbot_kernels.realtime.graphs import SessionGraphs
from lingbot_kernels.realtime.kv_cache import CacheLayout, CrossAttentionCache, KVCache, RingMemory
from lingbot_kernels.realtime.runtime_cache import RuntimeCache, Store, TensorIdentity, tensors_in
from lingbot_kernels.ring import ChunkPlan
from lingbot_kernels.scalars import as_count

_INSTEAD = "state.save(folder) writes it, and RealtimeCausalDiTState.load(folder, model) goes on with it"


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

    Raises:
        TypeError, ValueError: naming the argument.
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
        switches = {
            "rope_cache": rope_cache, "time_cache": time_cache, "camera_cache": camera_cache, "text_cache": text_cache,
        }  # fmt: skip
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, must be True or False")
        time_entries = as_count("time_entries", time_entries, 1)
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
        self._weights: object | None = None
        self._writing: ChunkPlan | None = None
        self._undo: list[Callable[[], object]] | None = None  # of the attempt under way

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

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """(first frame, frames) of a chunk that must be done again before any other, see `attempt`; else None."""
        if self.kv_cache is None or self.kv_cache.ring.unfinished is None:
            return None
        first, tokens = self.kv_cache.ring.unfinished
        frame_tokens = self.kv_cache.layout.frame_tokens
        return first // frame_tokens, tokens // frame_tokens

    def plan(self, owner: object, layout: CacheLayout, start_frame: int, frames: int) -> ChunkPlan:
        """Check a forward of `frames` latent frames from `start_frame` and say what it does to the ring. Changes
        nothing.

        Raises:
            ValueError: the session belongs to another model or was made for another layout, the position is one that
                `KVRing.plan` refuses, or another chunk must be done again first (see `attempt`).
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
        if self.unfinished not in (None, (start_frame, frames)):
            first, count = self.unfinished
            raise ValueError(
                f"start_frame: got {start_frame} for {frames} frames, must be {first} for {count}: a forward of that "
                "chunk failed when it had overwritten keys and values that this one would see; do that chunk again, or "
                "call state.dispose() to start again"
            )
        ring = layout.empty_ring() if self.kv_cache is None else self.kv_cache.ring
        return ring.plan(start_frame * layout.frame_tokens, frames * layout.frame_tokens)

    def begin(self, layout: CacheLayout, memory: RingMemory | None = None, *, owner: object) -> None:
        """Allocate the rings of a session that begins, in `memory` where given, and let it belong to `owner`."""
        self.kv_cache = KVCache(layout, memory)
        self._owner = owner

    def use_weights(self, token: object) -> None:
        """Drop what other weights made: text K/V, time embeddings, camera modulation, graphs. The ring's history
        stays.
        """
        if self._weights is not token:
            for name in ("time_embeddings", "camera_modulation", "text"):
                self.runtime_cache[name].drop()
            self.graphs.drop()
            self._weights = token

    def write(self, plan: ChunkPlan) -> None:
        """Say that the forward of this plan writes to the ring from now on."""
        self._writing = plan

    def commit(self, plan: ChunkPlan) -> None:
        """Take the position of a plan whose forward has done everything that can fail."""
        assert self.kv_cache is not None
        self.kv_cache.ring.commit(plan)

    @contextlib.contextmanager
    def attempt(self, undo: Callable[[], object] = lambda: None) -> Iterator[None]:
        """All that the block does to the session, with one chunk, or nothing: where it raises, be it KeyboardInterrupt,
        position and counters are as they were before, and what it stored is gone. A session that began within the block
        is fresh again.

        What the ring held in the chunk's slots doesn't come back. Where attention could see that, the session is marked
        as `unfinished`: it takes that chunk again and no other. Within another attempt of the session the outer one
        decides.

        Args:
            undo: takes back what else the block does.
        """
        if self._undo is not None:
            self._undo.append(undo)
            yield
            return
        ring = None if self.kv_cache is None else copy.copy(self.kv_cache.ring)
        context_update, self._writing = self.context_update, None
        self.runtime_cache.mark()
        self.graphs.mark()
        try:
            self._undo = [undo]
            yield
        except BaseException:
            for each in reversed(self._undo or ()):
                each()
            self.runtime_cache.undo()
            if ring is None or self.kv_cache is None:
                self.dispose()
            else:
                self.graphs.undo()
                self.kv_cache.ring = ring
                if self._writing is not None:
                    ring.failed(self._writing)
                self.context_update = self.context_update or context_update
            raise
        finally:
            self._undo = None

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
            yield from tensors_in(self.runtime_cache[name].held())
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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the session to a folder, for `load` to go on with in another process or on another device.

        Kept are keys and values of the window, as they are, the position, an unfinished chunk, and what the session was
        made with; not what the next forward makes again (text K/V, camera modulation, time embeddings, RoPE table,
        graphs), nor counts. Between the denoise steps of a chunk, or before its context update, it can be saved as
        well: what the caller holds of the chunk (its latents, its generator) is the caller's to keep.

        The folder is new, empty, or holds a saved session, which is replaced once the new one is whole. On a sharded
        model every rank saves, with the same folder, into one of its own in it. Memory: one layer's K and V at a time.

        Raises:
            ValueError: the folder holds other things or lacks space, a forward is under way, or the session's model is
                gone or isn't a `CausalLingBotTransformer`.
            OSError: it can't be written; a session saved there before is still there.
        """
        self._check_rest("saved")
        saved_session.save(self, self._owner, Path(folder))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], model: saved_session.SessionModel, *, check_weights: bool = True
    ) -> RealtimeCausalDiTState:
        """The session that `save` wrote, on the model's device: it goes on with the bits of one never interrupted,
        where the device is of the same kind.

        Args:
            model: of the same configuration, dtype, precision, weights and number of ranks; on a sharded one every rank
                loads.
            check_weights: False takes weights that differ, as a running session does when an adapter is switched.

        Raises:
            ValueError: naming the file that is missing or damaged, or what differs in the model.
            NotEnoughMemory: it can't fit; nothing has been allocated for it.
        """
        return saved_session.load(cls, Path(folder), model, check_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> RealtimeCausalDiTState:
        """A session of the same model that goes on by itself, with the same bits; what forwards make again, it makes
        again.

        Raises:
            TypeError: the rings lie in memory that ranks share.
        """
        self._check_rest("copied")
        copied = type(self)(**self.switches)
        memo[id(self)] = copied
        if self.kv_cache is None:
            return copied
        if self.kv_cache.memory is not None:
            raise TypeError(
                f"state: got one whose rings lie in memory that ranks share, must be saved, not copied: {_INSTEAD}"
            )
        if self.context_update is not None:
            self.context_update.synchronize()
        copied.begin(self.kv_cache.layout, owner=self._owner)
        assert copied.kv_cache is not None
        copied.kv_cache.ring = copy.copy(self.kv_cache.ring)
        for held, new in zip(self.kv_cache.tensors_of_layers(), copied.kv_cache.tensors_of_layers(), strict=True):
            new.copy_(held)
        return copied

    def __copy__(self) -> RealtimeCausalDiTState:
        raise TypeError(
            "state: got a shallow copy, which would write to the same rings, must be copied by copy.deepcopy"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"state: got one to pickle, though it is of a model of this process, must be saved instead: {_INSTEAD}"
        )

    def _check_rest(self, done: str) -> None:
        if self._undo is not None:
            raise ValueError(f"state: got one within a forward, must be {done} before or after it")

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
        self._owner = self._weights = self._writing = None


def check_session(state: object) -> None:
    """Raise TypeError unless `state` is a session."""
    if not isinstance(state, RealtimeCausalDiTState):
        raise TypeError(f"state: got {type(state).__name__}, must be a RealtimeCausalDiTState, one per session")
