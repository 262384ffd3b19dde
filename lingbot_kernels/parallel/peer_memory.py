"""Memory of this rank that the other GPUs of its host write into (torch's symmetric memory), and their barrier.

With it a rank's kernels put each rank's heads straight where they are read: no packed buffer and no collective.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels.ops import _native

SWITCH = "LINGBOT_KERNELS_PEER_MEMORY"
WITH_INT8 = "int8"  # its value that has Q and K in int8 exchanged so too; not yet measured, so not by default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels that write to peers serve
_ALIGNMENT = 256  # bytes between tensors of one block
_ROUNDING = 16 * 2**20  # bytes that the driver may add to a block: its granularity, the barrier's signals
_DEFAULT_TIMEOUT = timedelta(minutes=10)


class PeerMemory:
    """One block of memory on every rank of a group, the same tensors at the same places in each.

    Made on every rank at once, with the same sizes. The ranks of an exchange write to each other's tensors, then meet
    at `barrier()` before they read their own.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        if torch.cuda.mem_get_info(device)[0] < nbytes + _ROUNDING:
            torch.cuda.empty_cache()  # the block comes from the driver, not from what torch's allocator keeps for reuse
        self._block = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._shared: Any = symmetric.rendezvous(self._block, group)
        self._timeout_ms = int(_timeout(group, device) / timedelta(milliseconds=1))
        self._used = 0
        self._everywhere: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    @property
    def nbytes(self) -> int:
        return self._block.numel()

    @staticmethod
    def nbytes_of(*sizes: int) -> int:
        """Bytes of a block that holds tensors of these many bytes each."""
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor of the block, not initialised; called in the same order on every rank.

        Raises:
            ValueError: the block has no room for it.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        stop = self._used + self.nbytes_of(size)
        if stop > self._block.numel():
            raise ValueError(
                f"shape: got {list(shape)} of {dtype}, must fit in {self._block.numel() - self._used} bytes"
            )
        out = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used = stop
        return out

    def everywhere(self, x: Tensor, rows: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        """x on each rank, this rank's own included: what lies at x's place in every rank's block.

        Args:
            x: a contiguous tensor of this block.
            rows: how many of the rows x[:, i] each rank has; all of x's where None.
        """
        key = (x.data_ptr(), x.shape, x.dtype, rows)
        if key not in self._everywhere:
            offset = (x.data_ptr() - self._block.data_ptr()) // x.element_size()
            buffers = [
                x if rank == self._rank else self._shared.get_buffer(rank, tuple(x.shape), x.dtype, offset)
                for rank in range(self._ranks)
            ]
            if rows is not None:
                buffers = [buffer[:, :count] for buffer, count in zip(buffers, rows, strict=True)]
            self._everywhere[key] = tuple(buffers)
        return self._everywhere[key]

    def barrier(self) -> None:
        """On the current stream: what every rank wrote before its barrier is there for what comes after this one.

        A rank that does not come within the group's timeout ends the others' CUDA contexts with an error.
        """
        self._shared.barrier(0, self._timeout_ms)


def why_not(group: dist.ProcessGroup, control: dist.ProcessGroup, device: torch.device) -> str | None:
    """None where every rank of `group` can use peer memory, else the first rank's reason; the same on every rank.

    Tries it: allocates a few bytes on each rank and lets the ranks map each other's.

    Args:
        control: the same ranks, over host memory.
    """
    reason = _own_reason(device)
    if _agreed(reason, control) is None:
        hosts: list[Any] = [None] * dist.get_world_size(control)
        dist.all_gather_object(hosts, socket.gethostname(), group=control)
        if len(set(hosts)) > 1:
            return f"the ranks are on {len(set(hosts))} hosts"
        try:
            memory = PeerMemory(group, device, _ALIGNMENT)
            memory.everywhere(memory.empty((1,), torch.float32))
            torch.cuda.synchronize(device)
        except Exception as error:  # whatever the driver or torch can't do here, the collectives serve
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return _agreed(reason, control)


def _own_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"serves CUDA devices, not {device.type}"
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    if reason := _native.why_not_cuda():
        return reason
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError as error:
        return f"torch has no symmetric memory ({error})"
    return None


def _agreed(reason: str | None, control: dist.ProcessGroup) -> str | None:
    """The first reason that any rank has."""
    reasons: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(reasons, reason, group=control)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(reasons) if found is not None), None)


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long the group's collectives wait for a rank."""
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None) or _DEFAULT_TIMEOUT
