"""Ranks started by torchrun: their process group, and an end for all of them where one fails.

`torchrun --nproc_per_node=4 -m lingbot_kernels rollout ...`; several hosts as torchrun starts them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from lingbot_kernels.realtime import graphs

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILURE = "failure"
_POLL_S = 0.3
_LEAVE_S = 5.0


class RankFailed(RuntimeError):
    """The run ended since some rank failed; the message says which, and of what."""


def launched() -> bool:
    """Whether torchrun (or what sets the same environment) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Whether this process shows progress and writes files: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def process_group(
    device: str = "auto", *, timeout_s: float = 600, start_timeout_s: float = 300, grace_s: float = 5
) -> Iterator[dist.ProcessGroup | None]:
    """torchrun's ranks as the default process group while the block lasts; None where torchrun started nothing.

    Each rank takes the GPU of its LOCAL_RANK (NCCL; gloo on the CPU). Where one rank's block raises, the others end
    too, in `grace_s`, with that rank's error: `RankFailed` where they can still raise, else on stderr with exit
    status 1. When the block ends, every session's CUDA graphs are dropped.

    Args:
        device: "cuda", "cpu" or "auto".
        timeout_s: how long an exchange may wait for the other ranks.
        start_timeout_s: how long the ranks may take to start, and to end after the first has.

    Raises:
        RankFailed: another rank failed, did not start, or did not end.
        ValueError: torchrun's environment is incomplete, or has no GPU for this rank.
    """
    if not launched():
        yield None
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"environment: {', '.join(missing)} not set, must be as torchrun sets them")
    ranks = _Ranks(timedelta(seconds=start_timeout_s))
    watch = threading.Thread(target=ranks.watch, args=(grace_s,), daemon=True)
    exit_of_success: BaseException | None = None
    try:
        ranks.meet("start")
        watch.start()
        _init(_device_type(device), ranks, timedelta(seconds=timeout_s))
        try:
            yield dist.group.WORLD
        except BaseException as error:
            if not _is_success(error):
                raise
            exit_of_success = error
        ranks.meet("end")
        ranks.leave()
    except BaseException as error:
        failure = ranks.report(error)
        _abandon()
        ranks.leave()
        if failure is not None and isinstance(error, Exception):
            raise RankFailed(failure) from error
        raise
    finally:
        ranks.over.set()
        if watch.ident is not None:
            watch.join()
    graphs.clear_all()
    dist.destroy_process_group()
    if exit_of_success is not None:
        raise exit_of_success


class _Ranks:
    """What the ranks tell each other outside their exchanges, through torchrun's key-value store."""

    def __init__(self, start_timeout: timedelta) -> None:
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.over = threading.Event()
        self._timeout = start_timeout
        agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts = self.rank == 0 and not agent_has_it
        self.store = self._connect(self._hosts)

    def _connect(self, hosts: bool) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(
                address, port, self.count, is_master=hosts, timeout=self._timeout, wait_for_workers=False
            )
        except RuntimeError as error:
            raise RankFailed(
                f"rank {self.rank} of {self.count} reached no store at {address}:{port} within "
                f"{self._timeout.total_seconds():g} s: {error}"
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"lingbot_kernels/{attempt}", store)

    def meet(self, event: str) -> None:
        """Wait for every rank to come to `event`; one that fails, or doesn't come in time, is named."""
        self.store.set(f"{event}/{self.rank}", "here")
        waited_for = {f"{event}/{rank}": rank for rank in range(self.count)}
        deadline = time.monotonic() + self._timeout.total_seconds()
        while waited_for:
            if self.store.check([_FAILURE]):
                raise RankFailed(self.store.get(_FAILURE).decode())
            waited_for = {key: rank for key, rank in waited_for.items() if not self.store.check([key])}
            if waited_for and time.monotonic() > deadline:
                names = ", ".join(str(rank) for rank in waited_for.values())
                raise RankFailed(
                    f"rank {names} of {self.count} did not {event} within {self._timeout.total_seconds():g} s"
                )
            time.sleep(0.02 if waited_for else 0)

    def report(self, error: BaseException) -> str | None:
        """Tell the others of this rank's error. Returns the failure of the rank that was first, if another was."""
        own = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the rank that hosts the store is gone
            first = self.store.compare_set(_FAILURE, "", own).decode()
            return first if first != own else None
        return None

    def leave(self) -> None:
        """Say that this rank needs the store no more; the rank that hosts it waits for the others, but not for long."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + _LEAVE_S
            everyone = [f"left/{rank}" for rank in range(self.count)]
            while self._hosts and not self.store.check(everyone) and time.monotonic() < deadline:
                time.sleep(0.02)

    def watch(self, grace_s: float) -> None:
        """In a thread: end this process where another rank fails and this one doesn't notice, waiting on a device."""
        failure = None
        try:
            store = self._connect(False)  # a connection of its own: the other's calls may wait
            while failure is None and not self.over.wait(_POLL_S):
                if store.check([_FAILURE]):
                    failure = store.get(_FAILURE).decode()
                    store.set(f"left/{self.rank}", "")
        except RuntimeError as error:
            failure = f"rank 0 is gone, and its store with it: {error}"
        if failure is None or self.over.wait(grace_s):
            return
        print(f"rank {self.rank} ends: {failure}", file=sys.stderr, flush=True)
        os._exit(1)


def _device_type(device: str) -> str:
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, must be auto, cuda or cpu: torchrun says which GPU a rank takes")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"LOCAL_RANK: got {local_rank}, must be less than this host's {count} GPUs")
    torch.cuda.set_device(local_rank)
    return "cuda"


def _init(device_type: str, ranks: _Ranks, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=ranks.store, rank=ranks.rank, world_size=ranks.count, timeout=timeout)


def _abandon() -> None:
    """Close a gloo group's connections, so that the others' exchanges with this rank fail at once.

    Ending an NCCL communicator could wait for what is under way; there the others' `watch` ends them.
    """
    if dist.is_initialized() and not torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _is_success(error: BaseException) -> bool:
    """Whether this is a command's way to end with exit status 0."""
    status = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return status in (0, None)
