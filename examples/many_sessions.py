"""Several realtime sessions on one model: each has its own state, prompt and camera, and they take turns.

What a session keeps is in its state alone, so that the chunks of one are the same whether others run beside it or not.
"""

from __future__ import annotations

import argparse
import time

import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.models.camera import ActionStream, CameraStream

PATHS = ("wwwdd...", "ssaa", "jjjjll", "wlwlwl")  # one key per chunk, over and over


class Session:
    """One viewer: a prompt, a camera, and everything the model must remember of them."""

    def __init__(self, index: int, model: CausalLingBotTransformer, size: tuple[int, int]) -> None:
        cfg, self.device = model.config, model.device
        self.generator = torch.Generator(self.device).manual_seed(index)
        self.state = RealtimeCausalDiTState()
        self.walker, self.rays = ActionStream(), CameraStream(*size, scale=0.2, device=self.device)
        self.keys = PATHS[index % len(PATHS)]
        self.text = torch.randn(
            1, cfg.text_len, cfg.text_dim, generator=self.generator, device=self.device, dtype=model.dtype
        )
        self.shape = (1, cfg.out_channels, cfg.frames_per_chunk, size[0] // 8, size[1] // 8)
        self.chunk = 0
        self.milliseconds: list[float] = []

    def advance(self, stage: CausalDenoisingStage) -> torch.Tensor:
        """The next chunk's latents, timed."""
        begin = time.perf_counter()
        key = self.keys[self.chunk % len(self.keys)]
        camera = self.rays.advance(self.walker.advance(key * self.shape[2]))
        noise = torch.randn(self.shape, generator=self.generator, device=self.device)
        latents = stage.denoise_chunk(self.state, noise, text=self.text, camera=camera, generator=self.generator)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.milliseconds.append(1e3 * (time.perf_counter() - begin))
        self.chunk += 1
        return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="run each session alone, too, and compare bit for bit")
    options = parser.parse_args()

    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    model = CausalLingBotTransformer(LingBotConfig.preset(options.preset), dtype=dtype, device=options.device).eval()
    stage, size = CausalDenoisingStage(model), (options.height, options.width)
    sessions = [Session(index, model, size) for index in range(options.sessions)]
    last = []
    for _ in range(options.chunks):
        last = [session.advance(stage) for session in sessions]
    for index, session in enumerate(sessions):
        times, stats = sorted(session.milliseconds), session.state.stats()
        print(
            f"session {index}: {session.chunk} chunks, median {times[len(times) // 2]:.1f} ms each, frame "
            f"{stats['next_frame']}, {session.state.nbytes() / 1e6:.1f} MB, prompt projected {stats['text']['misses']}x"
        )
    if options.check:
        for index, together in enumerate(last):
            alone = Session(index, model, size)
            for _ in range(options.chunks):
                latents = alone.advance(stage)
            if not torch.equal(latents, together):
                raise SystemExit(f"session {index}: other bits than alone")
        print("each session has the bits that it has alone")


if __name__ == "__main__":
    main()
