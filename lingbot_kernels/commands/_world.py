"""From options to a pipeline: a checkpoint's, or a preset's with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lingbot_kernels.pipeline import LingBotWorldPipeline


def read_pipeline(options: dict[str, Any]) -> LingBotWorldPipeline:
    """The pipeline of `--checkpoint`, with `--assets`, `--device`, `--text-device`, `--dtype` and `--precision`.

    Raises:
        click.ClickException (exit code 1): parts are missing or can't be read, with everything that is wrong.
    """
    from lingbot_kernels.commands.session import pick_device
    from lingbot_kernels.pipeline import LingBotWorldPipeline

    device = pick_device(options["device"] or "auto")
    text_device = pick_device(options["text_device"]) if options["text_device"] else None
    try:
        return LingBotWorldPipeline.from_pretrained(
            options["checkpoint"],
            assets=options["assets"],
            device=device,
            text_device=text_device,
            dtype=options["dtype"],
            precision=options["precision"],
        )
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def random_pipeline(options: dict[str, Any], preset: str) -> LingBotWorldPipeline:
    """A preset's pipeline with random weights, on `--device`, in `--dtype` and `--precision`.

    Raises:
        click.ClickException (exit code 1): the extra isn't installed.
    """
    from lingbot_kernels.commands._click import blame
    from lingbot_kernels.commands.session import pick_device
    from lingbot_kernels.pipeline import LingBotWorldPipeline
    from lingbot_kernels.quantization import recipe_of

    device = pick_device(options["device"] or "auto")
    try:
        pipeline = LingBotWorldPipeline.random(preset, device=device, dtype=options["dtype"])
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    recipe = recipe_of(options["precision"] or "bfloat16")
    if recipe is not None:
        with blame("--precision"):
            pipeline.transformer.quantize(recipe)
    return pipeline
