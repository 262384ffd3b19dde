"""Ranks as torchrun starts them: one that fails ends them all, with its error, and soon."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port

from lingbot_kernels.parallel import launch

HERE = Path(__file__).parent
PROGRAM = str(HERE / "launched.py")


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def start(way: str, rank: int, port: int, ranks: int = 2) -> subprocess.Popen[str]:
    variables = environment(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    return subprocess.Popen([sys.executable, PROGRAM, way], env=variables, stderr=subprocess.PIPE, text=True)


WAYS = ("rank 0 raises", "rank 1 raises", "exchange", "ends early")
Ends = dict[str, list[tuple[int, str]]]


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    """Exit status and last words of two ranks for each way to fail; all started together, to save time."""
    started = {way: [start(way, rank, port) for rank in range(2)] for way in WAYS if (port := free_port())}
    try:
        words = {way: [p.communicate(timeout=300)[1] for p in processes] for way, processes in started.items()}
        yield {way: [(p.returncode, w) for p, w in zip(started[way], words[way], strict=True)] for way in WAYS}
    finally:
        for process in (process for pair in started.values() for process in pair):
            process.kill()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_while_another_waits(ends: Ends, failing: int) -> None:
    pair = ends[f"rank {failing} raises"]
    status, words = pair[failing]
    assert status == 1
    assert words.rstrip().endswith("ValueError: the disk is full")
    status, words = pair[1 - failing]
    assert status == 1
    assert f"rank {1 - failing} ends: rank {failing} failed: ValueError: the disk is full" in words


def test_a_rank_that_fails_while_another_is_in_an_exchange(ends: Ends) -> None:
    (status, words), (other_status, other_words) = ends["exchange"]
    assert status == other_status == 1
    assert other_words.rstrip().endswith("ValueError: the disk is full")
    assert "rank 1 failed: ValueError: the disk is full" in words


def test_an_exit_status_counts_as_failure(ends: Ends) -> None:
    (status, words), (other_status, _) = ends["ends early"]
    assert other_status == 3
    assert status == 1
    assert "rank 1 failed: SystemExit: 3" in words


def test_a_rank_that_does_not_start() -> None:
    process = start("alone", 0, free_port())
    words = process.communicate(timeout=240)[1]  # less than what `process_group` allows by default
    assert process.returncode == 1
    assert "RankFailed: rank 1 of 2 did not start within 2 s" in words


def rollout(path: Path, *start: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", *start, "lingbot_kernels", "rollout", "--device=cpu", "--chunks=2", "--height=64"),
        *("--width=80", "--window-frames=5", "--sink-frames=1", "--save-latents", str(path)),
    ]
    return subprocess.run(command, env=environment(COLUMNS="120"), capture_output=True, text=True, timeout=300)


def torchrun(ranks: int) -> list[str]:
    return ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", "-m"]


def test_the_rollout_command(tmp_path: Path) -> None:
    """Works as on one rank: one report, one file, the same latents."""
    alone, shared = tmp_path / "alone.npy", tmp_path / "shared.npy"
    done = [rollout(alone), rollout(shared, *torchrun(2))]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    assert len(done[1].stdout.splitlines()) == len(done[0].stdout.splitlines())
    a, b = np.load(alone), np.load(shared)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
    assert not np.array_equal(a, 0 * a)


def test_the_rollout_command_names_a_wrong_rank_count(tmp_path: Path) -> None:
    done = rollout(tmp_path / "none.npy", *torchrun(3))
    assert done.returncode != 0
    assert "ranks: got 3, must divide num_heads = 2" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with launch.process_group("cpu") as group:
        assert group is None
        assert launch.is_main()


def test_an_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"), launch.process_group("cpu"):
        pass
