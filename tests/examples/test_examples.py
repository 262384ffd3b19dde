"""Every example runs, as a program of its own, on tiny settings, and says what it should."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ("--height", "32", "--width", "32", "--device", "cpu")


def start(program: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(EXAMPLES.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, timeout=110, cwd=cwd, env=env, check=False)


def run(name: str, *arguments: object, cwd: Path, code: int = 0) -> str:
    done = start([sys.executable, str(EXAMPLES / name), *map(str, arguments)], cwd)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_keyboard_rollout(tmp_path):
    lines = run("keyboard_rollout.py", *SMALL, "--script", "wwdjl..q", cwd=tmp_path).splitlines()
    assert lines[-1] == "7 chunks, 84 video frames"
    chunks = [re.match(r"chunk +(\d+)  key (.)  shown after +([\d.]+) ms, context +([\d.]+) ms", x) for x in lines[:-1]]
    assert [m and (int(m[1]), m[2]) for m in chunks] == list(enumerate("wwdjl.."))
    assert all(float(m[3]) > 0 and float(m[4]) > 0 for m in chunks)
    windows = [tuple(map(int, re.search(r"window (\d+)/(\d+)", line).groups())) for line in lines[:-1]]
    assert windows == [(min(12 * (i + 1), 72), 72) for i in range(7)]


def test_keyboard_rollout_refuses_unknown_keys_and_pipes(tmp_path):
    assert "--script: got 'wx'" in run("keyboard_rollout.py", *SMALL, "--script", "wx", cwd=tmp_path, code=2)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "keyboard_rollout.py"), *SMALL], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 2 and "give --script" in done.stderr


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
    rest, errors = process.communicate(timeout=60)
    guard.cancel()
    assert process.returncode == 0, errors
    assert first.startswith("chunk    0  key .") and "key d" in line and re.search(r"\d+ chunks", rest)
    assert termios.tcgetattr(slave) == before


def test_many_sessions(tmp_path):
    out = run("many_sessions.py", *SMALL, "--sessions", 2, "--chunks", 7, "--check", cwd=tmp_path).splitlines()
    assert len(out) == 3 and out[-1] == "each session has the bits that it has alone"
    assert all("7 chunks" in line and "frame 21" in line and "prompt projected 1x" in line for line in out[:2])


def test_convert_checkpoint(tmp_path):
    import torch

    from lingbot_kernels import CausalLingBotTransformer, LingBotConfig

    model = CausalLingBotTransformer(LingBotConfig.preset("tiny", num_layers=1))
    model.save_pretrained(tmp_path / "source")
    out = run("convert_checkpoint.py", "source", "target", "--dtype", "float32", cwd=tmp_path)
    assert f"{model.config.num_parameters():,} parameters" in out
    again = CausalLingBotTransformer.from_pretrained(tmp_path / "target", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert "is not empty" in run("convert_checkpoint.py", "source", "target", cwd=tmp_path, code=2)
    (tmp_path / "nothing").mkdir()
    error = run("convert_checkpoint.py", "nothing", "other", cwd=tmp_path, code=1)
    assert "nothing" in error and "Traceback" not in error and not (tmp_path / "other").exists()


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


@pytest.mark.skipif(
    importlib.util.find_spec("lingbot_kernels.parallel") is None, reason="needs lingbot_kernels.parallel"
)
def test_torchrun_ranks_agree_with_one(tmp_path):
    arguments = [str(EXAMPLES / "torchrun_rollout.py"), *SMALL, "--chunks", "2"]
    alone = start([sys.executable, *arguments], tmp_path)
    assert alone.returncode == 0, alone.stderr
    ranks = start(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments], tmp_path
    )
    assert ranks.returncode == 0, ranks.stderr
    rms = [re.findall(r"rms ([\d.]+)", done.stdout) for done in (alone, ranks)]
    assert len(rms[0]) == 2
    assert [float(x) for x in rms[0]] == pytest.approx([float(x) for x in rms[1]], rel=1e-4)


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in here] == []
