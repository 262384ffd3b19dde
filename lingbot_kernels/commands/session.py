"""From command-line options to a device, a scene, a backend and a bench's rows; a bad value is reported under its
option."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lingbot_kernels.benchmarks import backends
from lingbot_kernels.benchmarks.environment import Environment
from lingbot_kernels.benchmarks.rows import Row, RowFile, default_path, format_forward
from lingbot_kernels.benchmarks.rows import append_rows as append_to_file
from lingbot_kernels.benchmarks.scene import CameraPath, Scene, allocated
from lingbot_kernels.commands._click import blame
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands._outputs import Outputs
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models.camera import CELL, CameraStream, CameraTrajectory, example_trajectory
from lingbot_kernels.models.checkpoint import infer_config
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.models.poses import MAX_ARRAY_BYTES, load_array
from lingbot_kernels.ops import BackendUnavailable, use_backend
from lingbot_kernels.ops._dispatch import requested_backend
from lingbot_kernels.parallel import launch
from lingbot_kernels.quantization import recipe_of
from lingbot_kernels.stages.schedule import Schedule

DEFAULT_SIZE = (480, 832)
TINY_SIZE = (128, 224)
MAX_PROMPT_ROWS = 100_000  # read before they are refused: more than any text encoder gives


def pick_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with blame("--device", RuntimeError):
        device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} must be auto, cpu, cuda or cuda:N.", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"{name!r}: there are {torch.cuda.device_count()} GPUs.", param_hint="--device")
    return device


def bench_device(name: str) -> torch.device:
    """The same with its index, and made the current one."""
    device = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def rank_device(name: str) -> torch.device:
    """That of a rank, whose GPU `launch.process_group` has made the current one."""
    on_gpu = torch.cuda.is_available() and name != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def start_ranks(gpus: int) -> None:
    """For one GPU, and within a rank, nothing; else run this command on `gpus` ranks and exit with their code."""
    if gpus > 1 and not launch.launched():
        if torch.cuda.device_count() < gpus:
            raise click.BadParameter(f"{gpus}, but torch sees {torch.cuda.device_count()}.", param_hint="--gpus")
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        raise click.exceptions.Exit(subprocess.call([*program, "-m", "lingbot_kernels", *sys.argv[1:]]))


class BenchRun(Outputs):
    """The outputs of a bench that reports rows. What runs it is said first; of several ranks the first one speaks.

    Args:
        path: of `--json`; the bench's default where None.
        head: the line said first, with fields of `Environment` and of `more`.
        line: a row as it is said.
        more: fields of every row.
    """

    def __init__(
        self, bench: str, device: torch.device, path: Path | None,
        head: str = "{gpu} · torch {torch} · commit {commit}", line: Callable[[Row], str] = format_forward, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._first, self._open = launch.is_main(), True
        found = Environment.collect(device)
        with blame("--json"):
            self.file = RowFile(found, bench, path, self.say, line, **more)
        self.say(head.format(**dataclasses.asdict(found), **more))

    def say(self, text: str) -> None:
        if self._first:
            click.echo(text)

    def report(self, row: Row) -> None:
        if self._first:
            self.file.report(row)

    def close(self) -> None:
        """Say where the rows are, and those that could not be written."""
        if self._first and self._open:
            self.file.close()
            if self.file.error is not None:
                self.failed("--json", self.file.path, self.file.error)
        self._open = False

    def finish(self, good: bool = True) -> None:
        self.close()
        if self._first:
            super().finish(good)


def append_rows(
    outputs: Outputs, bench: str, path: Path | None, device: torch.device, rows: Iterable[dict[str, Any]]
) -> None:
    """Append rows, with the environment, to the file of `--rows`, on a GPU by default to the bench's own."""
    environment = Environment.collect(device)
    path = path or (default_path(environment, bench) if device.type == "cuda" else None)
    if path is not None:
        fresh = [{**row, **dataclasses.asdict(environment)} for row in rows]
        with outputs.kept("--rows", path):
            append_to_file(path, fresh)
            click.echo(f"{len(fresh)} rows appended to {path}")


