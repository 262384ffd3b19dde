"""Train the network of the tiny world: from examples/, `python -m tiny_world.train --minutes 24`.

Flow matching on walks that are rendered as they are needed, with the times of the sampler that will be used. Of each
batch a first step sees the true past, a little noisy; the steps after it see the past as the step before has just
predicted it, since that is what a rollout will see. What is drawn in a step depends on the seed and the step alone, so
that training may stop and go on anywhere.

It leaves in --out: state.pt (to go on from), loss.json and loss.png, sheet.png and sheet.json (unseen walks beside the
truth, PSNR per chunk), and weights/, which `from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld
from lingbot_kernels.stages.schedule import warp
from tiny_world import latents, pictures
from tiny_world.journeys import Journeys, Noise, roll_plain
from tiny_world.muon import Muon
from tiny_world.network import SCHEDULE, SHIFT, ClipFlow, initial_weights, world_config
from tiny_world.scene import DEFAULT_SEED, Scene
from tiny_world.walks import Rays, Walks, random_walks

SHEET_SEED = 2**31 - 1  # of walks and noise of the sheet: no step of training draws by it


@dataclass(frozen=True)
class Settings:
    """All that decides what a training makes, but for the machine and, where `steps` is 0, for its pace.

    Attributes:
        dim, layers, ffn, heads, side: of the network; `side` is a token's latent positions, each way.
        height, width: of the pictures in pixels.
        clips, chunks: of a batch.
        steps: steps in all; 0: as many as the minutes allow.
        minutes: of training in all where `steps` is 0.
        rate: peak of the learning rate.
        muon: 1: Muon for the blocks' matrices, 0: AdamW for all.
        own_past: share of the training after which steps see predicted pasts.
        repeats: steps on one batch from then on.
    """

    seed: int = DEFAULT_SEED
    dim: int = 256
    layers: int = 6
    ffn: int = 448
    heads: int = 4
    side: int = 3
    height: int = 54
    width: int = 96
    clips: int = 8
    chunks: int = 8
    steps: int = 0
    minutes: float = 24.0
    rate: float = 1.5e-3
    muon: int = 0
    own_past: float = 0.3
    repeats: int = 3

    def config(self) -> LingBotConfig:
        """The network's shape."""
        return world_config(
            dim=self.dim, num_heads=self.heads, num_layers=self.layers, ffn_dim=self.ffn,
            patch_size=(1, self.side, self.side),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        return self.height // latents.SIDE

    @property
    def columns(self) -> int:
        return self.width // latents.SIDE

    def check(self) -> None:
        """Raise ValueError where a size doesn't fit."""
        step = latents.SIDE * self.side
        for name in ("height", "width"):
            if getattr(self, name) < 1 or getattr(self, name) % step:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be a positive multiple of {step}")
        for name in ("clips", "chunks", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be 1 or more")
        if self.steps < 0 or not self.minutes > 0:
            raise ValueError(f"steps, minutes: got {self.steps} and {self.minutes}, must be >= 0 and > 0")


def draw_times(clips: int, chunks: int, generator: torch.Generator) -> Tensor:
    """Sigmas float32 [clips, chunks]: nine in ten are those of the sampler's steps, the others anywhere."""
    device = generator.device
    steps = _sampler_sigmas(str(device))
    picked = steps[torch.randint(len(steps), (clips, chunks), generator=generator, device=device)]
    u = torch.rand(clips, chunks, generator=generator, device=device).clamp_min(0.02)
    elsewhere = torch.rand(clips, chunks, generator=generator, device=device) < 0.1
    return torch.where(elsewhere, warp(u, SHIFT), picked)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4)
def _sampler_sigmas(device: str) -> Tensor:
    """Kept on the device: a copy there waits for all that was launched."""
    return torch.tensor(SCHEDULE.sigmas, device=device)


def flow_loss(
    flow: ClipFlow, weights: dict[str, Tensor], batch: Journeys, past: Tensor, gap: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(mean squared error of the flow, the clean latents that it means [B, 16, F, h, w], without a gradient).

    Args:
        past: the history that chunks see [B, 16, F, h, w].
        gap: see `ClipFlow`; the second chunk then goes on from the first, as if it had just been.
    """
    clean, frames = batch.latents, flow.cfg.frames_per_chunk
    clips, chunks = len(clean), clean.shape[2] // frames
    sigmas = draw_times(clips, chunks, generator)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigma = sigmas.repeat_interleave(frames, 1)[:, None, :, None, None]
    noisy = (1 - sigma) * clean + sigma * noise
    predicted = flow(weights, noisy, past, batch.condition, 1000 * sigmas, batch.camera, gap)
    error = (predicted - (noise - clean)).square()
    return error.mean(), (noisy - sigma * predicted).detach()


def make_optimizers(
    weights: dict[str, Tensor], settings: Settings, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW; with `settings.muon` the blocks' matrices go to Muon."""
    matrices = {name for name, x in weights.items() if settings.muon and name.startswith("blocks.") and x.dim() == 2}
    rest = [x for name, x in weights.items() if name not in matrices]
    groups = [
        {"params": [x for x in rest if x.dim() == 2], "weight_decay": 0.01},
        {"params": [x for x in rest if x.dim() != 2], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    ]
    if matrices:
        made.append(Muon([weights[name] for name in sorted(matrices)], lr=settings.rate))
    return made


class Trainer:
    """A training: its weights, their running mean, the optimizers, and how far it has come."""

    def __init__(self, settings: Settings, device: torch.device, compiled: bool = False) -> None:
        settings.check()
        self.settings, self.device = settings, device
        self.cfg = settings.config()
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in CausalLingBotTransformer(self.cfg).state_dict().items()}
        first = initial_weights(self.cfg, shapes, settings.seed)
        self.weights = {name: x.to(device).requires_grad_() for name, x in first.items()}
        self.mean = {name: x.detach().clone() for name, x in self.weights.items()}
        self.optimizers = make_optimizers(self.weights, settings, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.flow = ClipFlow(self.cfg, self.dtype, compiled)
        self.scene = Scene.make(settings.seed, device)
        self.rays = Rays(settings.rows, settings.columns, device)
        cast = torch.compile(self.scene.cast, dynamic=False) if compiled else None
        self.render: Callable[..., Tensor] = functools.partial(self.scene.render, cast=cast)
        self.generator = torch.Generator(device)
        self.step, self.rounds, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._walks = functools.lru_cache(maxsize=1)(self._draw_walks)

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1."""
        if self.settings.steps:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds / (60 * self.settings.minutes))

    def rate(self) -> float:
        """The learning rate: up, level, and from the middle on down to 0."""
        done = self.progress
        return self.settings.rate * min(1.0, (done + 1e-4) / 0.02, 2 * (1 - done))

    def seeded(self, purpose: int, number: int) -> torch.Generator:
        """The generator for one purpose of one round, whatever was drawn before."""
        return self.generator.manual_seed((self.settings.seed * 4 + purpose) * 2**32 + number)

    WALKS_AT_ONCE = 64  # batches

    def _draw_walks(self, number: int) -> Walks:
        count = self.settings.clips * self.WALKS_AT_ONCE
        frames = self.settings.chunks * self.cfg.frames_per_chunk
        return random_walks(self.scene, count, frames, self.seeded(0, number))

    def batch(self) -> Journeys:
        """The clips of the round that comes."""
        pool, place = divmod(self.rounds, self.WALKS_AT_ONCE)
        walks, mine = self._walks(pool), slice(place * self.settings.clips, (place + 1) * self.settings.clips)
        return Journeys.make(self.scene, Walks(walks.keys[mine], walks.poses[mine]), self.rays, self.render)

    def round(self) -> None:
        """One batch: a step with the true past, then, later in training, steps with predicted pasts."""
        with torch.no_grad():
            batch = self.batch()
        generator = self.seeded(1, self.rounds)
        blur = 0.1 * torch.rand(len(batch.latents), 1, 1, 1, 1, generator=generator, device=self.device)
        true_past = batch.latents + blur * torch.randn(batch.latents.shape, generator=generator, device=self.device)
        host = torch.Generator().manual_seed(self.rounds)
        far = torch.rand((), generator=host).item() < 0.25
        gap = int(torch.randint(1, 40, (), generator=host)) * self.cfg.frames_per_chunk if far else 0
        repeats = self.settings.repeats if self.progress >= self.settings.own_past else 1
        past = true_past
        for _ in range(repeats):
            predicted = self._step(batch, past, gap, generator)
            kept = torch.rand(len(past), 1, 1, 1, 1, generator=generator, device=self.device) < 0.2
            past = torch.where(kept, true_past, predicted)
        self.rounds += 1

    def _step(self, batch: Journeys, past: Tensor, gap: int, generator: torch.Generator) -> Tensor:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
        loss, predicted = flow_loss(self.flow, self.weights, batch, past, gap, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.values()), list(self.weights.values()), 1 - keep)
        self._losses.append(loss.detach())
        return predicted

    def run(self, pause_after: float = math.inf, log_every: int = 100, say: Callable[[str], None] = print) -> None:
        """Train until all is done, or for `pause_after` minutes, whichever comes first; ends between two rounds."""
        begin, before, logged = time.monotonic(), self.seconds, self.step
        since = begin
        while self.progress < 1 and time.monotonic() - begin < 60 * pause_after:
            self.round()
            if self.step - logged >= log_every:
                loss = torch.stack(self._losses).mean().item()  # waits for the device
                self._losses, now = [], time.monotonic()
                if not math.isfinite(loss):
                    raise RuntimeError(f"loss: got {loss} after step {self.step}, must be finite")
                entry = {
                    "step": self.step, "loss": loss, "rate": self.rate(), "seconds": before + now - begin,
                    "steps_per_second": (self.step - logged) / (now - since),
                }  # fmt: skip
                logged, since = self.step, now
                self.log.append(entry)
                say(json.dumps({name: round(value, 6) for name, value in entry.items()}))
            self.seconds = before + time.monotonic() - begin
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = before + time.monotonic() - begin

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on with the same bits."""
        return {
            "settings": dataclasses.asdict(self.settings), "step": self.step, "rounds": self.rounds,
            "seconds": self.seconds, "log": self.log, "losses": self._losses,
            "weights": {name: x.detach() for name, x in self.weights.items()}, "mean": self.mean,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made; ValueError where it is of other settings, with this training as it was."""
        mine = dataclasses.asdict(self.settings)
        for name, value in state["settings"].items():
            if mine[name] != value:
                raise ValueError(f"{name}: got {mine[name]}, must be {value} as in the training that is to go on")
        with torch.no_grad():
            for own, stored in ((self.weights, state["weights"]), (self.mean, state["mean"])):
                for name, x in own.items():
                    x.copy_(stored[name])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.rounds, self.seconds = state["step"], state["rounds"], state["seconds"]
        self.log, self._losses = list(state["log"]), list(state["losses"])

    def save_model(self, folder: Path, facts: dict[str, Any]) -> None:
        """The running mean of the weights in bfloat16 as a checkpoint, with training.json beside it."""
        model = CausalLingBotTransformer(self.cfg, dtype=torch.bfloat16)
        model.load_state_dict({name: x.to("cpu", torch.bfloat16) for name, x in self.mean.items()})
        model.save_pretrained(folder)
        facts = {
            "settings": dataclasses.asdict(self.settings), "steps": self.step, "seconds": round(self.seconds, 1),
            **facts,
        }  # fmt: skip
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    def sheet(self, folder: Path, walks: int = 3, chunks: int = 12) -> dict[str, Any]:
        """Roll unseen walks out with the running mean; sheet.png and sheet.json, whose content is returned."""
        frames = chunks * self.cfg.frames_per_chunk
        drawn = random_walks(
            Scene.make(self.settings.seed), walks, frames, torch.Generator().manual_seed(SHEET_SEED)
        )  # on the CPU: the same walks wherever it trains
        with torch.no_grad():
            journeys = Journeys.make(self.scene, Walks(drawn.keys, drawn.poses.to(self.device)), self.rays)
            plain = PlainLingBotWorld(self.cfg, self.mean, self.dtype)
            shown = roll_plain(plain, journeys, Noise.draw(journeys.latents, SHEET_SEED))
        values = [
            pictures.psnr_per_chunk(got, want, self.cfg.frames_per_chunk)
            for got, want in zip(shown, journeys.pixels, strict=True)
        ]
        ours, truth = pictures.to_uint8(shown), pictures.to_uint8(journeys.pixels)
        each = slice(None, None, self.cfg.frames_per_chunk)
        pictures.save_sheet(
            folder / "sheet.png", [row[each] for pair in zip(truth, ours, strict=True) for row in pair]
        )  # fmt: skip
        report = {"step": self.step, "rows": "truth, ours, a frame a chunk", "psnr_per_chunk": values}
        (folder / "sheet.json").write_text(json.dumps(report, indent=2) + "\n")
        return report


def save_state(trainer: Trainer, path: Path) -> None:
    """Write what training goes on from: whole, or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(trainer.state(), partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--out", type=Path, default=Path("out/tiny_world"))
    parser.add_argument("--pause-after", type=float, default=math.inf, help="minutes in this call; go on with another")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks and the renderer")
    parser.add_argument("--commit", help="of this script, to be told beside the weights")
    options = parser.parse_args()
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    device, out = torch.device(options.device), options.out
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        trainer = Trainer(settings, device, options.compile)
        out.mkdir(parents=True, exist_ok=True)
        kept = out / "state.pt"
        if kept.exists():
            trainer.load(torch.load(kept, map_location=device, weights_only=True))
            print(f"goes on from step {trainer.step}")
    except ValueError as error:
        parser.error(str(error))
    try:
        trainer.run(options.pause_after)
    except KeyboardInterrupt:
        save_state(trainer, kept)
        raise
    save_state(trainer, kept)
    (out / "loss.json").write_text(json.dumps(trainer.log, indent=1) + "\n")
    if trainer.log:
        pictures.save_curve(out / "loss.png", trainer.log)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    trainer.save_model(out / "weights", {"commit": options.commit, "device": name})
    report = trainer.sheet(out)
    print(f"step {trainer.step}, {trainer.seconds:.0f} s, {100 * trainer.progress:.0f}% done; PSNR per chunk:")
    for row in report["psnr_per_chunk"]:
        print("  " + " ".join(f"{value:.1f}" for value in row))


if __name__ == "__main__":
    main()
