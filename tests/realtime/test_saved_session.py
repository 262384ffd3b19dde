"""A session saved and resumed goes on with the bits of one never interrupted; what can't go on says why by name."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.quantization import recipe_of
from lingbot_kernels.realtime import saved_session

SMALL = {"num_layers": 2, "window_frames": 9, "frames_per_chunk": 3, "sink_frames": 3}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, int8: str | None = None, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny", **{**SMALL, **overrides}), dtype=dtype)
    if int8 is not None:
        model.quantize(recipe_of(int8))
    return model


def inputs_of(model: Any, index: int, batch: int = 1, size: tuple[int, int] = (4, 6)) -> dict[str, Any]:
    """A chunk's inputs; the prompt changes at chunk 3."""
    cfg, generator = model.config, torch.Generator().manual_seed(100 + index)
    frames = cfg.frames_per_chunk
    prompt = torch.Generator().manual_seed(index // 3)
    return {
        "noise": torch.randn(batch, 16, frames, *size, generator=generator),
        "renoise": torch.randn(3, batch, 16, frames, *size, generator=generator),
        "text": torch.randn(batch, 5, cfg.text_dim, generator=prompt),
        "camera": torch.randn(batch, 384, frames, *size, generator=generator) if cfg.camera else None,
    }


def roll(
    model: Any, state: RealtimeCausalDiTState, first: int, last: int, start: int | None = None, **shape: Any
) -> Tensor:
    stage = CausalDenoisingStage(model)
    chunks = []
    for index in range(first, last):
        given = inputs_of(model, index, **shape)
        chunks.append(stage.denoise_chunk(state, start_frame=start if index == 0 else None, **given))
    return torch.cat(chunks, dim=2)


CASES: dict[str, dict[str, Any]] = {
    "one chunk": {"chunks": 1},
    "window filling": {"chunks": 2},
    "window full, ring turned": {"chunks": 5},
    "begun at frame 21": {"chunks": 4, "start": 21},
    "two videos, another grid": {"chunks": 4, "shape": {"batch": 2, "size": (6, 2)}},
    "no sink": {"chunks": 4, "model": {"sink_frames": 0}},
    "bfloat16": {"chunks": 4, "model": {"dtype": torch.bfloat16}},
    "float64": {"chunks": 3, "model": {"dtype": torch.float64}},
    "no camera": {"chunks": 4, "model": {"camera": False}},
    "caches off": {"chunks": 4, "switches": {"camera_cache": False, "text_cache": False, "rope_cache": False}},
    "two frames a chunk": {"chunks": 4, "model": {"frames_per_chunk": 2, "num_layers": 3}},
    "int8": {"chunks": 4, "model": {"int8": "int8", "dtype": torch.bfloat16}},
    "int8, K of the ring too": {"chunks": 4, "model": {"int8": "int8_qk", "dtype": torch.bfloat16}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_session_goes_on_with_the_same_bits(name, tmp_path):
    case = CASES[name]
    options, shape = case.get("model", {}), case.get("shape", {})
    model, switches, chunks = make_model(**options), case.get("switches", {}), case["chunks"]
    state = RealtimeCausalDiTState(**switches)
    roll(model, state, 0, chunks, case.get("start"), **shape)
    state.save(tmp_path / "session")
    other = make_model(**options)
    resumed = RealtimeCausalDiTState.load(tmp_path / "session", other)
    assert resumed.switches == state.switches and resumed.next_frame == state.next_frame
    assert resumed.chunk_start_frame == state.chunk_start_frame
    want = roll(model, state, chunks, chunks + 3, **shape)
    assert torch.equal(roll(other, resumed, chunks, chunks + 3, **shape), want)
    assert torch.isfinite(want).all()


def test_another_process_goes_on(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    model.save_pretrained(tmp_path / "model")
    roll(model, state, 0, 4)
    state.save(tmp_path / "session")
    program = (
        "import sys, torch\nsys.path.insert(0, sys.argv[2])\nimport test_saved_session as t\n"
        "from pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "model = t.CausalLingBotTransformer.from_pretrained(folder / 'model', dtype=torch.float32)\n"
        "state = t.RealtimeCausalDiTState.load(folder / 'session', model)\n"
        "torch.save(t.roll(model, state, 4, 6), folder / 'latents.pt')"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, str(tmp_path), here], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "latents.pt"), roll(model, state, 4, 6))


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_chunk_under_way_is_gone_on_with(chunks, steps, tmp_path):
    """Saved between two denoise steps: the caller has the latents, the session the rest."""
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, chunks) if chunks else None
    given = inputs_of(model, chunks)
    latents = torch.cat([given["noise"], torch.zeros(1, 20, 3, 4, 6)], dim=1)

    def step(model: Any, state: RealtimeCausalDiTState, index: int) -> Tensor:
        return model(
            latents, given["text"], 1000.0 - 250 * index, state=state, start_frame=3 * chunks, camera=given["camera"],
            step_index=index,
        )  # fmt: skip

    for index in range(steps):
        step(model, state, index)
    state.save(tmp_path)
    other = make_model()
    resumed = RealtimeCausalDiTState.load(tmp_path, other)
    for index in range(steps, 4):
        assert torch.equal(step(other, resumed, index), step(model, state, index))
    assert torch.equal(roll(other, resumed, chunks + 1, chunks + 3), roll(model, state, chunks + 1, chunks + 3))


def test_a_context_update_may_come_after_the_load(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 3)
    given = inputs_of(model, 3)
    chunk = CausalDenoisingStage(model).denoise_chunk(state, update_context=False, **given)
    state.save(tmp_path)
    other = make_model()
    resumed = RealtimeCausalDiTState.load(tmp_path, other)
    for each, session in ((model, state), (other, resumed)):
        CausalDenoisingStage(each).update_context(session, chunk, text=given["text"], camera=given["camera"])
    assert torch.equal(roll(other, resumed, 4, 6), roll(model, state, 4, 6))


def fail_within(model: Any, state: RealtimeCausalDiTState, index: int) -> None:
    """The chunk's first forward fails in its last block, when the ring has been written."""

    def raises(*_: Any) -> None:
        raise InterruptedError

    hook = model.blocks[-1].register_forward_pre_hook(raises)
    try:
        with pytest.raises(InterruptedError):
            roll(model, state, index, index + 1)
    finally:
        hook.remove()


def test_an_unfinished_chunk_stays_unfinished(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 3)
    fail_within(model, state, 3)
    assert state.unfinished == (9, 3)
    state.save(tmp_path)
    other = make_model()
    resumed = RealtimeCausalDiTState.load(tmp_path, other)
    assert resumed.unfinished == (9, 3)
    earlier = inputs_of(other, 2)
    with pytest.raises(ValueError, match="must be 9 for 3"):
        CausalDenoisingStage(other).update_context(resumed, earlier["noise"], text=earlier["text"])
    assert torch.equal(roll(other, resumed, 3, 5), roll(model, state, 3, 5))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "disposed"])
