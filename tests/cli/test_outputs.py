"""Files that commands write: what can't be written later is one line, and everything else is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_video import SMALL

from lingbot_kernels.benchmarks import rows
from lingbot_kernels.benchmarks.environment import Environment
from lingbot_kernels.benchmarks.latents_file import LatentsFile

OUTPUTS = {"--json": "r.json", "--plot": "r.png", "--save-latents": "l.safetensors"}


@pytest.fixture
def full_later(monkeypatch):
    """Disks that fill while the command works: nothing is refused beforehand."""
    for module in ("lingbot_kernels.commands._outputs", "lingbot_kernels.files", "lingbot_kernels.benchmarks.rows"):
        monkeypatch.setattr(f"{module}.check_output", lambda path, **more: None)


@pytest.mark.parametrize("broken", OUTPUTS)
def test_what_a_rollout_can_not_write_costs_nothing_else(broken, invoke, tmp_path, full_later):
    Path(OUTPUTS[broken]).symlink_to("/dev/full")
    given = [word for option, name in OUTPUTS.items() for word in (option, name)]
    result = invoke("rollout", *SMALL, "--chunks", 2, "--quiet", *given, code=1)
    assert "Milliseconds per chunk" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line == f"Error: {broken}: {OUTPUTS[broken]}: can't be written: No space left on device"
    for option, name in OUTPUTS.items():
        assert Path(name).is_symlink() == (option == broken)
        assert option == broken or Path(name).stat().st_size > 100
    assert not list(tmp_path.glob(".*"))


def test_one_file_for_two_options_is_refused(invoke, tmp_path):
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (9, 1, 1)))
    (tmp_path / "link.npy").symlink_to("poses.npy")
    for given in (
        ("--json", "r.png", "--plot", "./r.png"),
        ("--poses", "poses.npy", "--save-latents", "link.npy"),
        ("--save-latents", "poses.npy", "--poses", "poses.npy"),
    ):
        line = invoke("rollout", *SMALL, *given, code=2).stderr
        assert given[0] in line and given[2] in line and "must be two" in line
    result = invoke("rollout", *SMALL, "--chunks", 1, "--quiet", "--json", "/dev/null")
    assert "Milliseconds per chunk" in result.stdout


def test_latents_without_space_are_refused_before_the_rollout(invoke, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    line = invoke("rollout", *SMALL, "--chunks", 2, "--save-latents", "l.npy", code=2).stderr
    assert "--save-latents" in line and "needs 6144 bytes, must be at most the 100 free there" in line


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_come_chunk_by_chunk(suffix, dtype, tmp_path):
    path = tmp_path / f"latents{suffix}"
    whole = torch.randn(1, 5, 7, 3, 2, dtype=dtype)
    with LatentsFile(path, tuple(whole.shape), dtype) as file:
        for first, last in ((0, 3), (3, 4), (4, 7)):
            file.write(whole[:, :, first:last])
            assert not path.exists()
    assert file.error is None
    found = torch.from_numpy(np.load(path)) if suffix == ".npy" else load_file(path)["latents"]
    assert found.dtype == dtype and torch.equal(found, whole)


def test_latents_that_end_early_leave_no_file(tmp_path):
    path = tmp_path / "latents.npy"
    path.write_text("before")
    with LatentsFile(path, (1, 2, 4, 3, 2), torch.float32) as file:
        file.write(torch.zeros(1, 2, 3, 3, 2))
        with pytest.raises(ValueError, match=r"latents: got \[1, 2, 3, 3, 2\] after 3 frames"):
            file.write(torch.zeros(1, 2, 3, 3, 2))
    assert "got 3 of 4 frames" in str(file.error)
    with pytest.raises(KeyboardInterrupt), LatentsFile(path, (1, 2, 4, 3, 2), torch.float32):
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_rows_that_can_not_be_written_are_said(tmp_path, full_later):
    path, said = tmp_path / "rows.jsonl", []
    path.symlink_to("/dev/full")
    environment = Environment("Some GPU", "1", "2.11", "13.0", "3.6", "abc", "2026-01-01T00:00:00Z")
    file = rows.RowFile(environment, "kernels", path, said.append, lambda row: f"line of {row.op}")
    made = [
        rows.Row("kernels", "s1", op, "cuda", False, (1, 1, 1), "bfloat16", 1, 1, "green", 1)
        for op in ("rms_norm", "linear_gelu")
    ]
    file.report(made[0])
    assert said == ["line of rms_norm"] and file.error is not None
    file.report(made[1])
    file.close()
    assert [json.loads(line)["op"] for line in said[2:4]] == ["rms_norm", "linear_gelu"]
    assert said[4] == f"0 rows appended to {path}"
    path.unlink()
    file.close()
    assert file.error is None and [row["op"] for row in rows.read_rows(path)] == ["rms_norm", "linear_gelu"]


def test_a_file_of_rows_that_can_not_be_written_is_refused_first(tmp_path):
    environment = Environment("Some GPU", "1", "2.11", "13.0", "3.6", "abc", "2026-01-01T00:00:00Z")
    with pytest.raises(ValueError, match="is a folder"):
        rows.RowFile(environment, "kernels", tmp_path, print, str)


def test_a_trace_that_can_not_be_kept_leaves_the_table(invoke, tmp_path, full_later):
    Path("t.json").symlink_to("/dev/full")
    given = ("profile", "op", "rms_norm", "--device", "cpu", "--calls", 2)
    result = invoke(*given, "--trace", "t.json", "--json", "p.json", code=1)
    assert "rms_norm" in result.stdout and json.loads(Path("p.json").read_text())["what"] == "rms_norm"
    assert result.stderr.splitlines()[-1] == "Error: --trace: t.json: can't be written: No space left on device"


def test_a_prompt_file_is_judged_by_its_header(invoke, tmp_path):
    """Files as large as they say, and sparse: nothing of them is read."""
    for length, reason in ((2**34, "must have at most"), (2**20 - 1, "must hold at most")):
        about = {"dtype": "F32", "shape": [length, 64], "data_offsets": [0, length * 256]}
        header = json.dumps({"prompt_embeds": about}).encode()
        with (tmp_path / "p.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + length * 256)
        line = invoke("rollout", *SMALL, "--prompt-embeds", "p.safetensors", code=2).stderr
        assert "--prompt-embeds" in line and reason in line
    many = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(999)}).encode()
    (tmp_path / "p.safetensors").write_bytes(len(many).to_bytes(8, "little") + many)
    line = invoke("rollout", *SMALL, "--prompt-embeds", "p.safetensors", code=2).stderr
    assert "990 more" in line and len(line) < 500


def test_repeats_do_not_become_memory(invoke):
    line = invoke("rollout", *SMALL, "--chunks", 10**9, code=2).stderr
    assert "--chunks" in line and "100000" in line
    result = invoke("rollout", *SMALL, "--chunks", 1, "--quiet", "--actions", "w*999999999")
    assert "Milliseconds per chunk" in result.stdout
