"""What eight bits cost a network: each chunk against float32, with the exact model's history and with its own.

The report (`--json`) is one object:

- environment, device: as a rollout's. model: preset, checkpoint, parameters, config; weights ("plain", "loud" or
  "checkpoint").
- settings: dtype and residual_dtype (of the model), chunks, tokens_per_chunk, window_frames, recipe, min_psnr.
- teacher_forced: precision ("bfloat16", "int8", "int8_plain": without the rotation, "fp8": e4m3 with a scale a row, on
  the same products, "int8_qk": int8, and self-attention's Q and K, where the network can, "int8_fp8_attention": int8,
  and self-attention by FlashAttention-3 in fp8 with V's mean taken out, where fa3-fwd can) -> psnr_db (one a chunk),
  error (the worst chunk's relative error). The history is the float32 rollout's: every chunk is denoised after its
  clean chunks.
- free_rollout: precision -> psnr_db and error where each rollout goes on from its own chunks: how far it drifts.
- by_product, by_block: relative error of one forward in float32 with only that product (in all blocks), or only that
  block (all its products), in int8.
- memory: precision -> bytes of the weights and of the session, as planned.
- step_ms: precision -> median of a denoise step at a full window; None without a GPU.
- leave_out: what to leave in bfloat16 to reach min_psnr (empty: nothing), predicted_db and measured_db (the worst
  chunk's, with the recipe that leaves it out); None without min_psnr.
- verdict: whether to use it, in a sentence; good: whether.

A PSNR is 10 log10(range^2 / mean squared error) of the latents, range being that of the float32 chunk's values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.benchmarks import environment
from lingbot_kernels.benchmarks.fp8_attention import in_fp8_attention, why_not_fp8
from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.replaced_layers import (
    Fp8Linear,
    WideLinear,
    folded,
    int8_stand_in,
    layer_names,
    replaced,
    values_without_bias,
)
from lingbot_kernels.benchmarks.rows import GREEN, OURS, RED
from lingbot_kernels.benchmarks.scene import Scene, SceneSession, StageInputs, chunks_of_a_window
from lingbot_kernels.benchmarks.timing import event_ms
from lingbot_kernels.models.quantize import why_not_int8_qk
from lingbot_kernels.quantization import Int8Recipe
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.memory import session_memory, weights_memory

BELOW_BFLOAT16 = {"plain": 6.0, "loud": 7.0, "checkpoint": 7.0}  # dB that it may lie below bfloat16
FP8_ATTENTION = "int8_fp8_attention"
OWN_ROLLOUTS = ("bfloat16", "int8", "int8_qk", FP8_ATTENTION)  # these go on from their own chunks too, and are timed
TIMED_STEPS = 10


@dataclass(frozen=True)
class QualityPlan:
    """What to measure.

    Attributes:
        weights: "plain", "loud" or "checkpoint": where the network's weights are from.
        recipe: the int8 that is judged.
        chunks: of each rollout.
        min_psnr: dB that the worst chunk must have; None: no such wish.
    """

    weights: str
    recipe: Int8Recipe
    chunks: int = 8
    min_psnr: float | None = None


def psnr_db(got: Tensor, want: Tensor) -> float:
    """10 log10(range^2 / mse) in dB, range being that of want's values; -inf where got is not finite."""
    if not bool(got.isfinite().all()):
        return -math.inf
    spread = float(want.max() - want.min())
    error = float((got.double() - want.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(spread**2 / error)


class QualityBench:
    """Measures one network; `say` is told what is under way. The model ends as it began."""

    def __init__(self, scene: Scene, plan: QualityPlan, say: Callable[[str], None] = lambda text: None) -> None:
        self.scene, self.plan, self.say = scene, plan, say
        self.model = scene.model
        self.layers = self.model.config.num_layers
        self.inputs = list(itertools.islice(scene.inputs(), plan.chunks))

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The report."""
        self.say("float32 rollout")
        with self.widened():
            exact = self.rollout()
        forced: dict[str, Any] = {}
        free: dict[str, Any] = {}
        step_ms: dict[str, float] | None = {} if self.model.device.type == "cuda" else None
        for name, within in self.precisions().items():
            self.say(f"{name}, with the history of float32")
            with within():
                forced[name] = self.compare(self.rollout(exact), exact)
                if name in OWN_ROLLOUTS:
                    self.say(f"{name}, on its own")
                    free[name] = self.compare(self.rollout(), exact)
                    if step_ms is not None:
                        step_ms[name] = self.step_ms()
        by_product, by_block = self.sensitivity()
        report: dict[str, Any] = {
            **environment.report_head(self.model.device),
            "model": {**self.scene.describe(), "weights": self.plan.weights},
            "settings": self.settings(),
            "teacher_forced": forced,
            "free_rollout": free,
            "by_product": by_product,
            "by_block": by_block,
            "memory": self.memory(),
            "step_ms": step_ms,
            "leave_out": None,
        }
        if self.plan.min_psnr is not None:
            report["leave_out"] = self.leave_out(report, exact)
        report["good"], report["verdict"] = judge(report)
        return report

    def settings(self) -> dict[str, Any]:
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "chunks": self.plan.chunks,
            "tokens_per_chunk": self.scene.chunk_tokens,
            "window_frames": self.model.config.window_frames,
            "residual_dtype": self.model.config.residual_dtype,
            "recipe": self.plan.recipe.to_dict(),
            "min_psnr": self.plan.min_psnr,
        }

    def precisions(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Precision -> what makes the model compute in it, for as long as it is entered."""
        recipe = self.plan.recipe
        return {
            "bfloat16": nullcontext,
            "int8": lambda: self.in_int8(recipe),
            "int8_plain": lambda: self.in_int8(dataclasses.replace(recipe, rotate=False)),
            "fp8": lambda: replaced(self.model, layer_names(self.layers, recipe), Fp8Linear),
            **({"int8_qk": lambda: self.in_int8_qk(recipe)} if why_not_int8_qk(self.model) is None else {}),
            **({FP8_ATTENTION: lambda: self.in_fp8_attention(recipe)} if why_not_fp8(self.model) is None else {}),
        }

    @contextmanager
    def in_int8(self, recipe: Int8Recipe) -> Iterator[None]:
        names, dtype = layer_names(self.layers, recipe), self.model.dtype
        with (
            folded(self.model, recipe),
            replaced(self.model, names, lambda layer: int8_stand_in(layer, recipe, dtype)),
        ):
            yield

    @contextmanager
    def in_int8_qk(self, recipe: Int8Recipe) -> Iterator[None]:
        """The products in int8, and self-attention's Q and K, of the sessions that begin within."""
        with self.in_int8(recipe):
            self.model.recipe = dataclasses.replace(recipe, attention="int8_qk")
            try:
                yield
            finally:
                self.model.recipe = None

    @contextmanager
    def in_fp8_attention(self, recipe: Int8Recipe) -> Iterator[None]:
        """The products in int8, and self-attention in fp8, of the sessions that begin within."""
        with self.in_int8(recipe), in_fp8_attention(self.model):
            yield

    @contextmanager
    def widened(self) -> Iterator[None]:
        """The model in float32. The blocks' weights are widened one at a time: they stay in memory as they are."""
        dtype = self.model.dtype
        with replaced(self.model, layer_names(self.layers, camera=self.model.config.camera), WideLinear):
            self.model.float()
            try:
                yield
            finally:
                self.model.to(dtype)  # exact: float32 holds every value of a narrower dtype

    def rollout(self, history: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Each chunk's clean latents, float32 on the CPU; after its own chunks, or after those of `history`."""
        session = SceneSession(self.scene)
        chunks = [
            session.denoise(given, None if history is None else history[i]).float().cpu()
            for i, given in enumerate(self.inputs)
        ]
        session.state.dispose()
        return chunks

    def compare(self, got: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, Any]:
        """psnr_db of each chunk, and the worst chunk's relative error."""
        return {
            "psnr_db": [psnr_db(a, b) for a, b in zip(got, exact, strict=True)],
            "error": max(relative_error(a, b) for a, b in zip(got, exact, strict=True)),
        }

    def sensitivity(self) -> tuple[dict[str, float], dict[str, float]]:
        """Relative error of one forward in float32 with one product in int8, in all blocks; and with one block."""
        recipe = self.plan.recipe
        with self.widened(), one_forward(self.scene, self.inputs) as (forward, state):
            exact = forward()

            def error(part: Int8Recipe) -> float:
                with values_without_bias(self.model, part, state), self.in_int8(part):
                    return relative_error(forward(), exact)

            by_product, by_block = {}, {}
            for product in recipe.products:
                self.say(f"{product} alone in int8")
                by_product[product] = error(dataclasses.replace(recipe, products=(product,)))
            for block in range(self.layers):
                self.say(f"block {block} alone in int8")
                others = tuple(f"blocks.{i}" for i in range(self.layers) if i != block)
                by_block[f"blocks.{block}"] = error(dataclasses.replace(recipe, leave_out=(*recipe.leave_out, *others)))
        return by_product, by_block

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of weights and session, as planned."""
        cfg, dtype, camera = self.model.config, self.model.dtype, self.scene.camera is not None
        recipes: dict[str, Int8Recipe | None] = {"bfloat16": None, "int8": self.plan.recipe}
        if why_not_int8_qk(self.model) is None:
            recipes["int8_qk"] = dataclasses.replace(self.plan.recipe, attention="int8_qk")
        return {
            name: {
                "weights": weights_memory(cfg, dtype, recipe).total,
                "session": session_memory(cfg, self.scene.grid, dtype, camera=camera, recipe=recipe).total,
            }
            for name, recipe in recipes.items()
        }

    def step_ms(self) -> float:
        """Median of a denoise step at a full window, by events, graphs replayed where they may be."""
        session = SceneSession(self.scene)
        for given in itertools.islice(self.scene.inputs(), chunks_of_a_window(self.model.config) + 2):
            session.chunk(given)
        times = [event_ms(lambda: _forward(session, given)) for _ in range(TIMED_STEPS)]
        session.state.dispose()
        return statistics.median(times[1:])

    def leave_out(self, report: dict[str, Any], exact: Sequence[Tensor]) -> dict[str, Any]:
        """What to leave in the model's dtype for the worst chunk to reach min_psnr: predicted, then measured."""
        assert self.plan.min_psnr is not None
        names, predicted = choose(report, self.plan.recipe, self.layers, self.plan.min_psnr)
        measured = min(report["teacher_forced"]["int8"]["psnr_db"])
        if names:
            recipe = dataclasses.replace(self.plan.recipe, leave_out=(*self.plan.recipe.leave_out, *names))
            self.say("int8 without what is left out")
            with self.in_int8(recipe):
                measured = min(self.compare(self.rollout(exact), exact)["psnr_db"])
        return {"names": names, "predicted_db": predicted, "measured_db": measured}


def _forward(session: SceneSession, given: StageInputs) -> Tensor:
    """One more denoise step of the session's current chunk."""
    scene, state, model = session.scene, session.state, session.scene.model
    empty = given.noise.new_zeros(1, model.config.in_channels - model.config.out_channels, *given.noise.shape[2:])
    flow = model(
        torch.cat([given.noise, empty], 1), scene.text, scene.schedule.times[0], state=state,
        start_frame=state.chunk_start_frame, camera=given.camera,
    )  # fmt: skip
    assert isinstance(flow, Tensor)
    return flow


@contextmanager
def one_forward(
    scene: Scene, inputs: Sequence[StageInputs]
) -> Iterator[tuple[Callable[[], Tensor], RealtimeCausalDiTState]]:
    """(a function that runs one step of the last of these chunks, after the others, with the layers of the moment; its
    session).
    """
    session, graphs = SceneSession(scene), scene.model.cuda_graphs
    scene.model.cuda_graphs = False  # they would be captured anew for each set of layers
    try:
        for given in inputs:
            session.chunk(given)
        yield (lambda: _forward(session, inputs[-1]).double()), session.state
    finally:
        scene.model.cuda_graphs = graphs
        session.state.dispose()


def choose(report: dict[str, Any], recipe: Int8Recipe, layers: int, min_psnr: float) -> tuple[list[str], float]:
    """(what to leave out, the worst chunk's PSNR predicted without it), loudest products first.

    Errors of products add up as if independent: energies, of a block and a product in proportion to what each causes
    alone. What bfloat16 itself costs stays.
    """
    forced = report["teacher_forced"]
    whole = 10 ** (-min(forced["int8"]["psnr_db"]) / 10)  # mean squared errors, by range^2
    floor = min(whole, 10 ** (-min(forced["bfloat16"]["psnr_db"]) / 10))
    parts = {
        f"{block}.{product}": by_block**2 * by_product**2
        for block, by_block in report["by_block"].items()
        for product, by_product in report["by_product"].items()
        if recipe.has(int(block.removeprefix("blocks.")), product)
    }
    total = sum(parts.values())
    names: list[str] = []
    left = total

    def predicted() -> float:
        error = floor + (whole - floor) * (left / total if total else 0.0)
        return math.inf if error <= 0 else -10 * math.log10(error)

    for name in sorted(parts, key=lambda name: -parts[name]):
        if predicted() >= min_psnr:
            break
        names.append(name)
        left = max(0.0, left - parts[name])
    for block in range(layers):  # a block of which nothing is left is named as a whole
        own = [name for name in parts if name.startswith(f"blocks.{block}.")]
        if own and all(name in names for name in own):
            names = [name for name in names if name not in own] + [f"blocks.{block}"]
    return names, predicted()


def judge(report: dict[str, Any]) -> tuple[bool, str]:
    """(whether to use int8, in a sentence why)."""
    forced = {name: min(found["psnr_db"]) for name, found in report["teacher_forced"].items()}
    below, above = forced["bfloat16"] - forced["int8"], forced["int8"] - forced["fp8"]
    limit, wanted = BELOW_BFLOAT16[report["model"]["weights"]], report["settings"]["min_psnr"]
    place = f"{forced['int8']:.1f} dB, {below:.1f} below bfloat16 and {above:.1f} above fp8"
    if wanted is not None and forced["int8"] < wanted:
        chosen = report["leave_out"]
        if chosen["measured_db"] >= wanted:
            names = ", ".join(chosen["names"])
            return True, f"Use int8 with leave_out={names}: {chosen['measured_db']:.1f} dB (all of it: {place})."
        return False, (
            f"Do not use int8 for {wanted:g} dB: it has {place}, {chosen['measured_db']:.1f} dB with "
            f"{len(chosen['names'])} products or blocks left out."
        )
    if below > limit:
        return False, f"Do not use int8: the worst chunk has {place}, must be at most {limit:g} below."
    return True, f"Use int8: the worst chunk has {place}."


def bench_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the report, one for each rollout: op `teacher_forced` and `free_rollout`, precision, psnr_db, error."""
    model, settings = report["model"], report["settings"]
    origin = model["preset"] or "checkpoint"
    case = f"{origin}-{model['weights']}-{model['config']['num_layers']}layers-{settings['chunks']}chunks"
    case += f"-s{settings['tokens_per_chunk']}"
    if settings["residual_dtype"] != "bfloat16":
        case += f"-{settings['residual_dtype']}-residual"
    blank = dict.fromkeys(("p20_us", "p50_us", "p80_us", "ceiling_us", "ratio"))
    return [
        {
            "bench": "quality", "op": op, "case": case, "backend": OURS, "peer": precision == "fp8",
            "precision": precision, "dtype": settings["dtype"], "bytes": 0, **blank,
            "gate": GREEN if report["good"] or precision != "int8" else RED, "note": report["verdict"],
            "psnr_db": [round(value, 2) for value in found["psnr_db"]], "error": float(f"{found['error']:.5g}"),
        }
        for op in ("teacher_forced", "free_rollout")
        for precision, found in report[op].items()
    ]  # fmt: skip
