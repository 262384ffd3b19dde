"""Walk through a generated world from the terminal: w a s d move, j l turn, i k look, q leaves.

The key held last steers the next chunk; without a key the camera stands still. Latency and what the session holds are
shown live. `--script wwd.q` plays keys, one per chunk, instead of reading them. Without --checkpoint the weights are
random: the times are real, the latents mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator

import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.models.camera import ActionStream, CameraStream

KEYS = "wasdijkl"


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[], str]]:
    """A function that says, without waiting, which key was pressed last since it was last asked; "." for none."""
    import termios
    import tty

    stream = sys.stdin.fileno()
    saved = termios.tcgetattr(stream)
    tty.setcbreak(stream)

    def latest() -> str:
        key = "."
        while select.select([sys.stdin], [], [], 0)[0]:
            typed = sys.stdin.read(1)
            if typed in (*KEYS, "q"):
                key = typed
            if key == "q" or not typed:
                return "q"
        return key

    try:
        yield latest
    finally:
        termios.tcsetattr(stream, termios.TCSADRAIN, saved)


@contextlib.contextmanager
def script(keys: str) -> Iterator[Callable[[], str]]:
    """The keys of a string, one per chunk, then "q"."""
    rest = iter(keys)
    yield lambda: next(rest, "q")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status(key: str, chunk: int, shown_ms: float, total_ms: float, video_frames: int, state: dict) -> str:
    """One line: the key, latency, pace, window and caches."""
    caches = sum(part["bytes"] for part in state.values() if isinstance(part, dict) and "bytes" in part)
    hits = sum(state[name]["hits"] for name in ("rope", "time_embeddings", "camera_modulation", "text"))
    return (
        f"chunk {chunk:4d}  key {key}  shown after {shown_ms:7.1f} ms, context {total_ms - shown_ms:6.1f} ms, "
        f"{1e3 * video_frames / total_ms:5.1f} fps  "
        f"window {state['visible_tokens']}/{state['capacity_tokens']} tokens  caches {caches / 1e6:.1f} MB, {hits} hits"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder of safetensors shards")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", type=float, default=0.2, help="what a latent frame's translations are divided by")
    parser.add_argument("--script", help=f"keys of {KEYS} or ., one per chunk, instead of the keyboard")
    options = parser.parse_args()
    if options.script is None and not sys.stdin.isatty():
        parser.error("standard input is no terminal: give --script")
    if options.script is not None and set(options.script) - {*KEYS, ".", "q"}:
        parser.error(f"--script: got {options.script!r}, must hold {KEYS}, . or q alone")

    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.checkpoint:
        model = CausalLingBotTransformer.from_pretrained(options.checkpoint, dtype=dtype, device=device).eval()
    else:
        torch.manual_seed(0)
        model = CausalLingBotTransformer(LingBotConfig.preset(options.preset), dtype=dtype, device=device).eval()
    cfg = model.config
    stage, state = CausalDenoisingStage(model), RealtimeCausalDiTState()
    walker, rays = ActionStream(), CameraStream(options.height, options.width, scale=options.step, device=device)
    text = torch.randn(1, cfg.text_len, cfg.text_dim, device=device, dtype=dtype)
    shape = (1, cfg.out_channels, cfg.frames_per_chunk, options.height // 8, options.width // 8)
    live = sys.stdout.isatty()

    with keyboard() if options.script is None else script(options.script) as pressed:
        chunk = 0
        while (key := pressed()) != "q":
            begin = time.perf_counter()
            camera = rays.advance(walker.advance(key * cfg.frames_per_chunk))
            noise = torch.randn(shape, device=device)
            latents = stage.denoise_chunk(state, noise, text=text, camera=camera, update_context=False)
            synchronize(device)
            shown = time.perf_counter()  # a decoder would show the chunk's frames now, before the context update
            stage.update_context(state, latents, text=text, camera=camera)
            synchronize(device)
            end = time.perf_counter()
            line = status(
                key, chunk, 1e3 * (shown - begin), 1e3 * (end - begin), 4 * cfg.frames_per_chunk, state.stats()
            )
            print(f"\r\033[K{line}" if live else line, end="" if live else "\n", flush=True)
            chunk += 1
    print(f"{chr(10) if live else ''}{chunk} chunks, {4 * cfg.frames_per_chunk * chunk} video frames")
    state.dispose()


if __name__ == "__main__":
    main()
