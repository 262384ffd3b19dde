"""Problems of the video decoder's passes: a frame with as many pixels as the case has tokens in four frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from lingbot_kernels import ops, reference
from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.problem import Inputs, Outputs, Problem

BACKENDS = ("triton", "reference")
WIDEST = 384  # channels of the Wan decoder


def frame_problems(case: KernelCase, dtype: torch.dtype) -> Iterator[Problem]:
    """Both passes."""
    height, width, channels = 2 * case.rows, 2 * case.columns, min(case.dim, WIDEST)
    pixels, size = height * width, dtype.itemsize

    def make(device: torch.device) -> Inputs:
        return {
            "y": torch.randn(height, width, channels, device=device, dtype=dtype),
            "bias": torch.randn(channels, device=device),
            "gamma": 1 + 0.2 * torch.randn(channels, device=device),
            "out": torch.empty(height, width, channels, device=device, dtype=dtype),
        }

    def norm(function: Callable[..., None], inputs: Inputs, **options: Any) -> Outputs:
        function(inputs["y"], inputs["bias"], gamma=inputs["gamma"], act=inputs["out"], **options)
        return ()

    plain = {"residual": None, "stream": None, "add_stream": False, "silu": True, "parities": False}
    yield Problem(
        "frame_norm_silu", case.name, (height, width, channels), dtype, pixels, channels, make,
        lambda inputs, backend: partial(norm, ops.frame_norm_silu, inputs, backend=backend),
        lambda inputs: norm(reference.frame_norm_silu, inputs, **plain),
        bytes=2 * pixels * channels * size, backends=BACKENDS, judged=lambda inputs, _: (inputs["out"],),
    )  # fmt: skip

    def make_taps(device: torch.device) -> Inputs:
        return {
            "taps": torch.randn(height, width, 16, device=device, dtype=dtype),
            "bias": 0.1 * torch.randn(3, device=device),
            "partial": 0.1 * torch.randn(2, height, width, 3, device=device),
            "out": torch.empty(height, width, 3, device=device),
        }

    def sum_taps(function: Callable[..., None], inputs: Inputs, **options: Any) -> Outputs:
        sums = inputs["partial"].clone()  # which the op moves on
        function(inputs["taps"], inputs["bias"], sums, inputs["out"], **options)
        return (sums,)

    yield Problem(
        "frame_pixels", case.name, (height, width, 3), dtype, pixels, 3, make_taps,
        lambda inputs, backend: partial(sum_taps, ops.frame_pixels, inputs, backend=backend),
        lambda inputs: sum_taps(reference.frame_pixels, inputs),
        bytes=pixels * (9 * size + 12 * 4 + 3 * 4), backends=BACKENDS,
        judged=lambda inputs, outputs: (inputs["out"], *outputs),
    )  # fmt: skip
