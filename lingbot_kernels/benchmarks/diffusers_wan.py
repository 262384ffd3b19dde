"""Runs the diffusers bench: `WanTransformer3DModel` as it is, eager and compiled, against the same module accelerated.

Random weights of Wan-14B's shape, in bfloat16. The gate comes first: two blocks of this width on a small grid, both
formulations against float64.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.benchmarks.gate import relative_error, within
from lingbot_kernels.benchmarks.rows import FAILED, GREEN, RED, Row, failure_note
from lingbot_kernels.benchmarks.scene import NetworkPlan, token_grid
from lingbot_kernels.benchmarks.timing import free, in_turns
from lingbot_kernels.integrations.diffusers import KVWindow, accelerate, restore, wan
from lingbot_kernels.ops.windowed_attention import resolve_library
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

_SAMPLES_PER_VARIANT = 3


@dataclass(frozen=True)
class WanPlan(NetworkPlan):
    """What to measure.

    Attributes:
        frames: of the latents: one chunk of a rollout, or a whole video.
        rounds: how often each variant is timed, in turns.
        compiled: also through torch.compile.
        window_frames, sink_frames: of the causal rollout, measured where a chunk of `frames` fits; 0 leaves it out.
    """

    frames: int = 3
    rounds: int = 7
    compiled: bool = True
    window_frames: int = 18
    sink_frames: int = 3


class WanBench:
    """One run of a plan on a device; `report` is given each row as soon as it is there."""

    def __init__(self, plan: WanPlan, device: torch.device, report: Callable[[Row], None]) -> None:
        self.plan, self.device, self.report = plan, device, report
        self.config = plan.config()
        self.tokens = plan.frames * math.prod(token_grid(self.config, plan.latent_size))
        self.case = f"wan-{plan.name.removeprefix('lingbot-world-')}-s{self.tokens}"

    def make(self, layers: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        cfg = self.config
        torch.manual_seed(0)
        with torch.device(self.device):
            model = wan.WanTransformer3DModel(
                patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim,
                in_channels=cfg.in_channels, out_channels=cfg.out_channels, text_dim=cfg.text_dim,
                freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim, num_layers=layers,
            )  # fmt: skip
        kept = set(model._keep_in_fp32_modules)  # as from_pretrained leaves them in a model of another dtype
        for name, weight in model.named_parameters():
            if kept.isdisjoint(name.split(".")):
                weight.data = weight.data.to(dtype)
        return model.eval()

    def inputs(self, frames: int, size: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        cfg = self.config
        where: dict[str, Any] = {"device": self.device, "dtype": dtype}
        return {
            "hidden_states": torch.randn(1, cfg.in_channels, frames, *size, **where),
            "timestep": torch.tensor([937], device=self.device),
            "encoder_hidden_states": torch.randn(1, cfg.text_len, cfg.text_dim, **where),
        }

    @torch.no_grad()
    def run(self) -> bool:
        """Measure; whether the gate was green and every variant of ours ran."""
        gate, error, plain_error = self.gate()
        gated: dict[str, Any] = {"gate": gate, "error": error, "plain_error": plain_error}
        if gate != GREEN:
            self.report(self._row("lingbot_kernels", [], note="the gate failed: no times", **gated))
            return False
        plain = self.make(self.config.num_layers)
        window = KVWindow(self.plan.window_frames, self.plan.sink_frames) if self.plan.window_frames else None
        fast = _twin(plain)
        accelerate(fast, window)
        values = self.inputs(self.plan.frames, self.plan.latent_size)
        calls: dict[str, Callable[[], Any]] = {
            "diffusers": lambda: plain(**values, return_dict=False),
            "lingbot_kernels": lambda: fast(**values, return_dict=False),
        }
        if self.device.type == "cuda":
            cudnn = _twin(plain)
            for block in cudnn.blocks:
                for attention in (block.attn1, block.attn2):
                    attention.processor._attention_backend = "_native_cudnn"
            calls["diffusers cudnn"] = lambda: cudnn(**values, return_dict=False)
        if self.plan.compiled:  # block by block, as diffusers advises: whole, a deep model compiles for minutes
            compiled = {"diffusers": _twin(plain), "lingbot_kernels": _twin(plain)}
            accelerate(compiled["lingbot_kernels"])
            for module in compiled.values():
                module.compile_repeated_blocks(fullgraph=True)
            calls["diffusers compiled"] = lambda: compiled["diffusers"](**values, return_dict=False)
            calls["lingbot_kernels compiled"] = lambda: compiled["lingbot_kernels"](**values, return_dict=False)
        if self.plan.window_frames:
            calls["lingbot_kernels causal"] = self._causal(fast, values)
        green, notes, want = True, self._notes(), calls["diffusers"]()[0]
        for name, call in list(calls.items()):
            try:
                for _ in range(3):
                    out = call()[0]
                if not name.endswith("causal"):  # which sees other frames
                    difference = relative_error(out, want)
                    if not difference < 0.05:
                        raise ArithmeticError(f"differs from plain diffusers by {difference:.2g}, must be below 0.05")
                    notes[name] += f"; differs from plain by {difference:.2g}"
            except Exception as failure:  # of one variant: a row of its own, not the end of the others
                if name == "diffusers":
                    raise
                self.report(self._row(name, [], note=failure_note(failure), **{**gated, "gate": FAILED}))
                del calls[name]
                green &= not name.startswith("lingbot_kernels")
        times = in_turns(calls, self.plan.rounds, self.device, _SAMPLES_PER_VARIANT)
        ceiling = statistics.median(times["diffusers"])
        for name, taken in times.items():
            self.report(self._row(name, taken, ceiling, note=notes[name], **gated))
        return green

    def _notes(self) -> dict[str, str]:
        library = resolve_library(None, self.device.type, torch.bfloat16, self.config.head_dim)
        compiled = "compile_repeated_blocks(fullgraph=True)"
        return {
            "diffusers": "torch's own choice of attention",
            "diffusers cudnn": "cuDNN attention",
            "diffusers compiled": f"torch's own choice of attention, {compiled}",
            "lingbot_kernels": f"{library} attention",
            "lingbot_kernels compiled": f"{library} attention, {compiled}",
            "lingbot_kernels causal": f"{library} attention, sees {self.plan.window_frames} frames",
        }

    def gate(self) -> tuple[str, float, float]:
        """Errors of two blocks in bfloat16, accelerated and plain, against float64 on the same weights."""
        half = self.make(2)
        values = self.inputs(2, (16, 16))
        exact = copy.deepcopy(half).double()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
        truth = exact(**wide, return_dict=False)[0]
        plain = half(**values, return_dict=False)[0]
        accelerate(half)
        got = half(**values, return_dict=False)[0]
        restore(half)
        error, plain_error = relative_error(got, truth), relative_error(plain, truth)
        del exact, half
        free()
        return (GREEN if within(error, plain_error) else RED), error, plain_error

    def _causal(self, fast: Any, values: dict[str, Tensor]) -> Callable[[], Any]:
        """A denoise step of a session whose window is full."""
        state, frames = RealtimeCausalDiTState(), self.plan.frames
        chunks = -(-self.plan.window_frames // frames) + 1
        for chunk in range(chunks):
            fast(**values, return_dict=False, state=state, start_frame=chunk * frames)
        start = (chunks - 1) * frames
        return lambda: fast(**values, return_dict=False, state=state, start_frame=start)

    def _row(self, backend: str, times_ms: list[float], ceiling_ms: float = 0.0, *, note: str, **gated: Any) -> Row:
        return Row(
            bench="diffusers", case=self.case, op="wan_forward", backend=backend, peer=backend.startswith("diffusers"),
            shape=(1, self.tokens, self.config.dim), dtype="bfloat16", tokens=self.tokens, dim=self.config.dim, bytes=0,
            ceiling="plain diffusers, eager", method="events" if self.device.type == "cuda" else "clock", calls=1,
            note=note, **gated,
        ).timed(times_ms, ceiling_ms)  # fmt: skip


def _shallow(module: Any) -> Any:
    """The module over the same parameters and submodules, which may then be exchanged one by one."""
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return twin


def _twin(model: Any) -> Any:
    """The model over the same parameters; modules that `accelerate` changes or `compile` marks are its own."""
    twin = _shallow(model)
    twin.rope = copy.deepcopy(model.rope)
    twin.blocks = torch.nn.ModuleList(_shallow_block(block) for block in model.blocks)
    return twin


def _shallow_block(block: Any) -> Any:
    """A block with attention modules of its own (they hold the processors) over the same parameters."""
    twin = _shallow(block)
    for name in ("attn1", "attn2"):
        attention = _shallow(getattr(block, name))
        attention.processor = copy.copy(attention.processor)
        twin._modules[name] = attention
    return twin
