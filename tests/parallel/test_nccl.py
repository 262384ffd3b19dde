"""Ranks on GPUs under NCCL: as good as one GPU, alike to the bit on every rank, and with CUDA graphs as without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port
from torch import Tensor

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[2, 4, 8], ids=lambda count: f"{count}gpus")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saved."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} NVIDIA GPUs, has {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={request.param}",
        f"--master_port={free_port()}", str(HERE / "nccl_program.py"), str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("splits", ["even", "uneven"])
def test_ranks(found: list[dict[str, Any]], splits: str) -> None:
    exact, one = found[0]["exact"][splits], found[0]["one"][splits]
    first, counts = found[0]["graphs"][splits]
    assert counts["captures"] == 2, "the denoise step and the context update, each once"
    assert counts["replays"] > 4 * 4
    for rank, each in enumerate(found):
        assert each["graphs"][splits][1] == counts, f"rank {rank} replayed other graphs"
        for i, chunk in enumerate(first):
            assert torch.equal(chunk, each["graphs"][splits][0][i]), f"chunk {i}: rank {rank} has another"
            assert torch.equal(chunk, each["eager"][splits][i]), f"chunk {i}, rank {rank}: graphs change the bits"
    for i, chunk in enumerate(first):
        assert torch.equal(chunk, found[0]["collectives"][splits][i]), f"chunk {i}: collectives give other bits"
    assert found[0]["exchange"] == "peer memory" or found[0]["exchange"].startswith("all-to-all (rank")
    assert found[0]["collective exchange"] == "all-to-all (rank 0: LINGBOT_KERNELS_PEER_MEMORY=0)"
    for i, (chunk, plain, truth) in enumerate(zip(first, one, exact, strict=True)):
        error, allowed = relative_error(chunk, truth), 1.25 * relative_error(plain, truth)
        assert error <= allowed, f"chunk {i}: {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.gpu
@pytest.mark.parametrize("splits", ["even", "uneven"])
def test_ranks_with_int8_attention(found: list[dict[str, Any]], splits: str) -> None:
    """Q and K in int8: what one GPU has but for attention's rounding, alike on every rank, with graphs as without."""
    one, exact = found[0]["int8_qk one"][splits], found[0]["exact"][splits]
    first, counts = found[0]["int8_qk graphs"][splits]
    assert counts["captures"] == 2 and counts["replays"] > 4 * 4
    assert found[0]["int8_qk exchange"].startswith("all-to-all (")
    for i, (chunk, plain, truth) in enumerate(zip(first, one, exact, strict=True)):
        for rank, each in enumerate(found):
            assert torch.equal(chunk, each["int8_qk graphs"][splits][0][i]), f"chunk {i}: rank {rank} has another"
            assert torch.equal(chunk, each["int8_qk eager"][splits][i]), (
                f"chunk {i}, rank {rank}: graphs change the bits"
            )
        assert relative_error(chunk, truth) <= 1.25 * relative_error(plain, truth), f"chunk {i}"
        for each in found:
            assert torch.equal(chunk, each["int8_qk pushed"][splits][i]), f"chunk {i}: pushed, it has other bits"
    assert found[0]["int8_qk pushed exchange"] == found[0]["exchange"]
