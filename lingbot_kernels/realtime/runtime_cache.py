"""Named, bounded and counted stores for what several forwards of a chunk, or several chunks, share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


_NO_KEY = object()


class _Entry:
    """A value by its key; without one, memory for the next value.

    Attributes:
        new: whether it was stored since the store's mark.
        replaced: whether another value made room for it.
        used: when it was last asked for.
    """

    __slots__ = ("key", "new", "replaced", "used", "value")

    def __init__(self, value: Any) -> None:
        self.key, self.value, self.new, self.replaced, self.used = _NO_KEY, value, True, False, 0


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
        self.observe: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        self.hits = self.misses = self._clock = 0
        self._entries: list[_Entry] = []
        self.mark()

    def get_or_compute(
        self, key: object, compute: Callable[[], Any], refill: Callable[[Any], Any] | None = None
    ) -> Any:
        """The value of `key`, from the store or from `compute`.

        On a miss, room is made first, so that two generations of a large value never coexist. The value that makes room
        goes to `refill`, where given, which may return it with new contents (its addresses then stay, as a captured
        CUDA graph needs) or None to have `compute` called. Where they raise, nothing is stored, and what is half new
        has no key.
        """
        self._clock += 1
        found = self._find(key)
        if found is not None:
            self.hits += 1
            found.used = self._clock
            return found.value
        self.misses += 1
        if not self.enabled:
            with self.observe():
                return compute()
        room = self._oldest() if len(self._entries) >= self.max_entries else None
        full = room is not None
        if room is not None:
            room.key = _NO_KEY  # and let go of the key, which may hold a large tensor
        with self.observe():
            value = None if room is None or refill is None else refill(room.value)
            if value is None:
                self._entries = [entry for entry in self._entries if entry is not room]
                room = None
                value = compute()
        if room is None:
            room = _Entry(value)
            self._entries.append(room)
        room.value, room.new, room.replaced, room.used = value, True, full, self._clock
        room.key = key
        return value

    def mark(self) -> None:
        """What `undo` goes back to."""
        self._marked = (self.hits, self.misses, self.max_entries)
        for entry in self._entries:
            entry.new = entry.replaced = False

    def undo(self) -> None:
        """Take back what was counted and stored since `mark`. What was evicted doesn't come back; the memory of what
        replaced it is kept for the next value.
        """
        self.hits, self.misses, self.max_entries = self._marked
        for entry in self._entries:
            if entry.new:
                entry.key = _NO_KEY
        self._entries = [entry for entry in self._entries if entry.replaced or not entry.new]

    def resize(self, max_entries: int) -> None:
        """Keep at most `max_entries` from now on."""
        self.max_entries = max_entries
        while len(self._entries) > max_entries:
            self._entries.remove(self._oldest())

    def values(self) -> Iterator[Any]:
        return (entry.value for entry in self._entries if entry.key is not _NO_KEY)

    def held(self) -> list[Any]:
        """Every value in memory, also one without a key."""
        return [entry.value for entry in self._entries]

    def drop(self) -> None:
        """Forget every value; the counts go on."""
        self._entries = []

    def clear(self) -> None:
        """Forget every value and count."""
        self.drop()
        self.hits = self.misses = 0
        self.mark()

    def nbytes(self) -> int:
        return sum(tensor_bytes(value) for value in self.held())

    def stats(self) -> StoreStats:
        return StoreStats(self.hits, self.misses, len(self._entries), self.nbytes())

    def _find(self, key: object) -> _Entry | None:
        for entry in self._entries:
            if entry.key == key:
                return entry
        return None

    def _oldest(self) -> _Entry:
        return min(self._entries, key=lambda entry: (entry.key is not _NO_KEY, entry.used))


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
