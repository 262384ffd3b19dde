"""sglang's cache of a layer's keys and values as a ring: a chunk is written over the oldest tokens, nothing is rolled.

sglang keeps the window in the order of time and, once it is full, moves all of it down for every chunk. K is rotated
before it is cached, so attention doesn't mind the order; here token t lies in slot(t) of the same two tensors. All that
a ring needs to know, the cache knows already: how many tokens it has received, its size and its sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.runtime.layers.kvcache.causal_attention_cache import CausalSelfAttentionKVCache
from torch import Tensor

from lingbot_kernels.ring import RingPosition, slot


class RingKVCache(CausalSelfAttentionKVCache):
    """A cache whose K and V lie as a ring. Whoever calls sglang's own methods on it gets them in the order of time
    first, and an ordinary cache from then on.
    """

    __slots__ = ()

    def update_and_get_attention_kv(self, **arguments: Any) -> Any:
        leave(self)
        return self.update_and_get_attention_kv(**arguments)

    def pin_current_chunk(self, current_num_tokens: int) -> None:
        leave(self)
        self.pin_current_chunk(current_num_tokens)


@dataclass(frozen=True)
class Place:
    """Where a chunk goes in a cache, and what it sees.

    Attributes:
        ring: of the chunk's first token.
        latest: as `ring`, of the last tokens that the cache will have, as many as the chunk has.
        num_visible: slots in use once the chunk is written.
        received: tokens that the cache will have received.
        behind: tokens received after the chunk, which is not 0 where an earlier chunk is written again.
    """

    ring: RingPosition
    latest: RingPosition
    num_visible: int
    received: int
    behind: int


def check(name: str, cache: Any) -> None:
    """Raise unless the cache is one that can be a ring.

    Raises:
        TypeError: it is of another class, packed ones (QVG) among them.
        ValueError: it may grow, has a global sink or one pinned elsewhere, or attends to less than it holds.
    """
    if type(cache) not in (CausalSelfAttentionKVCache, RingKVCache):
        raise TypeError(
            f"{name}: got {type(cache).__name__}, must be sglang's CausalSelfAttentionKVCache (packed and quantised "
            "caches are not served: restore(transformer) first)"
        )
    if cache.allow_growth:
        raise ValueError(f"{name}.allow_growth: got True, must be False: a ring has a fixed size")
    if cache.global_sink_tokens:
        raise ValueError(f"{name}.global_sink_tokens: got {cache.global_sink_tokens}, must be 0")
    if cache.pinned_len and (cache.pinned_start, cache.pinned_len) != (0, cache.sink_tokens):
        raise ValueError(
            f"{name}: got a sink pinned at {cache.pinned_start}, must be the video's first {cache.sink_tokens} tokens"
        )
    if cache.cache_size != cache.k.shape[1] or cache.attention_window_size != cache.cache_size:
        raise ValueError(
            f"{name}: got {cache.k.shape[1]} slots, cache_size {cache.cache_size} and attention_window_size "
            f"{cache.attention_window_size}, must be the same"
        )
    if not 0 <= cache.sink_tokens < cache.cache_size:
        raise ValueError(
            f"{name}.sink_tokens: got {cache.sink_tokens}, must be from 0 to cache_size - 1 = {cache.cache_size - 1}"
        )


def place(name: str, cache: Any, start: int, tokens: int) -> Place:
    """Where `tokens` tokens from token `start` of the video go. Changes nothing.

    Raises:
        ValueError: the chunk doesn't fit, leaves a gap, or goes back to tokens that have left the window.
    """
    received, held = cache._read_indices()
    capacity, sink = cache.cache_size, cache.sink_tokens
    turn = capacity - sink
    if held != min(received, capacity):
        raise ValueError(f"{name}: holds {held} of {received} tokens, must hold {min(received, capacity)}")
    if not 1 <= tokens <= turn:
        raise ValueError(f"{name}: got a chunk of {tokens} tokens, must be from 1 to cache_size - sink_tokens = {turn}")
    if start < 0 or start > received:
        raise ValueError(f"current_start: got token {start}, must be from 0 to {received}, the tokens of {name}")
    after = max(received, start + tokens)
    if after > capacity and start < after - turn:
        raise ValueError(
            f"current_start: got token {start}, which has left the window of {name}; must be {after - turn} or more"
        )
    return Place(
        RingPosition(slot(start, sink, capacity), sink),
        RingPosition(after - tokens, sink),
        min(after, capacity),
        after,
        after - start - tokens,
    )


def enter(cache: Any) -> None:
    """Make an ordinary cache that `check` and `place` take a ring, in place; a ring stays one."""
    if type(cache) is not RingKVCache:
        _turn(cache, 1)
        cache.__class__ = RingKVCache


def leave(cache: Any) -> None:
    """Put a ring's K and V in the order of time; the cache is then what sglang would have made of the same tokens."""
    _turn(cache, -1)
    cache.__class__ = CausalSelfAttentionKVCache


def commit(cache: Any, where: Place) -> None:
    """Take the position of a chunk whose K and V have been written."""
    cache._write_indices(global_end_index=where.received, local_end_index=where.num_visible)


def write(cache: Any, where: Place, k: Tensor, v: Tensor) -> None:
    """Copy K and V [B, S, heads, head_dim], normalised and rotated, to the chunk's slots."""
    tokens, capacity, sink = k.shape[1], cache.cache_size, cache.sink_tokens
    done = 0
    while done < tokens:  # up to three runs of slots: in the sink, to the end, from the sink on
        first = slot(where.ring.chunk_start + done, sink, capacity)
        run = min(tokens - done, (sink if first < sink else capacity) - first)
        for memory, new in ((cache.k, k), (cache.v, v)):
            memory[:, first : first + run].copy_(new[:, done : done + run])
        done += run


def _turn(cache: Any, direction: int) -> None:
    """Turn all but the sink from the order of time to that of the ring (1), or back (-1)."""
    received, _ = cache._read_indices()
    capacity, sink = cache.cache_size, cache.sink_tokens
    steps = (received - capacity) % (capacity - sink) if received > capacity else 0
    if steps:
        for memory in (cache.k, cache.v):
            recent = memory[:, sink:]
            recent.copy_(recent.roll(direction * steps, dims=1))
