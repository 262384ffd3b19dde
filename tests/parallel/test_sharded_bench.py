"""The model bench of several GPUs, without any: ranks on the CPU, with clock, allocator and graphs stood in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cuda_stand_ins import stand_in
from ranks import Ranks

from lingbot_kernels.benchmarks.model import ModelPlan
from lingbot_kernels.benchmarks.model_sharded import ShardedModelBench
from lingbot_kernels.benchmarks.rows import GREEN, Row
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer


def run(precision: str) -> tuple[bool, list[Row]]:
    rows: list[Row] = []
    plan = ModelPlan("tiny", 2, (6, 10), 1, peers=(), precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(CausalLingBotTransformer, "cuda_graphs", False, raising=False)
        assert dist.group.WORLD is not None
        bench = ShardedModelBench(plan, torch.device("cpu"), rows.append, group=dist.group.WORLD)
        return bench.run(), rows


@pytest.mark.parametrize("precision", ["bfloat16", "int8_qk"])
def test_rows_of_a_run(pool: Callable[[int], Ranks], precision: str) -> None:
    for green, rows in pool(2).run(run, precision):
        assert green and {row.op for row in rows} >= {"denoise_step", "context_update", "chunk", "bare_floor"}
        assert {(row.precision, row.case, row.gate) for row in rows} == {
            (precision, "tiny-2layers-s45-kv270-2gpu", GREEN)
        }
        assert "exchanges by all-to-all (rank 0: serves CUDA devices, not cpu) take" in rows[-1].note
