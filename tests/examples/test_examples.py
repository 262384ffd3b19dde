"""Every example runs, as a program of its own, on tiny settings, and says what it should."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ("--height", "32", "--width", "32", "--device", "cpu")


def start(program: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(EXAMPLES.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=cwd, env=env, check=False)


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What an example prints, run as a program of its own."""
    done = start([sys.executable, str(EXAMPLES / name), *map(str, arguments)], cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """The exit code of an example run in this process, for what needs no process of its own; None where it ends."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return None


def test_keyboard_rollout(tmp_path):
    lines = run("keyboard_rollout.py", *SMALL, "--script", "wwdjl..q", cwd=tmp_path).splitlines()
    assert lines[-1] == "7 chunks, 84 video frames"
    chunks = [re.match(r"chunk +(\d+)  key (.)  shown after +([\d.]+) ms, context +([\d.]+) ms", x) for x in lines[:-1]]
    assert [m and (int(m[1]), m[2]) for m in chunks] == list(enumerate("wwdjl.."))
    assert all(float(m[3]) > 0 and float(m[4]) > 0 for m in chunks)
    windows = [tuple(map(int, re.search(r"window (\d+)/(\d+)", line).groups())) for line in lines[:-1]]
    assert windows == [(min(12 * (i + 1), 72), 72) for i in range(7)]


def test_keyboard_rollout_refuses_unknown_keys_and_pipes(monkeypatch, capsys):
    assert run_here(monkeypatch, "keyboard_rollout.py", *SMALL, "--script", "wx") == 2
    assert "--script: got 'wx'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("w"))
    assert run_here(monkeypatch, "keyboard_rollout.py", *SMALL) == 2
    assert "give --script" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_keyboard_rollout_reads_keys_from_a_terminal_and_gives_it_back(tmp_path):
    import pty
    import termios
    import threading
    import time

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "keyboard_rollout.py"), *SMALL], stdin=slave, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    guard = threading.Timer(100, process.kill)
    guard.start()
    first = process.stdout.readline()
    os.write(master, b"d")
    for line in process.stdout:
        if "key d" in line:
            break
        time.sleep(0)
    os.write(master, b"q")
    rest, errors = process.communicate(timeout=300)
    guard.cancel()
    assert process.returncode == 0, errors
    assert first.startswith("chunk    0  key .") and "key d" in line and re.search(r"\d+ chunks", rest)
    assert termios.tcgetattr(slave) == before


def test_many_sessions(tmp_path):
    out = run("many_sessions.py", *SMALL, "--sessions", 2, "--chunks", 7, "--check", cwd=tmp_path).splitlines()
    assert len(out) == 3 and out[-1] == "each session has the bits that it has alone"
    assert all("7 chunks" in line and "frame 21" in line and "prompt projected 1x" in line for line in out[:2])


def test_convert_checkpoint(tmp_path, monkeypatch, capsys):
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny", num_layers=1))
    model.save_pretrained(tmp_path / "source")
    out = run("convert_checkpoint.py", "source", "target", "--dtype", "float32", cwd=tmp_path)
    assert f"{model.config.num_parameters():,} parameters" in out
    again = CausalLingBotTransformer.from_pretrained(tmp_path / "target", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "convert_checkpoint.py", "source", "target") == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert "nothing" in str(run_here(monkeypatch, "convert_checkpoint.py", "nothing", "other"))
    assert not (tmp_path / "other").exists()


def test_own_dit(tmp_path):
    out = run("own_dit.py", cwd=tmp_path).splitlines()
    assert len(out) == 10 and {line.split("  ")[-2].split()[-1] for line in out} == {"BSHD", "BHSD"}


def test_diffusers_wan(tmp_path):
    pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")
    arguments = ("--heads", 1, "--layers", 1, "--size", 4, 8, "--repeats", 1, "--device", "cpu")
    out = run("diffusers_wan.py", *arguments, cwd=tmp_path)
    difference = re.search(r"relative difference ([\d.e-]+)", out)
    assert difference and float(difference[1]) < 1e-5
    assert "causal: frame 21, 144 of 144 tokens seen" in out and "the plain bits again" in out


def test_torchrun_ranks_agree_with_one(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--chunks", "2"]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert run_here(monkeypatch, "torchrun_rollout.py", *arguments) is None
    alone = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ranks = start([*torchrun, str(EXAMPLES / "torchrun_rollout.py"), *arguments], tmp_path)
    assert ranks.returncode == 0, ranks.stderr
    rms = [re.findall(r"rms ([\d.]+)", out) for out in (alone, ranks.stdout)]
    assert len(rms[0]) == 2
    assert [float(x) for x in rms[0]] == pytest.approx([float(x) for x in rms[1]], rel=1e-4)


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in here] == []
