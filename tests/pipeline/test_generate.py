"""`lingbot-kernels generate`: real files, written and read back frame by frame, and what stops it in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lingbot_kernels.cli import main
from lingbot_kernels.components.video import VideoWriter

av = pytest.importorskip("av")

SIZE = ("--height", "32", "--width", "48")
PROMPT = ("--prompt", "a harbour at dawn")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["generate", *map(str, arguments)], prog_name="lingbot-kernels")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def image(tmp_path: Path, picture: np.ndarray) -> Path:
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    return path


def test_the_file_holds_the_session_s_frames(diffusers_layout, pipeline, picture, image, tmp_path):
    out = tmp_path / "world.mp4"
    output = run(
        "--checkpoint", diffusers_layout, *PROMPT, "--image", image, "--actions", "w*3,w+l*4", "--seed", 7,
        "--out", out, "--device", "cpu", "--json", tmp_path / "world.json", *SIZE,
    )  # fmt: skip
    assert output == f"{out}: 33 frames of 48x32, 2.1 s\n"
    with pipeline.session("a harbour at dawn", picture, seed=7, height=32, width=48) as session:
        steps = (["w"] * 3, ["w+l"] * 3, ["w+l", "", ""])
        expected = torch.cat([session.step(keys) for keys in steps]).numpy()
    found = frames_of(out)
    assert found.shape == expected.shape == (33, 32, 48, 3)
    # The codec halves the colours' resolution and blurs noise: brightness is what it keeps best.
    weights = np.array((0.299, 0.587, 0.114))
    alike = [np.corrcoef((found[i] @ weights).ravel(), (expected[i] @ weights).ravel())[0, 1] for i in range(33)]
    other = [np.corrcoef((found[i] @ weights).ravel(), (expected[i - 5] @ weights).ravel())[0, 1] for i in range(33)]
    assert min(alike) > 0.9 and np.mean(other) < np.mean(alike) - 0.05, (alike, other)
    report = json.loads((tmp_path / "world.json").read_text())
    assert (report["frames"], report["width"], report["seed"], report["stopped"]) == (33, 48, 7, False)
    assert len(report["chunk_ms"]) == 3 and min(report["chunk_ms"]) > 0
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 16


def test_poses_are_one_a_pixel_frame_and_must_last(diffusers_layout, tmp_path):
    poses = np.tile(np.eye(4), (24, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 24)
    np.save(tmp_path / "poses.npy", poses)
    base = ("--checkpoint", diffusers_layout, *PROMPT, "--poses", tmp_path / "poses.npy", "--device", "cpu", *SIZE)
    assert "21 frames" in run(*base, "--out", tmp_path / "a.mp4")
    output = run(*base, "--chunks", 3, "--out", tmp_path / "b.mp4", code=2)
    assert "has 6 latent frames, must have 9 for 3 chunks" in output.replace("\n", " ")
    assert not (tmp_path / "b.mp4").exists()


BAD = (
    (("--actions", "w,x"), "unknown key 'x'", 2),
    (("--actions", "w", "--poses", "picture.png"), "exclude each other", 2),
    (("--image", "text.txt"), "cannot identify image file", 2),
    (("--height", 33, "--width", 48), "height: got 33, must be a positive multiple of 16", 2),
    (("--height", 32), "must be given both or neither", 2),
    (("--out", "nowhere/a.mp4"), "the folder nowhere does not exist", 2),
    (("--out", "a.avi"), "must end in .mp4", 2),
    (("--device", "cuda:99"), "--device", 2),
    (("--prompt", " "), "must say something", 2),
)


@pytest.mark.parametrize(("arguments", "message", "code"), BAD, ids=[str(bad[0][:2]) for bad in BAD])
def test_a_bad_argument_is_one_clear_message(diffusers_layout, image, tmp_path, monkeypatch, arguments, message, code):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no picture")
    given = ("--checkpoint", diffusers_layout, *PROMPT, "--device", "cpu", "--out", "a.mp4", *arguments)
    output = run(*given, code=code)
    assert message in " ".join(output.split()) and "Traceback" not in output
    assert not Path("a.mp4").exists()


def test_every_missing_part_is_named(tmp_path):
    output = run("--checkpoint", tmp_path, *PROMPT, "--out", tmp_path / "a.mp4", "--device", "cpu", code=1)
    assert "4 parts are missing" in output
    for part in (
        "transformer: no safetensors",
        "text encoder: no",
        "tokenizer: no",
        "vae: no vae/config.json or Wan2.1",
    ):
        assert part in output


def test_a_full_disk_is_one_line(diffusers_layout, tmp_path, monkeypatch):
    monkeypatch.setattr("lingbot_kernels.commands._outputs.check_output", lambda *given, **more: None)  # full later
    target = tmp_path / "full.mp4"
    target.symlink_to("/dev/full")
    given = ("--checkpoint", diffusers_layout, *PROMPT, "--device", "cpu", *SIZE, "--chunks", 2)
    output = run(*given, "--out", target, code=1)
    assert f"Error: {target}: No space left on device after" in output
    assert "Traceback" not in output


def test_ctrl_c_leaves_a_file_that_plays(diffusers_layout, tmp_path):
    out = tmp_path / "world.mp4"
    command = [
        sys.executable, "-m", "lingbot_kernels", "generate", "--checkpoint", str(diffusers_layout), *PROMPT, *SIZE,
        "--device", "cpu", "--chunks", "100000", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    # A test run in the background ignores Ctrl-C, and its children with it: this one is to hear it.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, heard)
    try:
        deadline = time.monotonic() + 300
        while not (out.exists() and out.stat().st_size > 20_000):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        during = len(frames_of(out))  # while it is being written
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "stopped" in stdout and "Traceback" not in stderr
    count = len(frames_of(out))
    assert count >= during >= 1
    assert f"{count} frames" in stdout


def test_the_writer_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="video: got 33x32 pixels, must be even"):
        VideoWriter(tmp_path / "a.mp4", 32, 33)
    with pytest.raises(ValueError, match="fps: got 0"):
        VideoWriter(tmp_path / "a.mp4", 32, 32, fps=0)
    with VideoWriter(tmp_path / "a.mp4", 32, 32) as writer, pytest.raises(ValueError, match="frames: got float64"):
        writer.write(np.zeros((1, 32, 32, 3)))
    writer.close()
