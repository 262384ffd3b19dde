"""The command line `lingbot-kernels`: a table of subcommands, each imported when it is run.
`--help` and `cases` load neither torch nor numpy."""

from __future__ import annotations

import click

from lingbot_kernels._version import __version__
from lingbot_kernels.commands._click import LazyGroup

# name -> (module whose `command` it is, its line in the list)
COMMANDS = {
    "generate": ("lingbot_kernels.commands.generate", "A prompt, an image and keys to an .mp4, chunk after chunk."),
    "play": ("lingbot_kernels.commands.play", "A world in the browser: hold keys, see it move."),
    "rollout": ("lingbot_kernels.commands.rollout", "Denoise chunk after chunk along a camera path, with timings."),
    "doctor": ("lingbot_kernels.commands.doctor", "What this machine has, which backend serves each op, and why."),
    "quality": (
        "lingbot_kernels.commands.quality",
        "What int8 costs a network, chunk by chunk, and whether to use it.",
    ),
    "profile": ("lingbot_kernels.commands.profile", "Where the time of a steady chunk, or of one op, goes."),
    "cases": ("lingbot_kernels.commands.cases", "List the CI cases of a diffusion test suite."),
}
BENCHES = {
    "kernels": ("lingbot_kernels.commands.bench_kernels", "Every op and backend against a copy of the same bytes."),
    "model": ("lingbot_kernels.commands.bench_model", "A full-window rollout against its bare products and attention."),
    "diffusers": ("lingbot_kernels.commands.bench_diffusers", "diffusers' Wan transformer, plain and accelerated."),
    "end-to-end": ("lingbot_kernels.commands.bench_end_to_end", "From a key press to a frame; the decoder alone."),
    "caching": ("lingbot_kernels.commands.bench_caching", "What each cache of a session is worth."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lingbot-kernels")
def main() -> None:
    """The realtime causal video DiT LingBot-World: run it, look at the machine, measure it.

    \b
    Examples:
      lingbot-kernels rollout --preset tiny --chunks 8
      lingbot-kernels doctor
      lingbot-kernels bench caching
    """


@main.group(cls=LazyGroup, table=BENCHES, short_help="Measure what the library is worth, and check it first.")
def bench() -> None:
    """Measurements. Each checks its results first: a wrong result has no speed, and exits with 1."""
