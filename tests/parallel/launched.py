"""A program as torchrun starts it, for test_launch.py: one way to go on, or to fail, by name."""

from __future__ import annotations

import os
import sys
import time

import torch

from lingbot_kernels.parallel import launch


def main(way: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    start_timeout_s = 2 if way == "alone" else 240
    with launch.process_group("cpu", start_timeout_s=start_timeout_s, grace_s=1) as group:
        assert group is not None
        if way in ("rank 0 raises", "rank 1 raises"):
            if rank == int(way.split()[1]):
                raise ValueError("the disk is full")
            time.sleep(60)  # as if it waited for a GPU
        elif way == "exchange" and rank == 1:
            raise ValueError("the disk is full")
        elif way == "exchange":
            torch.distributed.all_reduce(torch.zeros(1))
        elif way == "ends early" and rank == 1:
            sys.exit(3)
    if launch.is_main():
        print("done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
