"""Compiles the video decoder's passes for every architecture that they serve, as launched at the decoder's widths.

A program of its own since the test process may interpret kernels:
PYTHONPATH=.:bench python tests/triton/aot_frames.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator

import torch
from triton_aot import recorded_launches

from lingbot_kernels.triton import frame_norm_silu, frame_pixels

ARCHITECTURES = (80, 90, 100, 120)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HEIGHT, WIDTH = 58, 104


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, launch): between two convolutions, with the residual stream, after an upsampling; the last step."""
    for channels, dtype, stream_dtype in (
        (96, F16, F32),
        (192, F16, F32),
        (384, F16, F32),
        (96, F16, F16),
        (96, BF16, F32),
    ):
        y = torch.empty(HEIGHT, WIDTH, channels, dtype=dtype)
        folded = torch.empty(HEIGHT // 2 + 1, WIDTH // 2 + 1, 4 * channels, dtype=dtype)
        slot = torch.empty(HEIGHT, WIDTH, 3, channels, dtype=dtype)[:, :, 1]
        stream = torch.empty(HEIGHT, WIDTH, channels, dtype=stream_dtype)
        bias, gamma = torch.empty(2, channels).unbind(0)
        arguments = {
            "hidden": (y, bias, None, None, gamma, slot, False, True, False),
            "residual": (y, bias, None, stream, gamma, slot, True, True, False),
            "upsampled": (folded, bias, None, stream, gamma, slot, False, True, True),
        }
        for name, given in arguments.items():
            yield (
                f"{name}-{channels}-{dtype}-{stream_dtype}",
                lambda given=given: frame_norm_silu.frame_norm_silu(*given),
            )
    taps, partial = torch.empty(HEIGHT, WIDTH, 16, dtype=F16), torch.empty(2, HEIGHT, WIDTH, 3)
    frame = torch.empty(HEIGHT, WIDTH, 3, dtype=torch.uint8)
    yield "pixels", lambda: frame_pixels.frame_pixels(taps, torch.empty(3), partial, frame)


def main() -> None:
    """Compile every case; one JSON object each."""
    for name, launch in cases():
        with recorded_launches() as launches:
            launch()
        (recorded,) = launches
        for arch in ARCHITECTURES:
            row = dataclasses.asdict(recorded.compile(arch))
            del row["sass"]
            print(json.dumps({"case": f"{name}-sm{arch}", "arch": arch, **row}), flush=True)


if __name__ == "__main__":
    main()