@contextlib.contextmanager
def chosen_backend(option: str | None, model: CausalLingBotTransformer) -> Iterator[None]:
    """Within the block, ops use the backend of `--backend`, else that of the environment.

    One that can't serve a rollout of this network is reported under its option, before anything runs.
    """
    where = "LINGBOT_KERNELS_BACKEND" if option is None else "--backend"
    with blame(where):
        name = requested_backend() if option is None else option
    with use_backend(name):
        with blame(where, BackendUnavailable):
            backends.serving(model.config, model.device.type, model.dtype, 1, model.recipe)
        yield


@dataclass(frozen=True)
class CameraOptions:
    """Where the camera path comes from: a file of poses, keys, or, with neither, a made path; or no camera at all."""

    poses: Path | None = None
    intrinsics: Path | None = None
    actions: str | None = None
    no_camera: bool = False
    camera_scale: str = "clip"

    @property
    def source(self) -> str:
        """One word for reports."""
        return "poses" if self.poses else "actions" if self.actions is not None else "made path"


def make_scene(
    session: SessionOptions,
    chunks: int | Callable[[LingBotConfig], int],
    camera: CameraOptions | None = None,
    prompt_embeds: Path | None = None,
    num_layers: int | None = None,
) -> Scene:
    """Everything for a rollout of `chunks` chunks (or as many as the network's configuration asks for).

    Args:
        num_layers: of a preset's network, in place of its own.

    Raises:
        click.ClickException (exit code 1): the checkpoint can't be read, with everything that is wrong with it.
    """
    model = make_model(session, num_layers)
    weights_bytes = allocated(model.device)
    schedule, size = make_schedule(session), video_size(session, model.config)
    count = chunks if isinstance(chunks, int) else chunks(model.config)
    path = make_camera(camera or CameraOptions(), model.config, count * model.config.frames_per_chunk)
    return Scene(
        model=model,
        preset=None if session.checkpoint else session.preset or "tiny",
        checkpoint=str(session.checkpoint) if session.checkpoint else None,
        schedule=schedule,
        size=size,
        camera=path,
        text=load_prompt(prompt_embeds, model, session.seed),
        prompt="seeded noise" if prompt_embeds is None else str(prompt_embeds),
        seed=session.seed,
        weights_bytes=weights_bytes,
    )


def make_model(options: SessionOptions, num_layers: int | None = None) -> CausalLingBotTransformer:
    """The checkpoint's network, or a preset's (of `num_layers` blocks, where given) with random weights from `--seed`.

    Raises:
        click.ClickException (exit code 1): the checkpoint can't be read, with everything that is wrong with it.
    """
    device = pick_device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    changes = {
        name: value
        for name in ("frames_per_chunk", "window_frames", "sink_frames")
        if (value := getattr(options, name)) is not None
    }
    if options.checkpoint is None:
        with blame("/".join("--" + name.replace("_", "-") for name in changes)):
            cfg = LingBotConfig.preset(options.preset or "tiny", **changes)
        if num_layers is not None:
            cfg = dataclasses.replace(cfg, num_layers=num_layers)
        torch.manual_seed(options.seed)
        model = CausalLingBotTransformer(cfg, device=device, dtype=dtype).eval()
        recipe = recipe_of(options.precision or "bfloat16")
        if recipe is not None:
            with blame("--precision"):
                model.quantize(recipe)
        return model
    try:
        found = infer_config(options.checkpoint)
        with blame("/".join("--" + name.replace("_", "-") for name in changes) or "--checkpoint"):
            cfg = dataclasses.replace(found, **changes)
        return CausalLingBotTransformer.from_pretrained(
            options.checkpoint, dtype=dtype, device=device, cfg=cfg, precision=options.precision
        ).eval()
    except (ValueError, OSError) as error:  # a CheckpointError, or a config.json that isn't such a network's
        raise click.ClickException(str(error)) from error


def make_schedule(options: SessionOptions) -> Schedule:
    with blame("--schedule/--timesteps/--shift"):
        return Schedule.make(options.schedule, options.timesteps, options.shift)


def video_size(options: SessionOptions, cfg: LingBotConfig) -> tuple[int, int]:
    """(height, width) in pixels: a whole number of tokens each way."""
    tiny = options.checkpoint is None and (options.preset or "tiny") == "tiny"
    default = TINY_SIZE if tiny else DEFAULT_SIZE
    size = (options.height or default[0], options.width or default[1])
    for name, pixels, patch in zip(("--height", "--width"), size, cfg.patch_size[1:], strict=True):
        if pixels % (CELL * patch):
            raise click.BadParameter(f"{pixels} must be a multiple of {CELL * patch} pixels.", param_hint=name)
    return size


