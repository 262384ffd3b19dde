"""A session over two ranks of gloo: each decodes its columns, both get whole frames, and they are one rank's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def test_two_ranks_make_the_frames_of_one(diffusers_layout, pipeline, tmp_path):
    out = tmp_path / "frames"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(HERE / "rank_program.py"), str(diffusers_layout), str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (torch.load(f"{out}.{rank}") for rank in range(2))
    assert torch.equal(first, second)
    with pipeline.session("a harbour at dawn", height=32, width=176, seed=3) as session:
        alone = torch.cat([session.step(keys) for keys in ("w", "w+l", "")])
        columns = [stage.width for stage in session._decoder._rings.columns]
    assert columns == [22, 44, 88, 176, 176]
    difference = (first.int() - alone.int()).abs()
    assert first.shape == alone.shape == (33, 32, 176, 3)
    # Sharded attention adds up in another order: a byte's edge is crossed now and then.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
