"""The model bench over several GPUs: one GPU first, then the ranks of a group, in the same process on every rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.model import ModelBench
from lingbot_kernels.benchmarks.model_session import BenchSession
from lingbot_kernels.benchmarks.rows import GREEN, RED
from lingbot_kernels.benchmarks.timing import captured, event_ms, free
from lingbot_kernels.realtime.kv_cache import Int8KeyValue
from lingbot_kernels.ring import ChunkPosition, RingPosition


class ShardedModelBench(ModelBench):
    """`ModelBench` with the sequence shared among the ranks of `group`; rank 0 reports."""

    def __init__(self, *arguments: Any, group: dist.ProcessGroup) -> None:
        super().__init__(*arguments)
        self.group = group

    @torch.no_grad()
    def run(self) -> bool:
        """Measure one GPU, then all; whether the ranks' result agrees with one GPU's."""
        group, ranks = self.group, dist.get_world_size(self.group)
        model = self.model()
        torch.manual_seed(1)
        alone, first = self._chunks(BenchSession(self, model))
        model.shard_sequence(group)
        free()
        dist.barrier(group)
        self.case = self.case.removesuffix("-1gpu") + f"-{ranks}gpu"
        torch.manual_seed(1)  # the same text, noise and camera again
        session = BenchSession(self, model)
        session.fill()
        replay, shared, floor = self._shard_floor(session), [], []
        torch.manual_seed(2)  # what the floor has drawn depends on a rank's tokens
        for _ in range(self.plan.chunks):  # in turns, so that clocks and temperature are the same for both
            shared.append(session.chunk())
            for _ in range(5):
                dist.barrier(group)
                floor.append(event_ms(replay))
        assert session.first is not None
        error = relative_error(session.first, first)
        gate: dict[str, Any] = {"gate": GREEN if error < 0.05 else RED, "error": error}
        ceiling = statistics.median(floor)
        exchange = self._exchange_ms(session)
        step = statistics.median(ms for times in shared for ms in times.denoise[1:])
        many = statistics.median(t.total for t in shared)
        ones: list[Any] = [None] * ranks
        dist.all_gather_object(ones, statistics.median(t.total for t in alone), group=group)
        scaling = statistics.mean(ones) / (ranks * many)
        note = (
            f"{session.library} attention; scaling {scaling:.3f} against {statistics.mean(ones):.1f} ms per chunk, the "
            f"mean of these GPUs each for itself in the same run ({min(ones):.1f} to {max(ones):.1f}); "
            f"norms, ring writes and exchanges by {model.shard_group.exchange} take {exchange:.2f} ms alone, "
            f"{exchange / step:.3f} of a step; "
            f"graphs {session.state.graphs.captures} captured"
        )
        self.add("bare_floor", "library", floor, ceiling, gate=GREEN, note="products, attention of a shard")
        self.report_chunks(shared, ceiling, note, **gate)
        if self.plan.timeline_path is not None:
            calls = {"floor": replay, "step": session.repeated_step()}
            self.timeline(calls, self.plan.timeline_path, groups=5)
        return gate["gate"] == GREEN

    def _chunks(self, session: BenchSession) -> tuple[list[Any], Tensor]:
        """Times of the plan's steady chunks, and the first chunk's latents."""
        session.fill()
        times = [session.chunk() for _ in range(self.plan.chunks)]
        assert session.first is not None
        return times, session.first

    def _shard_floor(self, session: BenchSession) -> Callable[[], None]:
        """The graph of this rank's products and attention alone: its tokens, and its heads over all tokens."""
        assert session.state.kv_cache is not None
        shard = session.model.shard_group.shard(self.tokens)
        return self.floor(session, shard.num_tokens, session.state.kv_cache.layout.heads)

    def exchanges(self, session: BenchSession) -> Callable[[], None]:
        """A step's norms, ring writes and exchanges, and nothing else."""
        cfg, model, cache = self.config, session.model, session.state.kv_cache
        assert cache is not None
        shard = model.shard_group.shard(self.tokens, cache)
        at = ChunkPosition(RingPosition(0, cache.ring.sink), cache.layout.shape[1])
        like: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        q, k, v = torch.randn(1, shard.num_tokens, 3 * cfg.dim, **like).chunk(3, dim=-1)
        attended = torch.randn(1, self.tokens, cfg.dim // shard.ranks, **like)
        weight = torch.ones(cfg.dim, **like)
        cos_sin = torch.randn(shard.num_tokens, cfg.head_dim, device=self.device)

        def run() -> None:
            position = cache.with_slots(at, self.tokens) if model.int8_qk else at
            for kv in cache.layers:
                if isinstance(kv, Int8KeyValue):
                    shard.qk_norm_rope_quantize_kv_write(q, k, v, weight, weight, cos_sin, kv, position, cfg.eps)
                else:
                    shard.qk_norm_rope_kv_write(q, k, v, weight, weight, cos_sin, *kv, at.ring, cfg.eps)
                shard.exchange_output(attended)

        return run

    def _exchange_ms(self, session: BenchSession) -> float:
        """Milliseconds of `exchanges` when nothing else runs."""
        replay, times = captured(self.exchanges(session), self.device), []
        for _ in range(7):
            dist.barrier(self.group)
            times.append(event_ms(replay))
        return statistics.median(times)
