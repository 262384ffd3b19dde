"""Runs the model bench: a full-window rollout against the bare floor of the same process, and a peer on the same
weights.

The bare floor is what no fusion can remove: the layers' matrix products and attention, nothing else, in one CUDA graph.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.benchmarks import flashdreams_peer, model_compiled, model_sglang, timeline
from lingbot_kernels.benchmarks.gate import relative_error, within
from lingbot_kernels.benchmarks.model_session import BenchSession, small_rollout
from lingbot_kernels.benchmarks.problem import randn
from lingbot_kernels.benchmarks.rows import GREEN, OURS, RED, Row
from lingbot_kernels.benchmarks.scene import NetworkPlan, token_grid
from lingbot_kernels.benchmarks.timing import ChunkTimes, Effort, captured, event_ms, free, measure
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.files import write_text
from lingbot_kernels.models.embeddings import linear_gelu
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops._dispatch import use_backend
from lingbot_kernels.ops.windowed_attention import _attend, resolve_library
from lingbot_kernels.parallel import launch
from lingbot_kernels.quantization import Int8Linear, Int8Rows, QuantizedRows, recipe_of
from lingbot_kernels.realtime.kv_cache import Int8KeyValue, RingLayer
from lingbot_kernels.reference.rotate_quantize import quantize_values

PEERS = ("flashdreams", "sglang")


@dataclass(frozen=True)
class ModelPlan(NetworkPlan):
    """What to measure.

    Attributes:
        chunks: steady chunks to time.
        peers: of `PEERS`, to run as well where they are installed; a peer's K/V window comes on top of ours in memory.
        camera_cache: as in `RealtimeCausalDiTState`.
        residual_dtype: None for the preset's own.
        timeline_path: also record the floor, kernel by kernel beside the step, and write both here as JSON.
        compiled: also time the step with its blocks compiled by torch.compile.
        precision: "bfloat16", or of `quantization.recipe_of`: the blocks' products in int8, with "int8_qk"
            self-attention's Q and K as well.
        prompt_tokens: of the prompt, whose padding is then one key (`RealtimeModel.weighted_padding`); None: the prompt
            has no padding.
    """

    chunks: int = 6
    peers: tuple[str, ...] = ("flashdreams",)
    camera_cache: bool = True
    residual_dtype: str | None = None
    timeline_path: Path | None = None
    compiled: bool = False
    precision: str = "bfloat16"
    prompt_tokens: int | None = None

    def config(self, **overrides: Any) -> LingBotConfig:
        if self.residual_dtype is not None:
            overrides.setdefault("residual_dtype", self.residual_dtype)
        return super().config(**overrides)


class ModelBench:
    """One run of a plan on a CUDA device; `report` is given each row as soon as it is there, `say` what is no row."""

    def __init__(
        self,
        plan: ModelPlan,
        device: torch.device,
        report: Callable[[Row], None],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.plan, self.device, self.report, self.say = plan, device, report, say
        self.config = plan.config()
        self.grid = token_grid(self.config, plan.latent_size)
        self.tokens = self.config.frames_per_chunk * self.grid[0] * self.grid[1]
        self.window = self.config.window_frames * self.grid[0] * self.grid[1]
        camera = "" if plan.camera_cache else "-no-camera-cache"
        residual = "" if plan.residual_dtype is None else f"-{plan.residual_dtype}-residual"
        prompt = "" if plan.prompt_tokens is None else f"-prompt{plan.prompt_tokens}"
        self.case = f"{plan.name}-s{self.tokens}-kv{self.window}{camera}{residual}{prompt}-1gpu"
        self.memory: dict[str, int] = {}
        self.timeline_error: OSError | None = None  # why the timeline's file could not be written
        self.recipe = recipe_of(plan.precision)

    def model(self, **overrides: Any) -> CausalLingBotTransformer:
        """The plan's network with random weights, the same at every call, in its precision."""
        torch.manual_seed(0)
        model = CausalLingBotTransformer(self.plan.config(**overrides), device=self.device, dtype=torch.bfloat16)
        if self.recipe is not None:
            model.quantize(self.recipe)
            free()
        model.weighted_padding = self.plan.prompt_tokens is not None
        return model

    @torch.no_grad()
    def run(self) -> bool:
        """Measure; whether every gate was green."""
        gate, error, plain_error, compiled_error = self.gate()
        gated: dict[str, Any] = {"gate": gate, "error": error, "plain_error": plain_error}
        if gate != GREEN:
            self.add("denoise_step", OURS, **gated, note="the gate failed: no times")
            return False
        model = self.model()
        self._remember("weights")
        session = BenchSession(self, model)
        first, steady = session.fill(lambda: self._remember("session")), []
        self._remember("graphs")
        torch.cuda.reset_peak_memory_stats(self.device)
        session.chunk()
        self._remember("steady peak", torch.cuda.max_memory_allocated(self.device))
        free, total = torch.cuda.mem_get_info(self.device)
        self._remember("in use on the GPU", total - free)
        self._report_memory(gated)
        self.layer_products(model)
        replay_floor = self.floor(session)
        floor: list[float] = []
        for _ in range(self.plan.chunks):  # in turns, so that clocks and temperature are the same for both
            steady.append(session.chunk())
            floor += [event_ms(replay_floor) for _ in range(5)]
        ceiling = statistics.median(floor)
        note = self._note(session)
        self.add("bare_floor", "library", floor, ceiling, gate=GREEN, note=session.library)
        self.report_chunks(steady, ceiling, **gated, note=note)
        self.add("first_chunk", OURS, [first.total], ceiling, **gated, note="window not full")
        self.step_by_kernel(session, ceiling, gated)
        if self.plan.timeline_path is not None:
            with_epilogues = self.floor(session, epilogues=True)
            calls = {"floor": replay_floor, "floor, epilogues": with_epilogues, "step": session.repeated_step()}
            self.timeline(calls, self.plan.timeline_path)
        green = True
        if self.recipe is None:
            if "flashdreams" in self.plan.peers:
                green &= flashdreams_peer.measure(self, session, ceiling)
            if "sglang" in self.plan.peers:
                green &= model_sglang.measure(self, session, ceiling)
        if compiled_error is not None:
            green &= model_compiled.measure(self, session, ceiling, compiled_error, plain_error)
        return green

    def report_chunks(
        self, chunks: Sequence[ChunkTimes], ceiling: float, note: str, backend: str = OURS, **gated: Any
    ) -> None:
        """Rows of steady chunks' parts. Their first step also makes the camera modulation, so it has its own."""
        first = note if backend == model_sglang.SGLANG else f"{note}; makes the chunk's camera modulation as well"
        rows = {
            "denoise_step": ([ms for times in chunks for ms in times.denoise[1:]], note),
            "first_denoise_step": ([times.denoise[0] for times in chunks], first if self.plan.camera_cache else note),
            "context_update": ([times.context for times in chunks], note),
            "chunk": ([times.total for times in chunks], note),
        }
        for op, (milliseconds, said) in rows.items():
            self.add(op, backend, milliseconds, ceiling, note=said, **gated)

    def step_by_kernel(self, session: BenchSession, ceiling_ms: float, gated: dict[str, Any]) -> None:
        """Rows of where a replayed step's time goes, of how busy the GPU is, and of the launches per block."""
        replays = 5
        step = session.repeated_step()
        step()
        placed = timeline.place(timeline.record(step, replays))
        if not placed:
            self.say("torch.profiler recorded no kernel of a step: no times by kernel")
            return
        times = timeline.own_times(placed)
        times["gaps"] = sum(item.gap for item in placed)
        for phase, us in times.items():
            self.add(
                f"step_phase_{phase}", OURS, [us / replays / 1e3], ceiling_ms, **gated,
                note="replayed, by kernel; of overlapping kernels the later has what remains after the earlier",
            )  # fmt: skip
        busy = 1 - times["gaps"] / sum(times.values())
        self.add("gpu_busy", OURS, **gated, ratio=busy, note="1 - gaps / time of replayed steps")
        try:
            held = timeline.analyse([item.kernel for item in placed], self.config.num_layers, replays)
        except ValueError as error:
            self.add("launches_per_block", OURS, **gated, note=f"not told: {error}")
            return
        launches = held.launches_per_block
        own = launches[timeline.PASSES] + launches[timeline.OTHER]
        note = f"{own:.2f} outside products and attention; " + ", ".join(f"{k} {v:.2f}" for k, v in launches.items())
        self.add("launches_per_block", OURS, **gated, calls=round(own), note=note)

    def timeline(self, calls: Mapping[str, Callable[[], Any]], path: Path, groups: int | None = None) -> None:
        """Record floor and step, see `timeline.compare`; the first rank prints a table and writes the file, on which
        the rest of the run doesn't depend.
        """
        report, table = timeline.compare(calls, self.config.num_layers, self.device, groups=groups)
        if launch.is_main():
            try:
                write_text(path, json.dumps({"case": self.case, **report}) + "\n")
            except OSError as error:
                self.timeline_error = error
            self.say(table)

    def gate(self) -> tuple[str, float, float, float | None]:
        """Two layers of this width over 7 chunks on a small grid: ours, the plain formulation of the same precision
        and, where the plan wants it, the compiled model, against the unquantised float64.
        """
        overrides = {"num_layers": 2, "window_frames": 12}
        torch.manual_seed(0)
        model = CausalLingBotTransformer(self.plan.config(**overrides), device=self.device, dtype=torch.bfloat16)
        exact = CausalLingBotTransformer(self.plan.config(**overrides), device=self.device, dtype=torch.float64)
        exact.load_state_dict(model.state_dict())
        if self.recipe is not None:
            model.quantize(self.recipe)
        model.weighted_padding = self.plan.prompt_tokens is not None
        got = small_rollout(model)
        with use_backend("reference"):
            model.weighted_padding = False
            plain, truth = small_rollout(model), small_rollout(exact)
        error, plain_error = relative_error(got, truth), relative_error(plain, truth)
        compiled_error = None
        if self.plan.compiled:
            model.cuda_graphs, model.weighted_padding = False, self.plan.prompt_tokens is not None
            with model_compiled.compiled(model.blocks):
                compiled_error = relative_error(small_rollout(model), truth)
        del model, exact
        free()
        return (GREEN if within(error, plain_error) else RED), error, plain_error, compiled_error

    def floor(
        self, session: BenchSession, tokens: int | None = None, heads: int | None = None, *, epilogues: bool = False
    ) -> Callable[[], None]:
        """A graph of every layer's products and attention on its own weights and K/V, with random activations: of all,
        or of a rank with `tokens` of the chunk outside self-attention and `heads` inside.

        With `epilogues` the products add their bias and apply the MLP's activation, as the model's do.
        """
        cfg, library = self.config, session.library
        own_tokens, own_heads = tokens or self.tokens, heads or cfg.num_heads
        keys = session.caches()[1][0][0].shape[1]
        of_text = resolve_library(None, self.device.type, torch.bfloat16, cfg.head_dim, own_tokens, keys, cfg.dim)
        factory: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        x, hidden = torch.randn(own_tokens, cfg.dim, **factory), torch.randn(own_tokens, cfg.ffn_dim, **factory)
        q = torch.randn(1, self.tokens, own_heads, cfg.head_dim, **factory)
        q_text = torch.randn(1, own_tokens, cfg.num_heads, cfg.head_dim, **factory)

        made = self._codes(x[None], hidden[None])

        def product(operand: Tensor, layer: Any, activated: bool = False) -> None:
            if isinstance(layer, Int8Linear):  # its epilogue can't be left out
                layer.product(made[operand.shape[-1]], activation="gelu_tanh" if activated else None)
            elif not epilogues:
                torch.mm(operand, layer.weight.t())
            elif activated:
                ops.linear_gelu(operand, layer.weight, layer.bias)
            else:
                F.linear(operand, layer.weight, layer.bias)

        codes, scale = quantize_values(q.float()) if session.model.int8_qk else (q, q)

        def attend(ring: RingLayer) -> None:
            if isinstance(ring, Int8KeyValue):
                ops.int8_attention(codes, scale, *ring, ring.k.shape[1])
            else:
                _attend(q, *ring, library, False)

        def run() -> None:
            for block, ring, text in zip(session.model.blocks, *session.caches(), strict=True):
                product(x, block.self_attn.qkv)
                attend(ring)
                product(x, block.self_attn.o)
                product(x, block.cross_attn.q)
                _attend(q_text, *text, of_text, False)
                product(x, block.cross_attn.o)
                product(x, block.ffn[0], activated=True)
                product(hidden, block.ffn[2])

        replay = captured(run, self.device)
        replay()
        return replay

    def layer_products(self, model: CausalLingBotTransformer) -> None:
        """A row of a layer's products together, epilogues included, each on its own weights and on rows as the pass
        before it leaves them; the layers take turns, so that no weight is in the L2 when its turn comes again.
        """
        cfg = self.config
        x, hidden = (randn(1, self.tokens, n, device=self.device, dtype=torch.bfloat16) for n in (cfg.dim, cfg.ffn_dim))
        codes = self._codes(x, hidden)

        def taken(layer: Any, rows: Tensor) -> Any:
            return codes[rows.shape[-1]] if isinstance(layer, Int8Linear) else rows

        def products(block: Any) -> None:
            attention, cross, (up, _, down) = block.self_attn, block.cross_attn, block.ffn
            attention.qkv("q", "k", "v", x=taken(attention.qkv, x))
            for layer in (attention.o, cross.q, cross.o):
                layer(taken(layer, x))
            linear_gelu(up, taken(up, x))
            down(taken(down, hidden))

        timing = measure([partial(products, block) for block in model.blocks], self.device, Effort(budget_us=200_000.0))
        flops = 2 * self.tokens * cfg.dim * (6 * cfg.dim + 2 * cfg.ffn_dim)
        self.add(
            "layer_products", "library" if self.recipe is None else OURS, gate=GREEN, **dataclasses.asdict(timing),
            tflops=flops / timing.p50_us / 1e6,
            note="qkv, o, cross q, cross o, ffn up with GELU, ffn down; biases and scales included",
        )  # fmt: skip

    def _codes(self, *operands: Tensor) -> dict[int, QuantizedRows]:
        """Rows by their width, as int8 products take them; none where the plan's products are not in int8."""
        return {} if self.recipe is None else {x.shape[-1]: Int8Rows(None, True).quantize(x) for x in operands}

    def _remember(self, phase: str, held: int | None = None) -> None:
        """Bytes of a phase: allocated by torch now, where not given."""
        torch.cuda.synchronize(self.device)
        self.memory[phase] = torch.cuda.memory_allocated(self.device) if held is None else held

    def _report_memory(self, gated: dict[str, Any]) -> None:
        notes = {
            "weights": "allocated after the weights",
            "session": "allocated after the first chunk: ring, text and camera caches on top",
            "graphs": "allocated with a full window and both graphs captured",
            "steady peak": "most allocated within a steady chunk",
            "in use on the GPU": "of everyone, context and libraries included, after a steady chunk",
        }
        for phase, held in self.memory.items():
            name, note = phase.replace(" on the GPU", ""), f"{held / 2**30:.2f} GiB: {notes[phase]}"
            self.add(f"memory_{name.replace(' ', '_')}", OURS, **gated, bytes=held, method="", note=note)

    def _note(self, session: BenchSession) -> str:
        phases = ", ".join(f"{phase} {held / 2**30:.1f}" for phase, held in self.memory.items())
        layers, whole = self.plan.layers, LingBotConfig.preset(self.plan.preset).num_layers
        scaled = "" if layers in (None, whole) else f"; {layers} of {whole} layers, not extrapolated"
        return f"{session.library} attention; GiB: {phases}; graphs {session.state.graphs.captures} captured{scaled}"

    def add(
        self, op: str, backend: str, times_ms: Sequence[float] = (), ceiling_ms: float = 0.0, **fields: Any
    ) -> None:
        """Report a row, with times only behind a green gate, held against the bare floor."""
        common: dict[str, Any] = {
            "bench": "model", "case": self.case, "peer": False, "shape": (1, self.tokens, self.config.dim),
            "dtype": "bfloat16", "precision": self.plan.precision, "tokens": self.tokens, "dim": self.config.dim,
            "bytes": 0, "method": "events",
        }  # fmt: skip
        row = Row(op=op, backend=backend, **{**common, **fields})
        self.report(row.timed(times_ms if row.gate == GREEN else (), ceiling_ms, "bare floor"))
