"""Checks of the video decoder's passes against the reference.

Not collected by itself: test_kernels.py runs it under the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import DEVICE, INTERPRETED, poisoned, randn

from lingbot_kernels import reference
from lingbot_kernels.triton import frame_norm_silu, frame_pixels

# Triton's interpreter computes with numpy, which has no bfloat16 and rounds float16 at every step.
DTYPES = (torch.float32,) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
HEIGHT, WIDTH = 6, 10
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (24, 96))
@pytest.mark.parametrize("parities", (False, True))
def test_frame_norm_silu(dtype: torch.dtype, channels: int, parities: bool) -> None:
    # Every combination of what may be left out, on views as the decoder slices them: columns cut, a slot of a ring.
    for residual, stream, add, gamma, act, silu in itertools.product((False, True), repeat=6):
        if (add and not stream) or not (stream or act):
            continue
        if parities:
            y = randn(HEIGHT // 2 + 1, WIDTH // 2 + 3, 4 * channels, dtype=dtype)[:, 1 : WIDTH // 2 + 2]
        else:
            y = randn(HEIGHT, WIDTH + 3, channels, dtype=dtype)[:, 2 : WIDTH + 2]
        given = (
            y,
            randn(channels, seed=1),
            randn(HEIGHT, WIDTH, channels, dtype=dtype, seed=2) if residual else None,
        )
        streams = [randn(HEIGHT, WIDTH + 1, channels, seed=3)[:, :WIDTH] if stream else None for _ in range(2)]
        scale = 1 + 0.2 * randn(channels, seed=4) if gamma else None
        rings = [poisoned(HEIGHT, WIDTH, 3, channels, dtype=dtype) for _ in range(2)]
        slots = [ring[:, :, 1] if act else None for ring in rings]
        reference.frame_norm_silu(*given, streams[0], scale, slots[0], add, silu, parities)
        assert frame_norm_silu.why_not(y, given[1]) is None
        config = frame_norm_silu.FrameConfig(32 if channels == 24 else 128, 8, 4)
        frame_norm_silu.frame_norm_silu(*given, streams[1], scale, slots[1], add, silu, parities, config=config)
        for want, got in ((streams[0], streams[1]), (slots[0], slots[1])):
            if want is not None and got is not None:
                close(got, want)
        if act:
            assert rings[1][:, :, 0].isnan().all() and rings[1][:, :, 2].isnan().all()
        else:
            assert rings[1].isnan().all()


def test_silu_at_both_ends() -> None:
    y = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 3e4], device=DEVICE).view(1, 1, 8)
    act = poisoned(1, 1, 8, dtype=torch.float32)
    zero = torch.zeros(8, device=DEVICE)
    frame_norm_silu.frame_norm_silu(y, zero, None, None, None, act, False, True, False)
    torch.testing.assert_close(act, torch.nn.functional.silu(y), rtol=2e-6, atol=1e-30)


def test_a_pixel_of_zeros_stays_zero() -> None:
    y, act = torch.zeros(1, 2, 16, device=DEVICE), poisoned(1, 2, 16, dtype=torch.float32)
    one = torch.ones(16, device=DEVICE)
    frame_norm_silu.frame_norm_silu(y, 0 * one, None, None, one, act, False, True, False)
    assert (act == 0).all()


@pytest.mark.parametrize("pixels", (torch.uint8, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frame_pixels(dtype: torch.dtype, pixels: torch.dtype) -> None:
    taps = randn(HEIGHT, WIDTH + 4, 16, dtype=dtype)[:, 1 : WIDTH + 1]
    bias = randn(3, seed=1)
    partials = [randn(2, HEIGHT, WIDTH, 3, seed=2) for _ in range(2)]
    frames = [torch.zeros(HEIGHT, WIDTH, 3, dtype=pixels, device=DEVICE) for _ in range(2)]
    reference.frame_pixels(taps, bias, partials[0], frames[0])
    assert frame_pixels.why_not(partials[1]) is None
    frame_pixels.frame_pixels(taps, bias, partials[1], frames[1])
    assert torch.equal(partials[0], partials[1])
    assert torch.equal(frames[0], frames[1])
    assert frames[0].float().std() > 0.1


def test_empty_frames_are_left_alone() -> None:
    nothing = torch.empty(0, 4, 8, device=DEVICE)
    vector = torch.zeros(8, device=DEVICE)
    frame_norm_silu.frame_norm_silu(nothing, vector, None, None, vector, nothing.clone(), False, True, False)
    assert frame_norm_silu.why_not(nothing.double(), vector) is not None
    assert frame_norm_silu.why_not(nothing, torch.zeros(5000)) is not None
