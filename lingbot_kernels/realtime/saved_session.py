"""A session in a folder, to go on in another process or on another device.

What a session can't make again is kept, exactly: each layer's keys and values of the window, the position, and what it
was made with. Everything else (text K/V, camera modulation, time embeddings, RoPE table, CUDA graphs) is made again by
the next forward, with the same bits. `session.json` names the files that belong together and is written last, so a
folder holds the session before, or the new one, and never half of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lingbot_kernels._version import __version__
from lingbot_kernels.files import check_output, read_json, replacing, write_text
from lingbot_kernels.realtime.kv_cache import CacheLayout, KVCache, RingMemory, ring_parts
from lingbot_kernels.scalars import as_count

if TYPE_CHECKING:
    from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

FORMAT = 1
FILE = "session.json"
_LAYER_FILE = re.compile(r"kv-[0-9a-f]{8}-\d+\.safetensors")
_SHARED = ("num_layers", "batch", "heads", "head_dim", "grid", "window_frames", "sink_frames")


class SessionModel(Protocol):
    """What is asked of the model whose session it is; `CausalLingBotTransformer` has it."""

    shard_group: Any

    @property
    def session_owner(self) -> object: ...

    def session_facts(self) -> dict[str, Any]:
        """Name -> plain value of all that must be the same where the session goes on, the weights apart."""

    def weights_fingerprint(self) -> str: ...

    def cache_layout(self, batch: int, grid: tuple[int, int]) -> CacheLayout: ...

    def session_memory(self, state: RealtimeCausalDiTState, layout: CacheLayout) -> RingMemory | None: ...


class SessionOwner:
    """Whose a session is: an identity that leads to its model as long as that exists."""

    def __init__(self, model: SessionModel | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def model(self) -> SessionModel | None:
        return None if self._model is None else self._model()

    def __reduce__(self) -> tuple[type[SessionOwner], tuple[()]]:
        """A copy of a model owns sessions of its own."""
        return SessionOwner, ()


def save(state: RealtimeCausalDiTState, owner: object, folder: Path) -> None:
    """`RealtimeCausalDiTState.save`, which documents it."""
    cache = state.kv_cache
    content: dict[str, Any] = {"format": FORMAT, "lingbot_kernels": __version__, "switches": state.switches}
    if cache is None:
        _write(folder, {**content, "session": None}, None)
        return
    model = owner.model() if isinstance(owner, SessionOwner) else None
    if model is None:
        raise ValueError("state: got a session whose model is gone or is no CausalLingBotTransformer, must have one")
    session = {
        **{name: getattr(cache.layout, name) for name in _SHARED},
        "ring": cache.ring.state(),
        "unfinished": state.unfinished,
        "model": model.session_facts(),
        "weights": model.weights_fingerprint(),
        "rank": model.shard_group.rank,
    }
    if state.context_update is not None:
        state.context_update.synchronize()
    _write(_own(folder, model), {**content, "session": session}, cache)


def _own(folder: Path, model: SessionModel) -> Path:
    """The folder of this rank."""
    group = model.shard_group
    return folder if group.ranks == 1 else folder / f"rank-{group.rank}-of-{group.ranks}"


def _write(folder: Path, content: dict[str, Any], cache: KVCache | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists() and any(not _LAYER_FILE.fullmatch(name) for name in os.listdir(folder)):
        raise ValueError(f"folder: got {folder}, which holds other things, must be new, empty or of a saved session")
    visible = 0 if cache is None else cache.ring.num_visible
    nbytes = 0 if cache is None else cache.nbytes() // cache.layout.shape[1] * visible
    check_output(folder / FILE, nbytes=nbytes)
    files: list[str] = []
    try:
        if cache is not None:
            series = secrets.token_hex(4)
            for index, layer in enumerate(cache.layers):
                files.append(f"kv-{series}-{index}.safetensors")
                part = {name: held[:, :visible].cpu().contiguous() for name, held in ring_parts(layer).items()}
                with replacing(folder / files[-1]) as file:
                    _save_file(part, file)
            content = {**content, "session": {**content["session"], "files": files}}
        write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    except BaseException:
        named = (folder / FILE).read_text(encoding="utf-8") if (folder / FILE).exists() else ""
        for name in files:
            if name not in named:  # else the interrupt came when all was done
                (folder / name).unlink(missing_ok=True)
        raise
    for name in os.listdir(folder):
        if _LAYER_FILE.fullmatch(name) and name not in files:
            (folder / name).unlink(missing_ok=True)


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A session as its folder has it, once everything about it has been checked."""

    state: RealtimeCausalDiTState  # fresh, with its switches
    layout: CacheLayout | None = None
    ring: dict[str, Any] = dataclasses.field(default_factory=dict)
    unfinished: tuple[int, int] | None = None
    files: list[Path] = dataclasses.field(default_factory=list)