def test_a_session_that_has_not_begun_is_one_that_begins(used, tmp_path):
    model, state = make_model(), RealtimeCausalDiTState(camera_cache=False, time_entries=3)
    if used:
        roll(model, state, 0, 2)
        state.dispose()
    switches = state.switches
    state.save(tmp_path)
    resumed = RealtimeCausalDiTState.load(tmp_path, model)
    assert resumed.kv_cache is None and resumed.switches == switches
    assert torch.equal(roll(model, resumed, 0, 2), roll(model, state, 0, 2))
    resumed.dispose()
    resumed.save(tmp_path)


@pytest.fixture
def saved(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 2)
    state.save(tmp_path / "session")
    return model, state, tmp_path / "session"


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("weights", {"seed": 1}),
    ("num_layers: got 2, must be 3", {"num_layers": 3}),
    ("window_frames: got 9, must be 12", {"window_frames": 12}),
    ("sink_frames: got 3, must be 0", {"sink_frames": 0}),
    ("dtype: got torch.float32, must be torch.bfloat16", {"dtype": torch.bfloat16}),
    ("rope_theta: got 10000.0, must be 5000.0", {"rope_theta": 5000.0}),
    ("camera: got True, must be False", {"camera": False}),
    ("recipe: got None, must be Int8Recipe", {"dtype": torch.bfloat16, "int8": "int8"}),
]


