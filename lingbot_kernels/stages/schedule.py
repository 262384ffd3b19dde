"""Few-step flow-matching schedules: the times the model is told and the sigmas the sampler uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lingbot_kernels.scalars import as_real, as_reals


def warp(u: float, shift: float) -> float:
    """sigma = shift * u / (1 + (shift - 1) * u), the time shift of SD3 (Esser et al. 2024, section 5.3.2)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Schedule:
    """One denoising loop.

    Attributes:
        times: what the model is told at each step.
        sigmas: x0 = x - sigma * v at each step.
        noise_sigmas: x = (1 - s) * x0 + s * noise before each step but the first.

    Raises:
        ValueError: lengths that don't match, values out of range.
    """

    times: tuple[float, ...]
    sigmas: tuple[float, ...]
    noise_sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times:
            raise ValueError("times: got none, must be one or more")
        if len(self.sigmas) != len(self.times) or len(self.noise_sigmas) != len(self.times) - 1:
            raise ValueError(
                f"sigmas, noise_sigmas: got {len(self.sigmas)} and {len(self.noise_sigmas)}, "
                f"must be {len(self.times)} and {len(self.times) - 1} for {len(self.times)} times"
            )
        for name, values, top in (
            ("times", self.times, math.inf),
            ("sigmas", self.sigmas, 1.0),
            ("noise_sigmas", self.noise_sigmas, 1.0),
        ):
            for value in values:
                if not (math.isfinite(value) and 0 <= value <= top):
                    raise ValueError(f"{name}: got {value}, must be finite and from 0 to {top}")

    @classmethod
    def continuous(cls, timesteps: Sequence[float], shift: float) -> Schedule:
        """What serving engines use: the model is told 1000 * sigma(t / 1000) as it is, not rounded."""
        sigmas = tuple(warp(t / 1000, shift) for t in timesteps)
        return cls(tuple(1000 * sigma for sigma in sigmas), sigmas, sigmas[1:])

    @classmethod
    def official(cls, timesteps: Sequence[float], shift: float) -> Schedule:
        """The second-generation reference code: u = 0.999 t / 1000, warped times truncated to integers.

        Its table holds sigma(0.999 t / 1000) for t = 1000, 999 .. 1 and is looked up by truncated time. Truncation
        makes duplicates; x0 takes the first match, re-noising the second where there is one.
        """
        table = [warp(0.999 * t / 1000, shift) for t in range(1000, 0, -1)]
        times = [math.floor(1000 * warp(0.999 * t / 1000, shift)) for t in timesteps]
        matches = [[sigma for sigma in table if math.floor(1000 * sigma) == time] for time in times]
        for t, found in zip(timesteps, matches, strict=True):
            if not found:
                raise ValueError(f"timesteps: got {t}, whose warped time is in no entry of the official table")
        return cls(
            tuple(float(time) for time in times),
            tuple(found[0] for found in matches),
            tuple(found[min(1, len(found) - 1)] for found in matches[1:]),
        )

    @classmethod
    def make(
        cls,
        schedule: str | Schedule,
        timesteps: Sequence[float],
        shift: float,
        sigmas: Sequence[float] | None = None,
        noise_sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """The schedule of that name, or, where `sigmas` are given, exactly these times and sigmas.

        Args:
            timesteps, sigmas, noise_sigmas: sequences of numbers or numpy vectors, read exactly, whatever their dtype.

        Raises:
            ValueError: an unknown name, timesteps outside 0 .. 1000, a shift that is not positive, noise_sigmas alone,
                sigmas of either kind besides a `Schedule`; NaN anywhere.
            TypeError: a tensor, a bool or a string where numbers belong.
        """
        if isinstance(schedule, Schedule):
            for name, given in (("sigmas", sigmas), ("noise_sigmas", noise_sigmas)):
                if given is not None:
                    raise ValueError(f"{name}: got them with a Schedule, which has its own; must be None")
            return schedule
        timesteps = as_reals("timesteps", timesteps)
        if sigmas is not None:
            sigmas = as_reals("sigmas", sigmas)
            rest = sigmas[1:] if noise_sigmas is None else as_reals("noise_sigmas", noise_sigmas)
            return cls(tuple(float(t) for t in timesteps), sigmas, rest)
        if noise_sigmas is not None:
            raise ValueError("noise_sigmas: got them without sigmas, must come together")
        if schedule not in ("continuous", "official"):
            raise ValueError(f"schedule: got {schedule!r}, must be 'continuous', 'official' or a Schedule")
        for t in timesteps:
            if not 0 <= t <= 1000:
                raise ValueError(f"timesteps: got {t}, must be from 0 to 1000")
        if (shift := as_real("shift", shift)) <= 0:
            raise ValueError(f"shift: got {shift}, must be positive")
        return cls.continuous(timesteps, shift) if schedule == "continuous" else cls.official(timesteps, shift)
