"""One session over several GPUs, each chunk's tokens shared among them:

    torchrun --nproc_per_node=4 examples/torchrun_rollout.py --preset lingbot-world-14b --height 464 --width 832

Every rank is given the same inputs and returns the same chunk. On CPUs the ranks talk through gloo.
"""

from __future__ import annotations

import argparse
import time

import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState
from lingbot_kernels.parallel import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args()

    with launch.process_group(options.device) as group:
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        torch.manual_seed(0)  # the same weights on every rank
        cfg = LingBotConfig.preset(options.preset)
        model = CausalLingBotTransformer(cfg, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
        if group is not None:
            model.shard_sequence(group)
        stage, state = CausalDenoisingStage(model), RealtimeCausalDiTState()
        generator = torch.Generator(device).manual_seed(1)  # the same noise on every rank
        text = torch.randn(1, cfg.text_len, cfg.text_dim, generator=generator, device=device, dtype=model.dtype)
        begin = time.perf_counter()
        chunks = stage.rollout(
            state, options.chunks, text=text, latent_size=(options.height // 8, options.width // 8), generator=generator
        )
        for index, latents in enumerate(chunks):
            if on_gpu:
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            if launch.is_main():
                rms = latents.double().square().mean().sqrt().item()
                print(f"chunk {index}: {1e3 * (now - begin):.1f} ms, latents' rms {rms:.6f}", flush=True)
            begin = time.perf_counter()
        state.dispose()


if __name__ == "__main__":
    main()
