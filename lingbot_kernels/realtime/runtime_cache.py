"""Named, bounded and counted stores for what several forwards of a chunk, or several chunks, share."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and objects with `layers`."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "layers"):
        yield from tensors_in(value.layers)
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def tensor_bytes(value: Any) -> int:
    """Bytes of `tensors_in(value)`, each tensor object counted once."""
    return sum({id(x): x.numel() * x.element_size() for x in tensors_in(value)}.values())


class TensorIdentity:
    """A key that equals itself only for the same, unchanged tensor.

    It holds the tensor alive, and its storage apart from it, so that neither the object's id nor the address can be
    reused while the key exists; the version counter tells of changes in place. A tensor made under
    `torch.inference_mode` has no version counter: it equals nothing, since a change to it could not be seen.
    """

    __slots__ = ("_address", "_storage", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._storage = tensor.untyped_storage()
        self._address = tensor.data_ptr()
        self._version = None if tensor.is_inference() else tensor._version

    def __hash__(self) -> int:
        return id(self._tensor)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TensorIdentity)
            and self._tensor is other._tensor
            and self._version is not None
            and self._version == other._version
            and self._address == other._address
        )


@dataclass(frozen=True)
class StoreStats:
    """Counts since the store was made or cleared; bytes held now."""

    hits: int
    misses: int
    entries: int
    bytes: int


class Store:
    """At most `max_entries` values by key, the least recently used one evicted first. A disabled store keeps
    nothing.

    Attributes:
        observe: called for a context manager around each computation of a value.
    """

    def __init__(self, max_entries: int, enabled: bool = True) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries: got {max_entries}, must be 1 or more")
        self.max_entries = max_entries
        self.enabled = enabled
        self.hits = self.misses = 0
        self.observe: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        self.clear()

    def get_or_compute(
        self, key: Hashable, compute: Callable[[], Any], refill: Callable[[Any], Any] | None = None
    ) -> Any:
        """The value of `key`, from the store or from `compute`.

        On a miss, room is made first, so that two generations of a large value never coexist. The value that makes room
        goes to `refill`, where given, which may return it with new contents (its addresses then stay, as a captured
        CUDA graph needs) or None to have `compute` called. Where they raise, nothing is stored; a value whose contents
        are half new is kept without a key, as room for the next one.
        """
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        if not self.enabled:
            with self.observe():
                return compute()
        evicted, made_room = None, False
        while len(self._entries) + len(self._spares) >= self.max_entries:
            evicted, made_room = self._evict(), True
        try:
            with self.observe():
                value = None if evicted is None or refill is None else refill(evicted)
                if value is None:
                    evicted = None
                    value = compute()
        except BaseException:
            if evicted is not None and refill is not None:
                self._spares.append(evicted)
            raise
        self._entries[key] = value
        self._new[key] = made_room
        return value

    def mark(self) -> None:
        """What `undo` goes back to."""
        self._marked = (self.hits, self.misses, self.max_entries)
        self._new.clear()

    def undo(self) -> None:
        """Take back what was counted and stored since `mark`. What was evicted doesn't come back; the memory of what
        took its place is kept for the next value.
        """
        self.hits, self.misses, self.max_entries = self._marked
        for key, made_room in self._new.items():
            value = self._entries.pop(key)
            if made_room:
                self._spares.append(value)
        self._new.clear()

    def resize(self, max_entries: int) -> None:
        """Keep at most `max_entries` from now on."""
        self.max_entries = max_entries
        while len(self._entries) + len(self._spares) > max_entries:
            self._evict()

    def values(self) -> Iterator[Any]:
        return iter(self._entries.values())

    def held(self) -> list[Any]:
        """Every value, those kept as room for another included."""
        return [*self._entries.values(), *self._spares]

    def drop(self) -> None:
        """Forget every value; the counts go on."""
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._spares: list[Any] = []  # values without a key: memory for the next ones
        self._new: dict[Hashable, bool] = {}  # keys stored since the mark, and whether another value made room

    def clear(self) -> None:
        """Forget every value and count."""
        self.drop()
        self.hits = self.misses = 0
        self.mark()

    def nbytes(self) -> int:
        return sum(tensor_bytes(value) for value in self.held())

    def stats(self) -> StoreStats:
        return StoreStats(self.hits, self.misses, len(self.held()), self.nbytes())

    def _evict(self) -> Any:
        if self._spares:
            return self._spares.pop()
        key, value = self._entries.popitem(last=False)  # and let go of the key, which may hold a large tensor
        self._new.pop(key, None)
        return value


class RuntimeCache:
    """The stores of one session by name: "rope", "time_embeddings", "camera_modulation" and "text"."""

    def __init__(self, **stores: Store) -> None:
        self._stores = stores

    def __getitem__(self, name: str) -> Store:
        return self._stores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stores)

    def mark(self) -> None:
        for store in self._stores.values():
            store.mark()

    def undo(self) -> None:
        for store in self._stores.values():
            store.undo()

    def clear(self) -> None:
        for store in self._stores.values():
            store.clear()

    def nbytes(self) -> int:
        return sum(store.nbytes() for store in self._stores.values())

    def stats(self) -> dict[str, StoreStats]:
        return {name: store.stats() for name, store in self._stores.items()}
