"""`lingbot-kernels play`: options; `lingbot_kernels.play` serves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingbot_kernels.commands._click import GroupedCommand, blame, option_group
from lingbot_kernels.commands._options import DTYPES, FILE, FOLDER, PRECISIONS
from lingbot_kernels.commands._types import MAX_PIXELS, MAX_SEED, Count, Device, Host, Text
from lingbot_kernels.commands._world import random_pipeline, read_pipeline
from lingbot_kernels.config import PRESETS

if TYPE_CHECKING:
    from lingbot_kernels.pipeline import LingBotWorldPipeline
    from lingbot_kernels.play.server import PlayServer

_world = option_group("World")
_run = option_group("Where and how")
_serve = option_group("Server")
TINY_SIZE = (96, 160)  # pixels that a laptop makes fast enough to play


@click.command("play", cls=GroupedCommand)
@_world("--preset", type=click.Choice(list(PRESETS)), help="Random weights of this shape. [default: tiny]")
@_world("--checkpoint", type=FOLDER, help="Folder of a world model, official or diffusers layout.")
@_world("--assets", type=FOLDER, help="Another folder, for a text encoder, tokenizer or VAE that --checkpoint lacks.")
@_world("--prompt", type=Text(), default="a world to walk through", show_default=True, help="What the world is.")
@_world("--image", type=FILE, help="Its first frame. [default: none]")
@_world("--seed", type=Count(0, MAX_SEED, "integer"), help="Of the noise. [default: another one for each session]")
@_run("--height", type=Count(most=MAX_PIXELS), help="Of the video. [default: about 480x832 in the image's aspect]")
@_run("--width", type=Count(most=MAX_PIXELS), help="Of the video. [with tiny: 96x160]")
@_run("--device", type=Device(), help="cuda, cuda:N or cpu. [default: the first GPU, else the CPU]")
@_run("--dtype", type=click.Choice(DTYPES[:-1]), help="Of the transformer.")
@_run("--precision", type=click.Choice(PRECISIONS), help="Of the transformer's products. [default: the checkpoint's]")
@_run("--text-device", type=Device(), help="Of the text encoder. [default: --device]")
@_run("--fps", type=Count(most=1000), default=16, show_default=True, help="Frames a second, at most.")
@_serve(
    "--host", type=Host(), default="127.0.0.1", show_default=True, help="Address; others than loopback ask a token."
)
@_serve("--port", type=Count(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@_serve("--max-sessions", type=Count(most=1000), default=1, show_default=True, help="Viewers at the same time.")
@_serve("--picture", type=click.Choice(("jpeg", "webp")), default="jpeg", show_default=True, help="Form of the frames.")
@_serve("--quality", type=Count(most=100), default=85, show_default=True, help="Of the frames' pictures.")
def command(
    preset: str | None,
    prompt: str,
    image: Path | None,
    seed: int | None,
    height: int | None,
    width: int | None,
    **options: Any,
) -> None:
    """Walk through a world in the browser: hold w a s d to move, i j k l to look around.

    \b
    Examples:
      lingbot-kernels play --preset tiny
      lingbot-kernels play --checkpoint LingBot-World --image harbour.png --prompt 'a harbour at dawn'
      lingbot-kernels play --checkpoint LingBot-World --precision int8_qk --host 0.0.0.0 --max-sessions 2

    One session a viewer, in turns on one device. Bound elsewhere than to a loopback address, the server asks for a
    token, which is in the address that it prints. Ctrl-C ends it.
    """
    if preset and options["checkpoint"]:
        raise click.UsageError("--preset and --checkpoint exclude each other: a checkpoint has its own shape.")
    try:
        from lingbot_kernels.play.server import PlayServer, Settings
    except ImportError as error:
        raise click.ClickException(f"play needs an extra ({error}): pip install 'lingbot-kernels[play]'") from error
    if options["checkpoint"] is None:
        preset = preset or "tiny"
        pipeline = random_pipeline(options, preset)
        if preset == "tiny" and image is None and height is None and width is None:
            height, width = TINY_SIZE
    else:
        pipeline = read_pipeline(options)
    begin = partial(pipeline.session, prompt, image, seed=seed, height=height, width=width)
    with blame("--prompt/--image/--height/--width"):
        trial = begin(encode_ahead=False)
    with trial:
        trial.step()  # what can't be done or held in memory is told now, and not to the first viewer
    settings = Settings(
        host=options["host"], port=options["port"], max_sessions=options["max_sessions"], fps=options["fps"],
        picture=options["picture"], quality=options["quality"],
    )  # fmt: skip
    frames = 4 * pipeline.transformer.config.frames_per_chunk
    server = PlayServer(begin, pipeline.device, frames, settings, _facts(pipeline, preset, options["checkpoint"]))
    asyncio.run(_serve_until_interrupted(server))


def _facts(pipeline: LingBotWorldPipeline, preset: str | None, checkpoint: Path | None) -> dict[str, Any]:
    """What the page says of the world."""
    import torch

    from lingbot_kernels.benchmarks.environment import cpu_name

    on_gpu = pipeline.device.type == "cuda"
    name = str(preset) if checkpoint is None else checkpoint.resolve().name
    return {
        "name": f"{name}, {pipeline.transformer.precision}",
        "random": checkpoint is None,
        "device": torch.cuda.get_device_name(pipeline.device) if on_gpu else cpu_name(),
    }


async def _serve_until_interrupted(server: PlayServer) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for each in signals:
        loop.add_signal_handler(each, ended.set)
    async with contextlib.AsyncExitStack() as stack:
        with blame("--host/--port"):
            await stack.enter_async_context(server)
        click.echo(f"{server.url}  (Ctrl-C ends it)")
        await ended.wait()
        for each in signals:
            loop.remove_signal_handler(each)  # the next one doesn't wait
        click.echo("ending")
