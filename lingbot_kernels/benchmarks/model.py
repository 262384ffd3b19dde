"""Runs the model bench: a full-window rollout against the bare floor of the same process, and a peer on the same
weights.

The bare floor is what no fusion can remove: the layers' matrix products and attention, nothing else, in one CUDA graph.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.benchmarks import flashdreams_peer, model_compiled, model_sglang, timeline
from lingbot_kernels.benchmarks.chunk_timer import ChunkTimer, ChunkTimes
from lingbot_kernels.benchmarks.gate import relative_error, within
from lingbot_kernels.benchmarks.rows import ABSENT, FAILED, GREEN, RED, Row, failure_note
from lingbot_kernels.benchmarks.timing import Effort, measure, percentiles
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.files import write_text
from lingbot_kernels.models.embeddings import linear_gelu
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops._dispatch import use_backend
from lingbot_kernels.ops.windowed_attention import _attend, resolve_library
from lingbot_kernels.quantization import Int8Linear, Int8Rows, recipe_of
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.kv_cache import Int8KeyValue, KeyValue, RingLayer
from lingbot_kernels.reference.rotate_quantize import quantize_values
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

STEPS = (1000, 750, 500, 250)
PEERS = ("flashdreams", "sglang")


@dataclass(frozen=True)
class ModelPlan:
    """What to measure.

    Attributes:
        preset: shape of the network; random weights.
        layers: transformer blocks to really run; None for all of the preset's.
        latent_size: (H, W) of the latents.
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

    preset: str = "lingbot-world-14b"
    layers: int | None = None
    latent_size: tuple[int, int] = (58, 104)
    chunks: int = 6
    peers: tuple[str, ...] = ("flashdreams",)
    camera_cache: bool = True
    residual_dtype: str | None = None
    timeline_path: Path | None = None
    compiled: bool = False
    precision: str = "bfloat16"
    prompt_tokens: int | None = None

    def config(self, **overrides: Any) -> LingBotConfig:
        if self.layers is not None:
            overrides.setdefault("num_layers", self.layers)
        if self.residual_dtype is not None:
            overrides.setdefault("residual_dtype", self.residual_dtype)
        return LingBotConfig.preset(self.preset, **overrides)


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
        _, ph, pw = self.config.patch_size
        self.grid = (plan.latent_size[0] // ph, plan.latent_size[1] // pw)
        self.tokens = self.config.frames_per_chunk * self.grid[0] * self.grid[1]
        self.window = self.config.window_frames * self.grid[0] * self.grid[1]
        layers = "" if plan.layers is None else f"-{plan.layers}layers"
        camera = "" if plan.camera_cache else "-no-camera-cache"
        residual = "" if plan.residual_dtype is None else f"-{plan.residual_dtype}-residual"
        prompt = "" if plan.prompt_tokens is None else f"-prompt{plan.prompt_tokens}"
        self.case = f"{plan.preset}{layers}-s{self.tokens}-kv{self.window}{camera}{residual}{prompt}-1gpu"
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
            self.report(self._row("denoise_step", "lingbot_kernels", [], **gated, note="the gate failed: no times"))
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
            floor += [timed(replay_floor) for _ in range(5)]
        ceiling = statistics.median(floor)
        note = self._note(session)
        self.report_times("bare_floor", "library", floor, ceiling, gate=GREEN, note=session.library)
        self.report_chunks(steady, ceiling, **gated, note=note)
        self.report_times("first_chunk", "lingbot_kernels", [first.total], ceiling, **gated, note="window not full")
        self.step_by_kernel(session, ceiling, gated)
        if self.plan.timeline_path is not None:
            self.timelines(session, replay_floor, self.plan.timeline_path)
        green = True
        if self.recipe is None:
            if "flashdreams" in self.plan.peers:
                green &= self.peer(session, ceiling)
            if "sglang" in self.plan.peers:
                green &= model_sglang.measure(self, session, ceiling)
        if compiled_error is not None:
            green &= model_compiled.measure(self, session, ceiling, compiled_error, plain_error)
        return green

    def report_chunks(
        self, chunks: Sequence[ChunkTimes], ceiling: float, note: str, backend: str = "lingbot_kernels", **gated: Any
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
            self.report_times(op, backend, milliseconds, ceiling, note=said, **gated)

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
            self.report_times(
                f"step_phase_{phase}", "lingbot_kernels", [us / replays / 1e3], ceiling_ms, **gated,
                note="replayed, by kernel; of overlapping kernels the later has what remains after the earlier",
            )  # fmt: skip
        busy = 1 - times["gaps"] / sum(times.values())
        self.report(dataclasses.replace(
            self._row("gpu_busy", "lingbot_kernels", [], **gated), ratio=busy, note="1 - gaps / time of replayed steps"
        ))  # fmt: skip
        try:
            held = timeline.analyse([item.kernel for item in placed], self.config.num_layers, replays)
        except ValueError as error:
            self.report(self._row("launches_per_block", "lingbot_kernels", [], **gated, note=f"not told: {error}"))
            return
        launches = held.launches_per_block
        own = launches[timeline.PASSES] + launches[timeline.OTHER]
        note = f"{own:.2f} outside products and attention; " + ", ".join(f"{k} {v:.2f}" for k, v in launches.items())
        row = self._row("launches_per_block", "lingbot_kernels", [], **gated, note=note)
        self.report(dataclasses.replace(row, calls=round(own)))

    def timelines(self, session: BenchSession, replay_floor: Callable[[], None], path: Path) -> None:
        """Record the floor, the floor with the products' epilogues, and the step; print a table, write JSON."""
        assert session.state.kv_cache is not None and session.state.crossattn_cache is not None
        rings, texts = session.state.kv_cache.layers, session.state.crossattn_cache.layers
        with_epilogues = self.floor_graph(session, rings, texts, self.tokens, self.config.num_heads, epilogues=True)
        calls = {"floor": replay_floor, "floor, epilogues": with_epilogues, "step": session.repeated_step()}
        report, table = timeline.compare(calls, self.config.num_layers, self.device)
        self.write_timeline(path, report)
        self.say(table)

    def write_timeline(self, path: Path, report: dict[str, Any]) -> None:
        """Write the file; the rest of the run doesn't depend on it."""
        try:
            write_text(path, json.dumps({"case": self.case, **report}) + "\n")
        except OSError as error:
            self.timeline_error = error

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
        got = _small_rollout(model)
        with use_backend("reference"):
            model.weighted_padding = False
            plain, truth = _small_rollout(model), _small_rollout(exact)
        error, plain_error = relative_error(got, truth), relative_error(plain, truth)
        compiled_error = None
        if self.plan.compiled:
            model.cuda_graphs, model.weighted_padding = False, self.plan.prompt_tokens is not None
            with model_compiled.compiled(model.blocks):
                compiled_error = relative_error(_small_rollout(model), truth)
        del model, exact
        free()
        return (GREEN if within(error, plain_error) else RED), error, plain_error, compiled_error

    def floor(self, session: BenchSession) -> Callable[[], None]:
        """A graph of every layer's products and attention on its own weights and K/V, with random activations."""
        assert session.state.kv_cache is not None and session.state.crossattn_cache is not None
        rings, texts = session.state.kv_cache.layers, session.state.crossattn_cache.layers
        return self.floor_graph(session, rings, texts, self.tokens, self.config.num_heads)

    def floor_graph(
        self,
        session: BenchSession,
        rings: Sequence[RingLayer],
        texts: Sequence[KeyValue],
        own_tokens: int,
        own_heads: int,
        *,
        epilogues: bool = False,
    ) -> Callable[[], None]:
        """The floor's graph for a rank with `own_tokens` of the chunk outside self-attention, `own_heads` inside.

        With `epilogues` the products add their bias and apply the MLP's activation, as the model's do.
        """
        cfg, library = self.config, session.library
        keys = texts[0][0].shape[1]
        of_text = resolve_library(None, self.device.type, torch.bfloat16, cfg.head_dim, own_tokens, keys, cfg.dim)
        factory: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        x, hidden = torch.randn(own_tokens, cfg.dim, **factory), torch.randn(own_tokens, cfg.ffn_dim, **factory)
        q = torch.randn(1, self.tokens, own_heads, cfg.head_dim, **factory)
        q_text = torch.randn(1, own_tokens, cfg.num_heads, cfg.head_dim, **factory)

        made = {} if self.recipe is None else {k.shape[-1]: Int8Rows(None, True).quantize(k[None]) for k in (x, hidden)}

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
            for block, ring, text in zip(session.model.blocks, rings, texts, strict=True):
                product(x, block.self_attn.qkv)
                attend(ring)
                product(x, block.self_attn.o)
                product(x, block.cross_attn.q)
                _attend(q_text, *text, of_text, False)
                product(x, block.cross_attn.o)
                product(x, block.ffn[0], activated=True)
                product(hidden, block.ffn[2])

        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        graph.replay()
        return graph.replay

    def layer_products(self, model: CausalLingBotTransformer) -> None:
        """A row of a layer's products together, epilogues included, each on its own weights and on rows as the pass
        before it leaves them; the layers take turns, so that no weight is in the L2 when its turn comes again.
        """
        cfg, factory = self.config, {"device": self.device, "dtype": torch.bfloat16}
        x = torch.randn(1, self.tokens, cfg.dim, **factory)  # type: ignore[call-overload]
        hidden = torch.randn(1, self.tokens, cfg.ffn_dim, **factory)  # type: ignore[call-overload]
        taken = {
            width: rows if self.recipe is None else Int8Rows(None, True).quantize(rows)
            for width, rows in ((cfg.dim, x), (cfg.ffn_dim, hidden))
        }

        def products(block: Any) -> None:
            attention, cross, (up, _, down) = block.self_attn, block.cross_attn, block.ffn
            attention.qkv("q", "k", "v", x=taken[cfg.dim] if isinstance(attention.qkv, Int8Linear) else x)
            for layer in (attention.o, cross.q, cross.o):
                layer(taken[cfg.dim] if isinstance(layer, Int8Linear) else x)
            linear_gelu(up, taken[cfg.dim] if isinstance(up, Int8Linear) else x)
            down(taken[cfg.ffn_dim] if isinstance(down, Int8Linear) else hidden)

        timing = measure([partial(products, block) for block in model.blocks], self.device, Effort(budget_us=200_000.0))
        flops = 2 * self.tokens * cfg.dim * (6 * cfg.dim + 2 * cfg.ffn_dim)
        row = self._row("layer_products", "library" if self.recipe is None else "lingbot_kernels", [], gate=GREEN)
        self.report(dataclasses.replace(
            row, p20_us=timing.p20_us, p50_us=timing.p50_us, p80_us=timing.p80_us, samples=timing.samples,
            calls=timing.calls, method=timing.method, tflops=flops / timing.p50_us / 1e6,
            note="qkv, o, cross q, cross o, ffn up with GELU, ffn down; biases and scales included",
        ))  # fmt: skip

    def peer(self, session: BenchSession, ceiling: float) -> bool:
        """FlashDreams' denoise step at a full window, gated against ours on a first chunk; False if it disagrees."""
        missing = flashdreams_peer.why_not()
        if missing is not None:
            self.report(self._row("denoise_step", "flashdreams", [], peer=True, gate=ABSENT, note=missing))
            return True
        try:
            error, times = session.run_peer()
        except Exception as failure:  # a peer's failure is a row of its own, not the end of ours
            row = self._row("denoise_step", "flashdreams", [], peer=True, gate=FAILED, note=failure_note(failure))
            self.report(row)
            return True
        gate = GREEN if error < 0.05 else RED
        self.report_times(
            "denoise_step", "flashdreams", times, ceiling, peer=True, gate=gate, error=error, note="compiled, graphed"
        )
        return gate == GREEN

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
            op = "memory_" + phase.replace(" on the GPU", "").replace(" ", "_")
            row = self._row(op, "lingbot_kernels", [], **gated, note=f"{held / 2**30:.2f} GiB: {notes[phase]}")
            self.report(dataclasses.replace(row, bytes=held, method=""))

    def _note(self, session: BenchSession) -> str:
        phases = ", ".join(f"{phase} {held / 2**30:.1f}" for phase, held in self.memory.items())
        whole = LingBotConfig.preset(self.plan.preset).num_layers
        scaled = (
            "" if self.plan.layers in (None, whole) else f"; {self.plan.layers} of {whole} layers, not extrapolated"
        )
        return f"{session.library} attention; GiB: {phases}; graphs {session.state.graphs.captures} captured{scaled}"

    def report_times(self, op: str, backend: str, times_ms: Sequence[float], ceiling_ms: float, **fields: Any) -> None:
        row = self._row(op, backend, times_ms, **fields)
        if row.p50_us is not None:
            row = dataclasses.replace(
                row, ceiling="bare floor", ceiling_us=ceiling_ms * 1e3, ratio=row.p50_us / (ceiling_ms * 1e3)
            )
        self.report(row)

    def _row(self, op: str, backend: str, times_ms: Sequence[float], *, peer: bool = False, **fields: Any) -> Row:
        row = Row(
            bench="model", case=self.case, op=op, backend=backend, peer=peer, shape=(1, self.tokens, self.config.dim),
            dtype="bfloat16", precision=self.plan.precision, tokens=self.tokens, dim=self.config.dim, bytes=0,
            method="events", **fields,
        )  # fmt: skip
        if not times_ms or fields["gate"] != GREEN:
            return row
        p = percentiles(times_ms)
        return dataclasses.replace(
            row, p20_us=p["p20"] * 1e3, p50_us=p["p50"] * 1e3, p80_us=p["p80"] * 1e3, samples=len(times_ms), calls=1
        )


class BenchSession:
    """A rollout of the bench's model with random inputs, one chunk at a time."""

    def __init__(self, bench: ModelBench, model: CausalLingBotTransformer) -> None:
        self.bench, self.model = bench, model
        cfg, device = model.config, bench.device
        heads = cfg.num_heads // model.shard_group.ranks
        shape = (bench.tokens, bench.window, heads * cfg.head_dim)
        self.library = resolve_library(None, device.type, model.dtype, cfg.head_dim, *shape)
        self.state = RealtimeCausalDiTState(camera_cache=bench.plan.camera_cache)
        self.timer = ChunkTimer(device)
        self.stage = CausalDenoisingStage(model, STEPS, observe=self.timer.observe)
        self.text = torch.randn(1, bench.plan.prompt_tokens or cfg.text_len, cfg.text_dim, device=device)
        self.first: Tensor | None = None
        self.latents = (1, cfg.out_channels, cfg.frames_per_chunk, *bench.plan.latent_size)

    def chunk(self) -> ChunkTimes:
        """Denoise and time the next chunk, context update included, on new noise and a new camera."""
        self.timer.start()
        noise = torch.randn(self.latents, device=self.bench.device)
        camera = self.new_camera()
        self.timer.inputs_ready()
        chunk = self.stage.denoise_chunk(self.state, noise, text=self.text, camera=camera)
        self.timer.chunk_ready()
        times = self.timer.stop()
        self.first = chunk if self.first is None else self.first
        if not bool(torch.isfinite(chunk).all()):
            raise FloatingPointError("the chunk is not finite")
        return times

    def new_camera(self) -> Tensor:
        batch, _, *rest = self.latents
        return torch.randn(batch, self.model.config.camera_channels, *rest, device=self.bench.device)

    def fill(self, begun: Callable[[], None] = lambda: None) -> ChunkTimes:
        """Run until the window is full and graphs are captured; the first chunk's times. `begun` is called after it."""
        cfg = self.model.config
        first = self.chunk()
        begun()
        for _ in range(-(-cfg.window_frames // cfg.frames_per_chunk) + 1):
            self.chunk()
        return first

    def new_latents(self) -> Tensor:
        """What a forward reads: noisy latents and image condition."""
        return torch.randn(1, self.model.config.in_channels, *self.latents[2:], device=self.bench.device)

    def step(self, camera: Tensor, latents: Tensor | None = None) -> Tensor:
        """One more denoise step of the current chunk."""
        flow = self.model(
            self.new_latents() if latents is None else latents,
            self.text, 1000.0, state=self.state, start_frame=self.state.chunk_start_frame, camera=camera,
        )  # fmt: skip
        assert isinstance(flow, Tensor)
        return flow

    def repeated_step(self) -> Callable[[], Tensor]:
        """`step` on one camera: what repeats within a chunk, a graph's replay once the window is full."""
        camera = self.new_camera()
        return lambda: self.step(camera)

    def run_peer(self) -> tuple[float, list[float]]:
        """(Relative difference of the first chunk's flow from ours, milliseconds of its steps at a full window)."""
        model, bench = self.model, self.bench
        peer = flashdreams_peer.FlashDreamsPeer(model, self.text, bench.grid)
        camera, channels = self.new_camera(), model.config.in_channels
        embedding = model._embed_camera(camera)
        latents = torch.randn(1, channels, *self.latents[2:], device=bench.device)
        fresh = RealtimeCausalDiTState(camera_cache=False)
        ours = model(latents, self.text, 937.5, state=fresh, start_frame=0, camera=camera)
        theirs = peer.forward(latents, 937.5, embedding, 0)
        _, ph, pw = model.config.patch_size
        shaped = theirs.unflatten(1, (self.latents[2], *bench.grid)).unflatten(-1, (-1, ph, pw))
        shaped = shaped.permute(0, 4, 1, 2, 5, 3, 6).reshape(ours.shape).float()
        error = relative_error(shaped, ours)
        peer.end_chunk(0)
        fresh.dispose()
        chunks = -(-model.config.window_frames // model.config.frames_per_chunk)
        for chunk in range(1, chunks + 2):
            for step in range(3):
                peer.forward(latents, 937.5, embedding, chunk, first=step == 0)
            peer.end_chunk(chunk)
        peer.forward(latents, 937.5, embedding, chunks + 2)
        times = [timed(lambda: peer.forward(latents, 937.5, embedding, chunks + 2, first=False)) for _ in range(20)]
        return error, times[5:]


def _small_rollout(model: CausalLingBotTransformer) -> Tensor:
    """7 chunks with eviction on a grid of 4 x 6 tokens, from one seed: [1, C, 21, H, W], float64."""
    generator = torch.Generator(model.device).manual_seed(3)
    frames, size = 7 * model.config.frames_per_chunk, (8, 12)
    text = torch.randn(1, 9, model.config.text_dim, device=model.device, generator=generator)
    camera = torch.randn(1, model.config.camera_channels, frames, *size, device=model.device, generator=generator)
    stage = CausalDenoisingStage(model, STEPS)
    chunks = stage.rollout(RealtimeCausalDiTState(), 7, text=text, camera=camera, generator=generator)
    return torch.cat([chunk.double() for chunk in chunks], dim=2)


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of the GPU's time, by events; waits."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