@pytest.mark.parametrize(("reason", "options"), OTHERS, ids=[reason.split(":")[0] for reason, _ in OTHERS])
def test_another_model_is_refused_by_what_differs(reason, options, saved):
    with pytest.raises(ValueError) as refused:
        RealtimeCausalDiTState.load(saved[2], make_model(**options))
    assert reason in str(refused.value) and str(saved[2]) in str(refused.value)


def test_other_weights_are_taken_where_that_is_wanted(saved):
    model, state, folder = saved
    with torch.no_grad():
        model.blocks[0].ffn[0].weight.mul_(1.5)
    with pytest.raises(ValueError, match="check_weights=False"):
        RealtimeCausalDiTState.load(folder, model)
    resumed = RealtimeCausalDiTState.load(folder, model, check_weights=False)
    assert torch.equal(roll(model, resumed, 2, 4), roll(model, state, 2, 4))


def layer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("kv-*"))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "session.json").read_text())
        change(content)
        (folder / "session.json").write_text(json.dumps(content))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no session.json": (lambda folder: (folder / "session.json").unlink(), "that was saved to the end"),
    "a layer is missing": (lambda folder: layer_files(folder)[1].unlink(), "got a damaged file or none"),
    "a layer is cut": (lambda folder: os.truncate(layer_files(folder)[1], 1000), "damaged"),
    "a layer is empty": (lambda folder: layer_files(folder)[0].write_bytes(b""), "damaged"),
    "json is cut": (lambda folder: (folder / "session.json").write_text('{"format": 1,'), "not a JSON file"),
    "json is a list": (lambda folder: (folder / "session.json").write_text("[]"), "format: got None, must be 1"),
    "a later format": (edit(lambda content: content.update(format=2)), "format: got 2, must be 1"),
    "no session": (edit(lambda content: content.pop("session")), "must be a saved session"),
    "a switch too many": (edit(lambda content: content["switches"].update(x=1)), "switches: got"),
    "a file elsewhere": (edit(lambda content: content["session"].update(files=["../a", "b"])), "must be those that"),
    "a layer too few": (edit(lambda content: content["session"]["files"].pop()), "files: got 1, must be one for each"),
    "a longer chunk": (edit(lambda content: content["session"]["ring"].update(chunk_tokens=99)), "ring: got"),
    "more received": (edit(lambda content: content["session"]["ring"].update(origin=6)), "must be torch.float32"),
    "another grid": (edit(lambda content: content["session"].update(grid=[9, 9])), "must be whole frames of 81"),
    "a negative grid": (edit(lambda content: content["session"].update(grid=[-2, 3])), "must"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named(name, saved):
    model, _, folder = saved
    damage, reason = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError) as refused:
        RealtimeCausalDiTState.load(folder, model)
    assert reason in str(refused.value) and str(folder) in str(refused.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_content_is_refused_or_the_session(data, saved):
    model, state, folder = saved
    path = folder / "session.json"
    text = path.read_text()
    content = json.loads(text)
    part = data.draw(st.sampled_from([content, content["switches"], content["session"], content["session"]["ring"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(plain)
    try:
        path.write_text(json.dumps(content))
        resumed = RealtimeCausalDiTState.load(folder, model)
        assert resumed.next_frame in (state.next_frame, 0) or part is content["session"]["ring"]
    except ValueError as refused:
        assert str(folder) in str(refused) or "max_entries" in str(refused)
    finally:
        path.write_text(text)


def test_a_save_that_fails_leaves_the_session_before(saved, monkeypatch):
    model, state, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    roll(model, state, 2, 3)
    write = saved_session._save_file
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        calls = []

        def fail(tensors: Any, path: Path, failure: BaseException = failure, calls: list[int] = calls) -> None:
            calls.append(1)
            write(tensors, path)
            if len(calls) == 2:
                raise failure

        monkeypatch.setattr(saved_session, "_save_file", fail)
        with pytest.raises(type(failure)):
            state.save(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr(saved_session, "_save_file", write)
    (folder / "kv-0123abcd-0.safetensors").write_text("left by a process that was killed")
    state.save(folder)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 3 and not names & (before.keys() - {"session.json"})
    assert RealtimeCausalDiTState.load(folder, model).next_frame == 9


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        state.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        state.save(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]


def test_without_space_nothing_is_written(tmp_path, monkeypatch):
    import shutil

    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    visible = 2 * 2 * 18 * 128 * 4  # layers, K and V, tokens of a chunk, width, bytes
    with pytest.raises(ValueError, match=f"needs {visible} bytes"):
        state.save(tmp_path / "session")
    assert list((tmp_path / "session").iterdir()) == []


def test_a_forward_under_way_is_not_saved(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    refused = []

    def save(*_: Any) -> None:
        for call in (lambda: state.save(tmp_path), lambda: copy.deepcopy(state)):
            with pytest.raises(ValueError, match=r"got one within a forward, must be (saved|copied) before or after"):
                call()
            refused.append(1)

    model.blocks[1].register_forward_pre_hook(save)
    roll(model, state, 0, 1)
    assert len(refused) == 2 * 5 and list(tmp_path.iterdir()) == []


def test_a_session_whose_model_is_gone_is_not_saved(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 1)
    del model
    with pytest.raises(ValueError, match="whose model is gone"):
        state.save(tmp_path)


@pytest.mark.parametrize("options", [{}, {"int8": "int8_qk", "dtype": torch.bfloat16}], ids=["plain", "int8_qk"])
@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_a_deep_copy_goes_on_by_itself(chunks, options):
    model, state = make_model(**options), RealtimeCausalDiTState(rope_cache=False)
    twin = RealtimeCausalDiTState(rope_cache=False)
    if chunks:
        roll(model, state, 0, chunks)
        roll(model, twin, 0, chunks)
    copied = copy.deepcopy(state)
    assert copied.switches == state.switches and copied.next_frame == state.next_frame
    want = roll(model, twin, chunks, chunks + 3)
    assert torch.equal(roll(model, copied, chunks, chunks + 3), want)
    assert torch.equal(roll(model, state, chunks, chunks + 3), want), "the copy wrote to the original's ring"


def test_an_unfinished_copy_is_unfinished():
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 3)
    fail_within(model, state, 3)
    copied = copy.deepcopy(state)
    assert copied.unfinished == (9, 3)
    assert torch.equal(roll(model, copied, 3, 5), roll(model, state, 3, 5))


COPIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "copy.copy": (copy.copy, "copy.deepcopy"),
    "pickle": (pickle.dumps, r"state.save\(folder\)"),
    "torch.save": (lambda state: torch.save(state, io.BytesIO()), r"state.save\(folder\)"),
    "in a list": (lambda state: pickle.dumps([1, {"session": state}]), r"state.save\(folder\)"),
}


@pytest.mark.parametrize("name", COPIES)
def test_other_copies_say_what_to_do(name):
    model, state = make_model(), RealtimeCausalDiTState()
    call, advice = COPIES[name]
    for chunks in (0, 1):
        roll(model, state, 0, chunks) if chunks else None
        with pytest.raises(TypeError, match=advice):
            call(state)


def test_a_copied_model_has_sessions_of_its_own(tmp_path):
    model, state = make_model(), RealtimeCausalDiTState()
    roll(model, state, 0, 2)
    state.save(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="another model"):
            roll(other, copy.deepcopy(state), 2, 3)
        resumed = RealtimeCausalDiTState.load(tmp_path, other)
        assert torch.equal(roll(other, resumed, 2, 3), roll(model, copy.deepcopy(state), 2, 3))
        resumed.save(tmp_path / "again")
