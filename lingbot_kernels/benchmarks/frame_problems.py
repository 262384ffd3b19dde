"""Problems of the video decoder's passes: a frame with as many pixels as the case has tokens in four frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.problem import Inputs, Problem, call_problem

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

    def norm(function: Callable[..., None], inputs: Inputs, **options: Any) -> None:
        plain = {"residual": None, "stream": None, "add_stream": False, "silu": True, "parities": False}
        options = options or plain  # the reference has no defaults
        function(inputs["y"], inputs["bias"], gamma=inputs["gamma"], act=inputs["out"], **options)

    yield call_problem(
        case.name, (height, width, channels), dtype, "frame_norm_silu", make, norm, tokens=pixels,
        bytes=2 * pixels * channels * size, backends=BACKENDS, judged=lambda inputs, _: (inputs["out"],),
    )  # fmt: skip

    def make_taps(device: torch.device) -> Inputs:
        return {
            "taps": torch.randn(height, width, 16, device=device, dtype=dtype),
            "bias": 0.1 * torch.randn(3, device=device),
            "partial": 0.1 * torch.randn(2, height, width, 3, device=device),
            "out": torch.empty(height, width, 3, device=device),
        }

    def sum_taps(function: Callable[..., None], inputs: Inputs, **options: Any) -> torch.Tensor:
        sums: torch.Tensor = inputs["partial"].clone()  # which the op moves on
        function(inputs["taps"], inputs["bias"], sums, inputs["out"], **options)
        return sums

    yield call_problem(
        case.name, (height, width, 3), dtype, "frame_pixels", make_taps, sum_taps, tokens=pixels,
        bytes=pixels * (9 * size + 12 * 4 + 3 * 4), backends=BACKENDS,
        judged=lambda inputs, outputs: (inputs["out"], *outputs),
    )  # fmt: skip
