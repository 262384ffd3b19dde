"""Judge trained weights of the tiny world: from examples/, `python -m tiny_world.evaluate FOLDER`.

Unseen walks by the library's own inference beside the true rendering, PSNR per chunk, in the weights' precision, int8
and fp8; the same without the sink, and without the context update; a turn to the left and back; a walk straight ahead.
It leaves report.json, sheet.png and film.mp4 (where PyAV is installed) in --out, and judges nothing: tests do. Rows of
the pictures are the truth, the weights' precision and int8, for each walk; the film shows the first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig
from lingbot_kernels.benchmarks.replaced_layers import Fp8Linear, layer_names, replaced
from lingbot_kernels.models.camera import parse_actions
from lingbot_kernels.quantization import Int8Recipe
from tiny_world import latents, pictures
from tiny_world.journeys import Journeys, Noise, roll_out
from tiny_world.scene import Scene
from tiny_world.train import SHEET_SEED
from tiny_world.walks import Rays, Walks, random_walks, walk

EVALUATION_SEED = SHEET_SEED - 1
TURNS = 11  # 88 degrees: more than the picture shows at once


@dataclass(frozen=True)
class TrainedWorld:
    """A checkpoint folder with the scene that it was trained in.

    Attributes:
        folder: what `Trainer.save_model` wrote.
        scene: drawn by its seed, on the CPU.
        size: (rows, columns) of its latents.
        device, dtype: what models are loaded on and in.
    """

    folder: Path
    scene: Scene
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu", dtype: str = "bfloat16") -> TrainedWorld:
        """Of a folder with training.json; ValueError where there is none."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / "training.json").read_text())["settings"]
            size = tuple(settings[side] // latents.SIDE for side in ("height", "width"))
            scene = Scene.make(settings["seed"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"folder: got {folder}, must hold the training.json of a trained world: {error}"
            ) from error
        return cls(folder, scene, size, torch.device(device), getattr(torch, dtype))

    @property
    def config(self) -> LingBotConfig:
        return LingBotConfig.from_json(self.folder / "config.json")

    def model(self, precision: str | None = None, **fields: Any) -> CausalLingBotTransformer:
        """The network, with `fields` of its configuration replaced: such as sink_frames=0."""
        cfg = dataclasses.replace(self.config, **fields)
        return CausalLingBotTransformer.from_pretrained(
            self.folder, dtype=self.dtype, device=self.device, cfg=cfg, precision=precision
        ).eval()

    def journeys(self, walks: Walks) -> Journeys:
        """What walks show, on the device."""
        made = Journeys.make(self.scene, walks, Rays(*self.size))
        return Journeys(*(getattr(made, field.name).to(self.device) for field in dataclasses.fields(made)))

    def unseen(self, count: int, chunks: int, seed: int = EVALUATION_SEED) -> Journeys:
        """Walks that training has not drawn, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return self.journeys(random_walks(self.scene, count, chunks * self.config.frames_per_chunk, generator))

    def by_keys(self, actions: str | Sequence[str], position: tuple[float, float], heading: int) -> Journeys:
        """The walk of keys held, as `parse_actions` reads them, from (x, z) and a heading in turns to the right of
        +z.

        Raises:
            ValueError: nobody may stand there.
        """
        place = torch.tensor([position], dtype=torch.float64)
        if not self.scene.free(place[:, 0], place[:, 1]).all():
            raise ValueError(f"position: got {position}, must be clear of walls and pillars")
        pairs = (("d", "a"), ("w", "s"), ("l", "j"), ("i", "k"))
        keys = [[(more in held) - (less in held) for more, less in pairs] for held in parse_actions(actions)]
        return self.journeys(walk(self.scene, torch.tensor([keys]), place, torch.tensor([heading])))

    def start(self) -> tuple[tuple[float, float], int]:
        """A place and a heading with four units of free ground ahead."""
        for heading in range(0, 45, 5):
            for x, z in ((0.0, 0.0), (0.0, -3.0), (0.0, 3.0), (-3.0, 0.0), (3.0, 0.0), (-3.0, -3.0), (3.0, 3.0)):
                angle = math.radians(8 * heading)
                along = torch.linspace(0, 4, 41, dtype=torch.float64)
                if self.scene.free(x + along * math.sin(angle), z + along * math.cos(angle)).all():
                    return (x, z), heading
        raise ValueError(
            f"scene: got {len(self.scene.pillars)} pillars in the way everywhere, must leave four units free"
        )


def roll(
    world: TrainedWorld, model: CausalLingBotTransformer, journeys: Journeys, seed: int = 0, *, context: bool = True
) -> Tensor:
    """Pixels [B, 4, F, H, W] on the CPU; the same noise for whatever model."""
    return roll_out(model, journeys, Noise.draw(journeys.latents, seed), update_context=context).cpu()


def per_chunk(world: TrainedWorld, shown: Tensor, journeys: Journeys) -> list[float]:
    """PSNR of each chunk against the truth, over all walks."""
    return pictures.psnr_per_chunk(shown, journeys.pixels.cpu(), world.config.frames_per_chunk)


def by_precision(world: TrainedWorld, journeys: Journeys) -> dict[str, Tensor]:
    """Pixels in the precision of the weights ("plain"), in int8 and in fp8 (e4m3, a scale a row)."""
    model = world.model()
    names = layer_names(model.config.num_layers, Int8Recipe(), model.config.camera)
    inside: dict[str, AbstractContextManager[Any]] = {
        "plain": contextlib.nullcontext(), "fp8": replaced(model, names, Fp8Linear)
    }  # fmt: skip
    out = {}
    for name, within in inside.items():
        with within:
            out[name] = roll(world, model, journeys)
    out["int8"] = roll(world, world.model("int8"), journeys)
    return out


def there_and_back(world: TrainedWorld, model: CausalLingBotTransformer) -> dict[str, float]:
    """Turn left until nothing of the first view is left, and back. PSNR of the last view, and of the one when turned
    away, to the true first one.
    """
    position, heading = world.start()
    journeys = world.by_keys(["", *["j"] * TURNS, "", *["l"] * TURNS], position, heading)
    shown, first = roll(world, model, journeys)[0, :3].clamp(0, 1), journeys.pixels[0, :3, 0].cpu()
    return {"back": pictures.psnr(shown[:, -1], first), "away": pictures.psnr(shown[:, TURNS], first)}


def ahead(world: TrainedWorld, model: CausalLingBotTransformer, chunks: int = 4) -> dict[str, float]:
    """Hold W: PSNR of the last chunk to the truth of walking, and to what standing would show."""
    position, heading = world.start()
    frames = model.config.frames_per_chunk
    walked = world.by_keys(["w"] * (chunks * frames), position, heading)
    last = roll(world, model, walked)[0, :3, -frames:].clamp(0, 1)
    out = {}
    for name, key in (("walking", "w"), ("standing", "")):
        truth = world.by_keys([key] * (chunks * frames), position, heading).pixels
        out[name] = pictures.psnr(last, truth[0, :3, -frames:].cpu())
    return out


def evaluate(world: TrainedWorld, out: Path, walks: int, chunks: int) -> dict[str, Any]:
    """Everything, with its pictures written into `out`; the report."""
    journeys = world.unseen(walks, chunks)
    shown = by_precision(world, journeys)
    model, forgetful = world.model(), world.model(sink_frames=0)
    shown["without sink"] = roll(world, forgetful, journeys)
    shown["without context update"] = roll(world, model, journeys, context=False)
    report = {
        "training": json.loads((world.folder / "training.json").read_text()),
        "dtype": str(world.dtype).removeprefix("torch."),
        "psnr_per_chunk": {name: per_chunk(world, pixels, journeys) for name, pixels in shown.items()},
        "there_and_back": there_and_back(world, model),
        "there_and_back without sink": there_and_back(world, forgetful),
        "ahead": ahead(world, model),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    frames = world.config.frames_per_chunk
    rows = [journeys.pixels.cpu(), shown["plain"], shown["int8"]]
    pairs = [pictures.to_uint8(row)[i] for i in range(walks) for row in rows]
    pictures.save_sheet(out / "sheet.png", [row[frames - 1 :: frames] for row in pairs])
    if importlib.util.find_spec("av") is not None:
        pictures.save_film(out / "film.mp4", pairs[: len(rows)])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="weights/ of a training")
    parser.add_argument("--out", type=Path, default=Path("out/tiny_world_report"))
    parser.add_argument("--walks", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if options.walks < 1 or options.chunks < 1:
        parser.error(f"--walks, --chunks: got {options.walks} and {options.chunks}, must be 1 or more")
    try:
        world = TrainedWorld.open(options.folder, options.device, options.dtype)
    except ValueError as error:
        parser.error(str(error))
    report = evaluate(world, options.out, options.walks, options.chunks)
    for name, values in report["psnr_per_chunk"].items():
        print(f"{name:28}" + " ".join(f"{value:5.1f}" for value in values) + " dB")
    for name in ("there_and_back", "there_and_back without sink", "ahead"):
        print(f"{name:28}" + ", ".join(f"{key} {value:.1f} dB" for key, value in report[name].items()))


if __name__ == "__main__":
    main()
