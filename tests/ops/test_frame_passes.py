"""frame_norm_silu and frame_pixels: what they write and what they leave, refusals, registration; CPU: the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lingbot_kernels import ops
from ops.op_case import check_registration

HEIGHT, WIDTH, CHANNELS = 4, 6, 8


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    ring = torch.full((HEIGHT, WIDTH, 3, CHANNELS), torch.nan, dtype=dtype)
    return {
        "y": draw(HEIGHT, WIDTH, CHANNELS, dtype=dtype), "bias": draw(CHANNELS, seed=1), "act": ring[:, :, 1],
        "gamma": draw(CHANNELS, seed=2), "residual": draw(HEIGHT, WIDTH, CHANNELS, dtype=dtype, seed=3),
        "stream": draw(HEIGHT, WIDTH, CHANNELS, seed=4), "add_stream": True,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_against_the_modules_that_it_stands_for(dtype):
    a = given(dtype)
    before = a["stream"].clone()
    v = a["y"].double() + a["bias"].double() + a["residual"].double() + before.double()
    act = F.silu(F.normalize(v, dim=-1) * CHANNELS**0.5 * a["gamma"].double())
    ops.frame_norm_silu(**a)
    torch.testing.assert_close(a["stream"].double(), v, rtol=1e-6, atol=1e-6)
    tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(a["act"].double(), act, rtol=tolerance, atol=tolerance)
    ring = a["act"]._base
    assert ring is not None and ring[:, :, 0].isnan().all() and ring[:, :, 2].isnan().all()


def test_pixels_of_four_parities_stand_where_they_belong():
    image = torch.arange(HEIGHT * WIDTH * CHANNELS).view(HEIGHT, WIDTH, CHANNELS).float()
    y = torch.full((HEIGHT // 2 + 1, WIDTH // 2 + 1, 4 * CHANNELS), torch.nan)
    for i in range(HEIGHT):
        for j in range(WIDTH):
            group = (2 * (i % 2) + j % 2) * CHANNELS
            y[i // 2 + i % 2, j // 2 + j % 2, group : group + CHANNELS] = image[i, j]
    act = torch.empty_like(image)
    ops.frame_norm_silu(y, torch.zeros(CHANNELS), act=act, silu=False, parities=True)
    assert torch.equal(act, image)


REFUSALS = {
    "y dims": ({"y": torch.zeros(3, 4)}, ValueError, r"y: got .* must be \[H, W, C\]"),
    "y integers": ({"y": torch.zeros(4, 6, 8, dtype=torch.int32)}, TypeError, "y: got torch.int32"),
    "y stride": ({"y": torch.zeros(8, 4, 6).permute(1, 2, 0)}, ValueError, "y: got inner stride 24, must be 1"),
    "y parities": ({"y": torch.zeros(4, 6, 6), "parities": True}, ValueError, "y: got shape .* with parities"),
    "bias shape": ({"bias": torch.zeros(7)}, ValueError, r"bias: got shape \[7\], must be \[8\]"),
    "bias dtype": ({"bias": torch.zeros(8).half()}, TypeError, "bias: got torch.float16"),
    "gamma shape": ({"gamma": torch.zeros(1)}, ValueError, "gamma: got shape"),
    "residual shape": ({"residual": torch.zeros(4, 6, 7)}, ValueError, "residual: got shape"),
    "residual dtype": ({"residual": torch.zeros(4, 6, 8).half()}, TypeError, "residual: got torch.float16"),
    "stream dtype": ({"stream": torch.zeros(4, 6, 8).half()}, TypeError, "stream: got torch.float16"),
    "stream expanded": ({"stream": torch.zeros(1, 6, 8).expand(4, 6, 8)}, ValueError, "stream: got strides"),
    "act device": ({"act": torch.zeros(4, 6, 8, device="meta")}, TypeError, "act: got"),
    "act stride": ({"act": torch.zeros(8, 4, 6).permute(1, 2, 0)}, ValueError, "act: got inner stride 24"),
    "nothing written": ({"act": None, "stream": None, "add_stream": False}, ValueError, "stream, act: got neither"),
    "no stream": ({"stream": None}, ValueError, "add_stream: got True, must be False without a stream"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    change, error, message = REFUSALS[case]
    a = given()
    stream = a["stream"].clone()
    with pytest.raises(error, match=message):
        ops.frame_norm_silu(**{**a, **change})
    assert torch.equal(a["stream"], stream) and a["act"].isnan().all()


def test_memory_shared_with_what_is_written_is_refused():
    a = given()
    with pytest.raises(ValueError, match="share memory"):
        ops.frame_norm_silu(**{**a, "act": a["y"]})


def test_backends_without_a_home_say_why():
    for backend in ("cuda", "cpu"):
        with pytest.raises(ops.BackendUnavailable, match=r"frame_norm_silu: backend .* can't serve"):
            ops.frame_norm_silu(**given(), backend=backend)


def taps() -> dict[str, torch.Tensor]:
    return {
        "taps": draw(HEIGHT, WIDTH, 16), "bias": draw(3, seed=1), "partial": draw(2, HEIGHT, WIDTH, 3, seed=2),
        "frame": torch.zeros(HEIGHT, WIDTH, 3),
    }  # fmt: skip


def test_partial_sums_move_on():
    a = taps()
    before, first = a["partial"].clone(), a["taps"]
    ops.frame_pixels(**a)
    pixel = first[..., 6:9] + before[0] + a["bias"]
    assert torch.equal(a["frame"], pixel.clamp(-1, 1))
    assert torch.equal(a["partial"][0], first[..., 3:6] + before[1]) and torch.equal(a["partial"][1], first[..., :3])


PIXEL_REFUSALS = {
    "few taps": ({"taps": torch.zeros(4, 6, 8)}, ValueError, "taps: got"),
    "bias": ({"bias": torch.zeros(3).half()}, TypeError, "bias: got torch.float16"),
    "partial": ({"partial": torch.zeros(1, 4, 6, 3)}, ValueError, "partial, frame: got shapes"),
    "partial dtype": ({"partial": torch.zeros(2, 4, 6, 3).half()}, TypeError, "partial: got torch.float16"),
    "frame dtype": ({"frame": torch.zeros(4, 6, 3).int()}, TypeError, "frame: got torch.int32"),
    "frame strides": ({"frame": torch.zeros(3, 4, 6).permute(1, 2, 0)}, ValueError, "frame: got strides"),
}


@pytest.mark.parametrize("case", PIXEL_REFUSALS)
def test_refusals_of_pixels(case):
    change, error, message = PIXEL_REFUSALS[case]
    with pytest.raises(error, match=message):
        ops.frame_pixels(**{**taps(), **change})


@pytest.mark.unpoisoned
def test_registration():
    a = given()
    names = ("y", "bias", "residual", "stream", "gamma", "act")
    a["act"] = torch.zeros(HEIGHT, WIDTH, CHANNELS)
    check_registration("frame_norm_silu", [(*(a[name] for name in names), True, True, False, "reference")])
    check_registration("frame_pixels", [(*taps().values(), "reference")])
