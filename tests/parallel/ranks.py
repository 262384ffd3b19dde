"""Ranks of a process group on this machine's CPU, started once and given one function after another."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.distributed_c10d import _set_pg_timeout

# Bounds on what hangs alone, so that a busy machine passes; a rank that waits for the others gives up first.
GROUP_TIMEOUT_S, HANG_S = 240, 300


def lose_patience(group: dist.ProcessGroup) -> None:
    """From now on the ranks of `group`, which meet once more, wait 2 s for an answer."""
    dist.barrier(group)
    _set_pg_timeout(timedelta(seconds=2), group)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, arguments = task
        try:
            pipe.send((True, function(*arguments)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Ranks:
    """`ranks` processes with one gloo group, each running what it is sent.

    Attributes:
        lost: whether a rank hung or died: the answers that are left fit no later question.
    """

    def __init__(self, ranks: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context, port = mp.get_context("spawn"), free_port()
        self.size, self.lost = ranks, False
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each rank; an argument of type `PerRank` gives each its own."""
        answers = self._answers(function, arguments)
        failed = [f"rank {rank}: {answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def refusals(self, function: Callable[..., Any], *arguments: Any) -> list[str]:
        """The message with which each rank refused; every rank must have."""
        answers = self._answers(function, arguments)
        assert not any(ok for ok, _ in answers), "a rank accepted"
        return [answer.splitlines()[0] for _, answer in answers]

    def _answers(self, function: Callable[..., Any], arguments: Any) -> list[tuple[bool, Any]]:
        self.lost = True
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, [a[rank] if isinstance(a, PerRank) else a for a in arguments]))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(HANG_S), f"rank {rank} hangs in {function.__name__}"
            answers.append(pipe.recv())
        self.lost = False
        return answers

    def close(self) -> None:
        """End the ranks; those that are lost, at once."""
        for pipe in self._pipes:
            if not self.lost:
                pipe.send(None)
        for process in self._processes:
            if not self.lost:
                process.join(60)
            process.kill()


class PerRank(list[Any]):
    """An argument that differs from rank to rank."""
