"""What `bench/nsys.sh` profiles: one steady chunk, random weights, between cudaProfilerStart and cudaProfilerStop."""

from __future__ import annotations

import argparse

import torch

from lingbot_kernels import (
    CausalDenoisingStage,
    CausalLingBotTransformer,
    LingBotConfig,
    RealtimeCausalDiTState,
    nvtx,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="lingbot-world-1.3b")
    parser.add_argument("--layers", type=int, help="fewer layers: a block's profile needs no more than two")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--no-camera", action="store_true")
    options = parser.parse_args()

    changes = {} if options.layers is None else {"num_layers": options.layers}
    cfg = LingBotConfig.preset(options.preset, **changes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = CausalLingBotTransformer(cfg, dtype=torch.bfloat16).eval()
        text = torch.randn(1, cfg.text_len, cfg.text_dim, dtype=torch.bfloat16)
    model.cuda_graphs = False  # ranges inside a captured graph do not replay
    stage, state = CausalDenoisingStage(model), RealtimeCausalDiTState()
    size = (options.height // 8, options.width // 8)
    noise = torch.randn(1, cfg.out_channels, cfg.frames_per_chunk, *size, device="cuda")

    def chunk() -> None:
        camera = None
        if cfg.camera and not options.no_camera:
            camera = torch.randn(1, cfg.camera_channels, cfg.frames_per_chunk, *size, device="cuda")
        stage.denoise_chunk(state, noise, text=text, camera=camera)

    nvtx.enable(False)
    for _ in range(cfg.window_frames // cfg.frames_per_chunk + 1):  # until the window is full
        chunk()
    torch.cuda.synchronize()
    nvtx.enable()
    torch.cuda.profiler.start()
    chunk()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
