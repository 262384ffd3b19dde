"""Times and sigmas of the denoising loop, as published; pure arithmetic."""

from __future__ import annotations

import pytest

from lingbot_kernels.stages.schedule import Schedule, warp


def test_published_figures() -> None:
    continuous = Schedule.make("continuous", (1000, 750, 500, 250), 5.0)
    assert continuous.times == pytest.approx((1000, 937.5, 2500 / 3, 625), rel=1e-15)
    assert continuous.sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625), rel=1e-15)
    assert continuous.noise_sigmas == continuous.sigmas[1:]
    official = Schedule.make("official", (1000, 750, 500, 250), 5.0)
    assert official.times == (999.0, 937.0, 833.0, 624.0)
    assert official.sigmas == pytest.approx((0.9998, 0.93789, 0.83361, 0.624687), abs=5e-6)
    assert official.noise_sigmas == pytest.approx((0.937578, 0.833055, 0.624687), abs=5e-7)


@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0])
def test_the_warp_keeps_its_ends_and_its_order(shift: float) -> None:
    values = [warp(u / 100, shift) for u in range(101)]
    assert (values[0], values[-1]) == (0, 1) and values == sorted(values)
    assert warp(0.5, 1.0) == 0.5
