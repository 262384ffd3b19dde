"""From command-line options to a model, a prompt and each chunk's inputs; a bad value is reported under its option."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lingbot_kernels.commands._click import blame
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models.camera import CELL, CameraStream, CameraTrajectory, example_trajectory
from lingbot_kernels.models.checkpoint import infer_config
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.models.poses import load_array
from lingbot_kernels.stages.schedule import Schedule

DEFAULT_SIZE = (480, 832)
TINY_SIZE = (128, 224)


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


def make_model(options: SessionOptions, **shape: int) -> CausalLingBotTransformer:
    """The checkpoint's network, or a preset's with random weights drawn from `--seed`, its fields replaced by `shape`.

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
            cfg = LingBotConfig.preset(options.preset or "tiny", **changes, **shape)
        torch.manual_seed(options.seed)
        return CausalLingBotTransformer(cfg, device=device, dtype=dtype).eval()
    try:
        found = infer_config(options.checkpoint)
        with blame("/".join("--" + name.replace("_", "-") for name in changes) or "--checkpoint"):
            cfg = dataclasses.replace(found, **changes)
        return CausalLingBotTransformer.from_pretrained(options.checkpoint, dtype=dtype, device=device, cfg=cfg).eval()
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
            tensors = load_file(path)
            if len(tensors) != 1 and "prompt_embeds" not in tensors:
                raise ValueError(f"{path}: holds {', '.join(tensors) or 'nothing'}; must hold prompt_embeds")
            embeds = tensors.get("prompt_embeds", next(iter(tensors.values())))
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


@dataclass(frozen=True)
class CameraPath:
    """A trajectory and what its translations are divided by (None: their running maximum)."""

    trajectory: CameraTrajectory
    scale: float | None


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
            trajectory = CameraTrajectory.from_actions(options.actions, **lens)
    else:
        trajectory = example_trajectory(num_frames)
    if options.camera_scale in ("clip", "running"):
        return CameraPath(trajectory, trajectory.scale if options.camera_scale == "clip" else None)
    with blame("--camera-scale"):
        scale = float(options.camera_scale)
        CameraStream(CELL, CELL, scale=scale)
    return CameraPath(trajectory, scale)


@dataclass(frozen=True)
class ChunkInputs:
    """noise [1, C, F, H, W], renoise [steps - 1, 1, C, F, H, W], camera [1, 384, F, H, W] or None."""

    noise: Tensor
    renoise: Tensor
    camera: Tensor | None


def chunk_inputs(
    model: CausalLingBotTransformer,
    schedule: Schedule,
    size: tuple[int, int],
    camera: CameraPath | None,
    seed: int,
) -> Iterator[ChunkInputs]:
    """The inputs of chunk after chunk, without end, on the model's device; the same for the same seed and device.

    After the end of its path the camera stands still.
    """
    cfg, device = model.config, model.device
    dtype = torch.promote_types(model.dtype, torch.float32)
    shape = (1, cfg.out_channels, cfg.frames_per_chunk, size[0] // CELL, size[1] // CELL)
    generator = torch.Generator(device).manual_seed(seed)
    stream = None if camera is None else CameraStream(*size, scale=camera.scale, device=device, dtype=dtype)
    start = 0
    while True:
        embedding = None
        if camera is not None and stream is not None:
            path = camera.trajectory
            frames = np.minimum(np.arange(start, start + cfg.frames_per_chunk), len(path) - 1)
            embedding = stream.advance(path.poses[frames], path.intrinsics[frames])
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        steps = len(schedule.times) - 1
        renoise = torch.randn((steps, *shape), generator=generator, device=device, dtype=dtype)
        yield ChunkInputs(noise, renoise, embedding)
        start += cfg.frames_per_chunk
