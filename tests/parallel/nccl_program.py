"""For test_nccl.py, started by torchrun: rollouts on one GPU and on all, with and without CUDA graphs, saved a rank.

By itself it also tells how long the exchanges of the 14B model take: torchrun --nproc_per_node=4 nccl_program.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    Int8Recipe,
    LingBotConfig,
    RealtimeCausalDiTState,
)
from lingbot_kernels.ops import RingPosition
from lingbot_kernels.parallel import launch, peer_memory
from lingbot_kernels.parallel.peer_exchange import PeerSession, PeerShard
from lingbot_kernels.parallel.sequence_shard import SequenceShard, sequence_splits
from lingbot_kernels.realtime.kv_cache import CacheLayout, KVCache
from lingbot_kernels.ring import ChunkPosition

GRIDS = {"even": (8, 12), "uneven": (6, 10)}  # 72 and 45 tokens per chunk
CHUNKS = 9


def make_model(dtype: torch.dtype) -> CausalLingBotTransformer:
    torch.manual_seed(1)
    config = LingBotConfig.preset("lingbot-world-14b", num_layers=2, window_frames=11, text_dim=64, text_len=16)
    return CausalLingBotTransformer(config, device="cuda", dtype=torch.bfloat16).to(dtype)


def run(model: CausalLingBotTransformer, grid: tuple[int, int]) -> tuple[list[Tensor], dict[str, int]]:
    generator = torch.Generator("cuda").manual_seed(2)
    frames = CHUNKS * model.config.frames_per_chunk
    texts = [torch.randn(1, 9, model.config.text_dim, device="cuda", generator=generator) for _ in range(2)]
    camera = torch.randn(1, 384, frames, *grid, device="cuda", generator=generator)
    state = RealtimeCausalDiTState()
    chunks = CausalDenoisingStage(model).rollout(
        state,
        CHUNKS,
        text=lambda i: texts[i >= CHUNKS - 2],
        camera=camera,
        generator=generator,
        latent_size=grid,
    )
    done = [chunk.cpu() for chunk in chunks]
    return done, {"captures": state.graphs.captures, "replays": state.graphs.replays}


def microseconds(function: Callable[[], Any], repeats: int = 50) -> float:
    """Of GPU time, in a CUDA graph of `repeats` calls; the median of 9 replays."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(repeats):
            function()
    times = []
    for _ in range(9):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / repeats)
    return sorted(times)[4]


def time_exchanges(group: torch.distributed.ProcessGroup, tokens: int = 4524, heads: int = 40) -> dict[str, Any]:
    """Microseconds of a layer's norm, exchange and ring write, and of the output's exchange, both ways."""
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    dim, own, capacity = heads * 128, heads // ranks, 6 * tokens
    splits = sequence_splits(tokens, ranks)
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    layout = CacheLayout(1, 1, own, 128, (1, tokens // 3), 18, 3, dtype, device)
    session = PeerSession(group, layout)
    q, k, v = torch.randn(1, splits[rank], 3 * dim, device=device, dtype=dtype).chunk(3, dim=-1)
    attended = torch.randn(1, tokens, own * 128, device=device, dtype=dtype)
    weight = torch.ones(dim, device=device, dtype=dtype)
    cos_sin = torch.randn(splits[rank], 128, device=device)
    found: dict[str, Any] = {}
    kinds = (SequenceShard(splits, rank, group), PeerShard(splits, rank, group, session=session))
    for name, shard in zip(("all-to-all", "peer memory"), kinds, strict=True):
        caches = [session.empty(layout.shape, dtype) for _ in range(2)] if isinstance(shard, PeerShard) else [
            torch.empty(1, capacity, own, 128, device=device, dtype=dtype) for _ in range(2)
        ]  # fmt: skip
        rest = (cos_sin, *caches, RingPosition(0, tokens), 1e-6)
        found[name] = {
            "qkv": microseconds(partial(shard.qk_norm_rope_kv_write, q, k, v, weight, weight, *rest)),
            "kv": microseconds(partial(shard.k_norm_rope_kv_write, k, v, weight, *rest)),
            "output": microseconds(partial(shard.exchange_output, attended)),
        }
    cache = KVCache(replace(layout, k_dtype=torch.int8))
    position = cache.with_slots(ChunkPosition(RingPosition(0, tokens // 3), capacity), tokens)
    rest = (cos_sin, cache.layers[0], position, 1e-6)
    found["all-to-all, int8"] = {
        "qkv": microseconds(partial(kinds[0].qk_norm_rope_quantize_kv_write, q, k, v, weight, weight, *rest)),
        "kv": microseconds(partial(kinds[0].k_norm_rope_quantize_kv_write, k, v, weight, *rest)),
    }
    return found


def main(folder: str | None) -> None:
    with launch.process_group("cuda", timeout_s=120) as group:
        assert group is not None, "start this with torchrun"
        if folder is None:
            times = time_exchanges(group)
            if launch.is_main():
                print(times)
            return
        found: dict[str, Any] = {}
        if launch.is_main():
            exact = make_model(torch.float64)
            found["exact"] = {name: run(exact, grid)[0] for name, grid in GRIDS.items()}
            del exact
        model = make_model(torch.bfloat16)
        found["one"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        model.shard_sequence(group)
        found["graphs"] = {name: run(model, grid) for name, grid in GRIDS.items()}
        found["exchange"] = model.shard_group.exchange
        os.environ[peer_memory.SWITCH] = "0"
        model.shard_sequence(group)
        found["collectives"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        found["collective exchange"] = model.shard_group.exchange
        del os.environ[peer_memory.SWITCH]
        model.shard_sequence(group)
        model.cuda_graphs = False
        found["eager"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        del model
        model = make_model(torch.bfloat16)
        model.quantize(Int8Recipe(attention="int8_qk"))
        found["int8_qk one"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        model.shard_sequence(group)
        found["int8_qk exchange"] = model.shard_group.exchange
        found["int8_qk graphs"] = {name: run(model, grid) for name, grid in GRIDS.items()}
        model.cuda_graphs = False
        found["int8_qk eager"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        os.environ[peer_memory.SWITCH], model.cuda_graphs = peer_memory.WITH_INT8, True
        model.shard_sequence(group)
        found["int8_qk pushed exchange"] = model.shard_group.exchange
        found["int8_qk pushed"] = {name: run(model, grid)[0] for name, grid in GRIDS.items()}
        del os.environ[peer_memory.SWITCH]
        torch.save(found, os.path.join(folder, f"{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
