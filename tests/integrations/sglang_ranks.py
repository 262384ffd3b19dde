"""Two ranks of sglang's Ulysses on the CPU, plain and accelerated; run by `test_sglang.py`, given (H, W)."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import sglang_environment
import torch
import torch.distributed as dist

sglang_environment.install()

from sglang.multimodal_gen.runtime import server_args  # noqa: E402
from sglang.multimodal_gen.runtime.distributed import parallel_state  # noqa: E402

from lingbot_kernels import LingBotConfig  # noqa: E402
from lingbot_kernels.benchmarks import sglang_peer  # noqa: E402
from lingbot_kernels.integrations.sglang import accelerate, restore  # noqa: E402
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer  # noqa: E402
from lingbot_kernels.stages.schedule import Schedule  # noqa: E402

SIZE = (int(sys.argv[1]), int(sys.argv[2]))


def rollout(peer: sglang_peer.SglangPeer) -> list[torch.Tensor]:
    """Nine chunks, the window full after six."""
    generator = torch.Generator().manual_seed(1)
    peer.begin()
    shapes = (1, 16, 3, *SIZE), (3, 1, 16, 3, *SIZE), (1, 384, 3, *SIZE)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(9)]
    return [peer.chunk(x, renoise, text=torch.ones(1, 7, 64), camera=camera) for x, renoise, camera in drawn]


torch.set_num_threads(1)
torch.manual_seed(0)
server_args.set_global_server_args(sglang_peer._arguments(SimpleNamespace()))
parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=2, ulysses_degree=2)
config = LingBotConfig.preset("tiny")
weights = CausalLingBotTransformer(config).state_dict()
schedule = Schedule.continuous((1000, 750, 500, 250), 5.0)
engine = sglang_peer.SglangPeer(config, weights, SIZE, schedule, torch.device("cpu"), torch.float32)
engine.sequence_shard = True
plain = rollout(engine)
assert engine.state.kv_cache[0].num_cache_heads == config.num_heads // 2
accelerate(engine.transformer)
for got, want in zip(rollout(engine), plain, strict=True):
    assert float((got - want).norm() / want.norm()) <= 1e-5
restore(engine.transformer)
assert all(torch.equal(got, want) for got, want in zip(rollout(engine), plain, strict=True))
dist.barrier()
print("the ranks agree", flush=True)