def load_prompt(path: Path | None, model: CausalLingBotTransformer, seed: int) -> Tensor:
    """Text embeddings [1, L, text_dim] on the model's device: of the file, or seeded noise where there is none.

    A .safetensors file holds one tensor, or one named prompt_embeds; a .npy file holds an array; [L, text_dim] or
    [1, L, text_dim].
    """
    cfg = model.config
    if path is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, cfg.text_len, cfg.text_dim, generator=generator).to(model.device, model.dtype)
    with blame("--prompt-embeds", SafetensorError):
        if path.suffix == ".safetensors":
            embeds = _read_prompt(path, MAX_PROMPT_ROWS * cfg.text_dim)
        elif path.suffix == ".npy":
            embeds = torch.from_numpy(load_array(path))
        else:
            raise ValueError(f"{path}: must end in .safetensors or .npy")
        embeds = embeds[None] if embeds.dim() == 2 else embeds
        fits = embeds.dim() == 3 and embeds.shape[0] == 1 and 0 < embeds.shape[1] <= cfg.text_len
        if not fits or embeds.shape[2] != cfg.text_dim or not embeds.is_floating_point():
            raise ValueError(
                f"{path}: holds {embeds.dtype} {list(embeds.shape)}, "
                f"must be floats [1, L, {cfg.text_dim}] with L from 1 to {cfg.text_len}"
            )
    return embeds.to(model.device, model.dtype)


def _read_prompt(path: Path, most: int) -> Tensor:
    """The one tensor of a safetensors file, or the one named prompt_embeds, of at most `most` values: from the header
    it is known what would be read.
    """
    if (size := path.stat().st_size) > MAX_ARRAY_BYTES:
        raise ValueError(f"{path}: has {size} bytes, must have at most {MAX_ARRAY_BYTES}")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1 and "prompt_embeds" not in names:
            shown = ", ".join(names[:9]) + (f" and {len(names) - 9} more" if len(names) > 9 else "")
            raise ValueError(f"{path}: holds {shown or 'nothing'}; must hold prompt_embeds")
        name = names[0] if len(names) == 1 else "prompt_embeds"
        shape = file.get_slice(name).get_shape()
        if math.prod(shape) > most:
            raise ValueError(f"{path}: holds {shape}, must hold at most {most} values")
        found: Tensor = file.get_tensor(name)
    return found


def make_camera(options: CameraOptions, cfg: LingBotConfig, num_frames: int) -> CameraPath | None:
    """The path for `num_frames` latent frames, or None without a camera."""
    given = [name for name in ("poses", "intrinsics", "actions") if getattr(options, name) is not None]
    if options.no_camera or not cfg.camera:
        if given:
            reason = "--no-camera was given" if options.no_camera else "the network has no camera layers"
            raise click.UsageError(f"--{given[0]} can't be used: {reason}.")
        return None
    if options.poses is not None and options.actions is not None:
        raise click.UsageError("--poses and --actions exclude each other: both say where the camera goes.")
    if given == ["intrinsics"]:
        raise click.UsageError("--intrinsics needs --poses or --actions.")
    if options.poses is not None:
        with blame("--poses/--intrinsics" if options.intrinsics else "--poses"):
            trajectory = CameraTrajectory.from_files(options.poses, options.intrinsics)
    elif options.actions is not None:
        lens = {}
        if options.intrinsics is not None:
            with blame("--intrinsics"):
                lens["intrinsics"] = np.atleast_2d(load_array(options.intrinsics))[0]
        with blame("--actions/--intrinsics" if lens else "--actions"):
            trajectory = CameraTrajectory.from_actions(options.actions, limit=num_frames, **lens)
    else:
        trajectory = example_trajectory(num_frames)
    if options.camera_scale in ("clip", "running"):
        return CameraPath(trajectory, trajectory.scale if options.camera_scale == "clip" else None, options.source)
    with blame("--camera-scale"):
        scale = float(options.camera_scale)
        CameraStream(CELL, CELL, scale=scale)
    return CameraPath(trajectory, scale, options.source)
