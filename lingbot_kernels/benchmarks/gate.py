"""The correctness gate: no speed without it. An output may be off by 1.25 times what the plain formulation is off by.

Both are compared with the plain formulation in float64; outputs and caches are full of NaN before the call, and the
slots that must not change have to keep their bits.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lingbot_kernels.benchmarks.problem import CACHES, Inputs, Outputs, Problem, poisoned, widened, written_slots

ERROR_FACTOR = 1.25
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    green: whether every check passed.
    reason: what failed first; "" where nothing did.
    error, plain_error: ||x - oracle|| / ||oracle|| of the output nearest its limit, and the plain formulation's.
    """

    green: bool
    reason: str
    error: float
    plain_error: float


@dataclass(frozen=True)
class Expectation:
    """What a problem's inputs must give: float64 oracle of each result, and the plain formulation's errors."""

    problem: Problem
    inputs: Inputs
    oracle: Outputs
    plain_errors: tuple[float, ...]


def relative_error(x: Tensor, oracle: Tensor) -> float:
    """||x - oracle|| / ||oracle|| in float64, on x's device; infinite where x is not finite, or of another shape."""
    if x.shape != oracle.shape or not bool(torch.isfinite(x).all()):
        return float("inf")
    wide = oracle.to(x.device, torch.float64)
    norm = torch.linalg.vector_norm(wide).item()
    error = torch.linalg.vector_norm(x.double() - wide).item()
    return error / norm if norm else error


def within(error: float, plain_error: float) -> bool:
    """Whether an error is finite and at most 1.25 times the plain formulation's."""
    return math.isfinite(error) and error <= ERROR_FACTOR * plain_error


def expect(problem: Problem, inputs: Inputs) -> Expectation:
    """The oracle's results for `inputs`, and how far off the plain formulation is in the inputs' own dtype."""
    wide, plain = poisoned(widened(inputs)), poisoned(inputs)
    oracle = tuple(x.double() for x in problem.results(wide, problem.plain(wide)))
    results = problem.results(plain, problem.plain(plain))
    return Expectation(
        problem, inputs, oracle, tuple(relative_error(x, o) for x, o in zip(results, oracle, strict=True))
    )


@contextlib.contextmanager
def nan_filled_allocations() -> Iterator[None]:
    """Within the block `torch.empty` and its kin hand out NaN: what a kernel does not write shows."""
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            torch.set_deterministic_debug_mode(mode)


def judge(expectation: Expectation, run: Callable[[Inputs], Outputs], *, fill_outputs: bool = True) -> Verdict:
    """Run once on poisoned inputs and compare.

    Args:
        run: inputs -> outputs, as the problem's.
        fill_outputs: also poison what the call allocates; off for library code that allocates workspaces.
    """
    problem = expectation.problem
    inputs = poisoned(expectation.inputs)
    with nan_filled_allocations() if fill_outputs else contextlib.nullcontext():
        outputs = run(inputs)
    results = problem.results(inputs, outputs)
    if len(results) != len(expectation.oracle):
        return Verdict(False, f"{len(results)} results instead of {len(expectation.oracle)}", float("inf"), 0.0)
    worst = Verdict(True, "", 0.0, 0.0)
    for index, (x, oracle, plain) in enumerate(zip(results, expectation.oracle, expectation.plain_errors, strict=True)):
        error = relative_error(x, oracle)
        if problem.op == "rope_cos_sin":
            off = ulps(x, oracle)
            if not off <= 1:
                return Verdict(False, f"table is {off:.2f} ulp off, must be at most 1", error, plain)
        elif not within(error, plain):
            reason = f"result {index}: error {error:.3e}, must be at most {ERROR_FACTOR} x {plain:.3e}"
            return Verdict(False, reason, error, plain)
        if index == 0 or error * worst.plain_error > worst.error * plain:
            worst = Verdict(True, "", error, plain)
    if not all(bool(torch.isfinite(x).all()) for x in outputs):
        return Verdict(False, "an output is not finite everywhere", worst.error, worst.plain_error)
    changed = _changed_slots(inputs, poisoned(expectation.inputs)) if "ring" in inputs else ""
    return Verdict(not changed, changed, worst.error, worst.plain_error)


def ulps(table: Tensor, oracle: Tensor) -> float:
    """Largest distance of a float32 table from the float64 oracle, in units of the oracle's last float32 place."""
    magnitude = oracle.abs().float().clamp_min(2.0**-100)
    unit = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)).double() - magnitude.double()
    off = ((table.double() - oracle).abs() / unit).max().item()
    return off if off == off else float("inf")


def _changed_slots(inputs: Inputs, before: Inputs) -> str:
    """Which cache changed outside the chunk's slots, bit for bit; "" where none did."""
    for name in CACHES:
        if name not in inputs:
            continue
        cache = inputs[name]
        bits = _BITS[cache.element_size()]
        others = torch.ones(cache.shape[1], dtype=torch.bool, device=cache.device)
        others[written_slots(inputs)] = False
        if not torch.equal(cache.view(bits)[:, others], before[name].view(bits)[:, others]):
            return f"{name}: slots outside the chunk changed"
    return ""