@torch.inference_mode(False)
@torch.no_grad()
def load(
    kind: type[RealtimeCausalDiTState], folder: Path, model: SessionModel, check_weights: bool
) -> RealtimeCausalDiTState:
    """`RealtimeCausalDiTState.load`, which documents it."""
    saved, error = None, None
    try:
        saved = _read(kind, _own(folder, model), model, check_weights)
    except (ValueError, OSError) as raised:
        error = raised
    # Ranks that differ must not wait for each other in what follows.
    model.shard_group.agree({"the saved session": str(error) if saved is None else f"{saved.ring}, {saved.unfinished}"})
    if saved is None:
        assert error is not None
        raise error
    state = saved.state
    if saved.layout is None:
        return state
    state.begin(saved.layout, model.session_memory(state, saved.layout), owner=model.session_owner)
    assert state.kv_cache is not None
    state.kv_cache.ring.set_state(saved.ring)
    if saved.unfinished is not None:
        first, tokens = (frames * saved.layout.frame_tokens for frames in saved.unfinished)
        state.kv_cache.ring.unfinished = first, tokens
    for path, layer in zip(saved.files, state.kv_cache.layers, strict=True):
        with _opened(path) as file:
            for name, held in ring_parts(layer).items():
                values = file.get_tensor(name)
                held[:, : values.shape[1]].copy_(values)
    return state


def _read(kind: type[RealtimeCausalDiTState], folder: Path, model: SessionModel, check_weights: bool) -> _Saved:
    """What the folder holds, checked against the model; nothing is allocated yet.

    Raises:
        ValueError, OSError: naming the file, and what differs.
    """
    path = folder / FILE
    if not path.is_file():
        ranks = sorted(each.name for each in folder.glob("rank-*-of-*"))
        hint = f"; it has {', '.join(ranks)}, a session of several ranks" if ranks else ""
        raise ValueError(f"folder: got {folder}, without a {FILE}, must hold a session that was saved to the end{hint}")
    try:
        saved = _understood(kind, folder, read_json(path), model, check_weights)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: got something else ({error!r}), must be a saved session") from error
    except ValueError as error:
        raise _of(path, error) from error
    if saved.layout is not None:
        _check_files(saved)
    return saved


def _understood(
    kind: type[RealtimeCausalDiTState], folder: Path, content: Any, model: SessionModel, check_weights: bool
) -> _Saved:
    """The content of `session.json`, held against the model; what is no such content raises one of several errors."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"format: got {content.get('format') if isinstance(content, dict) else None}, must be {FORMAT}"
        )
    state, session = _fresh(kind, content["switches"]), content["session"]
    if session is None:
        return _Saved(state)
    rows, columns = (as_count("grid", count, 1) for count in session["grid"])
    layout = model.cache_layout(as_count("batch", session["batch"], 1), (rows, columns))
    shared = {name: getattr(layout, name) for name in _SHARED}
    _compare(session, {**shared, "grid": list(layout.grid), "rank": model.shard_group.rank})
    _compare(session["model"], model.session_facts())
    layout.empty_ring().set_state(session["ring"])
    if any(tokens % layout.frame_tokens for tokens in session["ring"].values()):
        raise ValueError(f"ring: got {session['ring']}, must be whole frames of {layout.frame_tokens} tokens")
    files = [folder / name for name in session["files"]]
    if len(files) != layout.num_layers:
        raise ValueError(f"files: got {len(files)}, must be one for each of {layout.num_layers} layers")
    if any(not _LAYER_FILE.fullmatch(file.name) or file.parent != folder for file in files):
        raise ValueError(f"files: got {session['files']}, must be those that save writes")
    if check_weights and session["weights"] != model.weights_fingerprint():
        raise ValueError(
            "weights: got others than the session's, must be the same; check_weights=False goes on with them, as "
            "after an adapter was switched"
        )
    return _Saved(state, layout, session["ring"], _unfinished(session["unfinished"]), files)


def _fresh(kind: type[RealtimeCausalDiTState], switches: dict[str, Any]) -> RealtimeCausalDiTState:
    """A session of these switches, which must be those that one has."""
    usual = kind().switches
    if {name: type(value) for name, value in switches.items()} != {name: type(value) for name, value in usual.items()}:
        raise ValueError(f"switches: got {switches}, must be such as {usual}")
    return kind(**switches)


def _unfinished(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    first, frames = value
    return as_count("unfinished", first, 0), as_count("unfinished", frames, 1)


def _of(path: Path, error: ValueError) -> ValueError:
    return ValueError(f"{path}: {error}")


def _compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{name}: got {found.get(name)}, must be {value}" for name, value in wanted.items() if found.get(name) != value
    ]
    if different:
        raise ValueError(f"model: got one that differs from the session's, must be alike: {'; '.join(different)}")


def _check_files(saved: _Saved) -> None:
    """Every layer's file is whole, and has the shape and dtype that it must: by the headers alone."""
    layout = saved.layout
    assert layout is not None
    ring = layout.empty_ring()
    ring.set_state(saved.ring)
    batch, _, heads, head_dim = layout.shape
    whole = [batch, ring.num_visible, heads, head_dim]
    wanted = {"k": (layout.k_dtype or layout.dtype, whole), "v": (layout.dtype, whole)}
    if layout.k_dtype is not None:
        wanted["k_scale"] = (torch.float32, whole[:3])
    for path in saved.files:
        with _opened(path) as file:
            for name, (dtype, shape) in wanted.items():
                part = file.get_slice(name)
                empty = file.get_slice(name)[:, :0]
                if part.get_shape() != shape or empty.dtype != dtype:
                    raise ValueError(f"{path}: got {name} of {empty.dtype} {part.get_shape()}, must be {dtype} {shape}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: got a damaged file or none, must be whole: {error}") from error
