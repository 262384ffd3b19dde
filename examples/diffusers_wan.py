"""diffusers' Wan transformer, random and small: as it is, accelerated, and as a causal rollout over a K/V ring.

With a pipeline it is the same call: `accelerate(pipeline.transformer)`.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import WanTransformer3DModel

from lingbot_kernels import RealtimeCausalDiTState
from lingbot_kernels.integrations.diffusers import KVWindow, accelerate, restore


def timed(call, device: torch.device, repeats: int) -> tuple[torch.Tensor, float]:
    """The result of a call, and its fastest time in milliseconds."""
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        out = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return out, 1e3 * best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(16, 28), help="height and width of the latents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=options.heads, attention_head_dim=128, ffn_dim=1024, num_layers=options.layers, text_dim=64
    )
    model = model.to(device, dtype).eval()
    latents = torch.randn(1, 16, 3, *options.size, device=device, dtype=dtype)
    text = torch.randn(1, 32, 64, device=device, dtype=dtype)
    timestep = torch.tensor([937], device=device)

    plain, plain_ms = timed(lambda: model(latents, timestep, text).sample, device, options.repeats)
    accelerate(model, kv_cache=KVWindow(window_frames=18, sink_frames=3))
    fast, fast_ms = timed(lambda: model(latents, timestep, text).sample, device, options.repeats)
    difference = ((fast - plain).double().norm() / plain.double().norm()).item()
    print(f"plain {plain_ms:.1f} ms, accelerated {fast_ms:.1f} ms, relative difference {difference:.1e}")

    state, zero = RealtimeCausalDiTState(), torch.zeros(1, dtype=torch.long, device=device)
    for chunk in range(7):  # one denoise step each, then the context update: the window is full from chunk 5 on
        start = 3 * chunk
        flow = model(latents, timestep, text, state=state, start_frame=start).sample
        model(latents - flow, zero, text, state=state, start_frame=start, update_cache_only=True)
    stats = state.stats()
    print(f"causal: frame {stats['next_frame']}, {stats['visible_tokens']} of {stats['capacity_tokens']} tokens seen")
    state.dispose()

    restore(model)
    again = model(latents, timestep, text).sample
    print(f"restored: the plain bits {'again' if torch.equal(again, plain) else 'are LOST'}")


if __name__ == "__main__":
    main()
