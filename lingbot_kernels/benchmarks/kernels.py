"""Runs the kernel bench: for every op, case and backend the gate first, then the times, then the peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lingbot_kernels.benchmarks import backends, gate, timing
from lingbot_kernels.benchmarks.kernel_cases import HEADLINE, KERNEL_CASES, KernelCase
from lingbot_kernels.benchmarks.peers import Peer, gate_run, peers_of
from lingbot_kernels.benchmarks.problem import Inputs, Problem
from lingbot_kernels.benchmarks.problems import problems
from lingbot_kernels.benchmarks.rows import ABSENT, FAILED, GREEN, RED, Row, failure_note
from lingbot_kernels.benchmarks.timing import QUICK, Effort, measure, measure_copy, rotated_sets, wall_us
from lingbot_kernels.ops import _dispatch
from lingbot_kernels.ops.windowed_attention import LIBRARIES

_KERNELS = ("cuda", "triton", "cpu")  # backends of ours: they allocate outputs alone, so all of it can be poisoned
BACKENDS = (*_dispatch.BACKENDS, *(name for name in LIBRARIES if name not in _dispatch.BACKENDS), "auto")


@dataclass(frozen=True)
class KernelPlan:
    """What to measure.

    Attributes:
        cases: names of `KERNEL_CASES`.
        ops: names, or empty for every op.
        backends: names, or empty for those of the device: a backend asked for that can't serve gives a row that
            says why.
        peers: also measure the peers.
        quick: fewer and shorter samples, and no peer that compiles.
        dtype: of the activations.
    """

    cases: tuple[str, ...]
    device: torch.device
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    peers: bool = True
    quick: bool = False
    dtype: torch.dtype = torch.bfloat16


@dataclass
class KernelBench:
    """One run of a plan; `report` is given each row as soon as it is there."""

    plan: KernelPlan
    report: Callable[[Row], None]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.plan.device
        self.effort = QUICK if self.plan.quick else Effort()

    @torch.no_grad()
    def run(self) -> bool:
        """Measure everything; whether every gate of ours is green. A failure of one op leaves the others alone."""
        for name in self.plan.cases:
            case = KERNEL_CASES[name]
            for problem in problems(case, self.plan.dtype):
                if not self.plan.ops or problem.op in self.plan.ops:
                    self._problem(case, problem)
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
        return not any(row.gate in (RED, FAILED) for row in self.rows if not row.peer)

    def _problem(self, case: KernelCase, problem: Problem) -> None:
        peers = peers_of(problem.op) if self.plan.peers and not case.wrap else []
        peers = [p for p in peers if not p.compiles or (case.name == HEADLINE and not self.plan.quick)]
        ours = [_own(problem, name, self.device) for name in self._backends(problem)]
        if not ours and not peers:
            return
        try:
            work = _Work(self, case, problem)
        except Exception as error:
            for way in ours:
                self._add(_row(problem, way.name, gate=FAILED, note=failure_note(error)))
            return
        for way in (*ours, *peers):
            self._add(work.measure(way, peer=way in peers))

    def _backends(self, problem: Problem) -> list[str]:
        if self.plan.backends:
            return [name for name in self.plan.backends if name in problem.backends]
        unused = ("cuda", "triton") if self.device.type == "cpu" else ("cpu",)
        libraries = ("fa4", "fa3", "cudnn") if self.device.type == "cpu" else ()
        return [name for name in problem.backends if name not in (*unused, *libraries)]

    def _add(self, row: Row) -> None:
        row = dataclasses.replace(row, precision=str(self.plan.dtype).removeprefix("torch."))
        self.rows.append(row)
        self.report(row)


class _Work:
    """One problem's inputs, expectation and ceiling, shared by its backends and peers."""

    def __init__(self, bench: KernelBench, case: KernelCase, problem: Problem) -> None:
        self.bench, self.case, self.problem = bench, case, problem
        torch.manual_seed(20)
        self.sets = [problem.make(bench.device)]
        self.expectation = gate.expect(problem, self.sets[0])
        self._ceiling: float | None = None

    def measure(self, way: Peer, peer: bool) -> Row:
        """The row of one way of doing what the op does; a failure is a row too."""
        try:
            return self._measure(way, _row(self.problem, way.name, peer=peer, gate=GREEN, note=way.note))
        except Exception as error:
            return _row(self.problem, way.name, peer=peer, gate=FAILED, note=failure_note(error))

    def _measure(self, way: Peer, row: Row) -> Row:
        problem, case, device = self.problem, self.case, self.bench.device
        missing = way.missing()
        if missing is not None:
            return dataclasses.replace(row, gate=ABSENT, note=missing)
        expectation = self.expectation
        if way.adapt is not None:
            expectation = gate.expect(problem, way.adapt(case, self.sets[0]))
        poisoned = not row.peer and way.name in _KERNELS
        verdict = gate.judge(expectation, gate_run(way, problem.op, case), fill_outputs=poisoned)
        row = dataclasses.replace(row, error=verdict.error, plain_error=verdict.plain_error)
        if not verdict.green:
            return dataclasses.replace(row, gate=RED, note=verdict.reason)
        while len(self.sets) < rotated_sets(problem.bytes, device):
            self.sets.append(problem.make(device))
        calls = [way.bind(problem.op, case, inputs) for inputs in self.sets]
        # The plain table is made of lists, which are copied from the host: nothing a graph can capture.
        graph = not (problem.op == "rope_cos_sin" and way.name == "reference")
        timed = measure(calls, device, self.bench.effort, graph=graph)
        wall = wall_us(calls, device, timed.p50_us) if device.type == "cuda" else timed.p50_us
        ceiling = self.ceiling()
        return dataclasses.replace(
            row, **dataclasses.asdict(timed), wall_us=wall,
            ceiling=problem.ceiling, ceiling_us=ceiling, ratio=timed.p50_us / ceiling if ceiling else None,
            tbps=None if problem.flops else problem.bytes / timed.p50_us / 1e6,
            tflops=problem.flops / timed.p50_us / 1e6 if problem.flops else None,
        )  # fmt: skip

    def ceiling(self) -> float | None:
        """Median time of what the problem is held against, microseconds; measured once, beside the first backend."""
        bench, problem = self.bench, self.problem
        if self._ceiling is None and problem.ceiling == "copy":
            self._ceiling = measure_copy(problem.bytes, bench.device, bench.effort).p50_us
        elif self._ceiling is None and problem.ceiling == "gemm":
            products = [_bare_product(inputs) for inputs in self.sets]
            self._ceiling = measure(products, bench.device, bench.effort).p50_us
        return self._ceiling


def _own(problem: Problem, backend: str, device: torch.device) -> Peer:
    """One of our backends, as what is measured beside the peers."""

    def missing() -> str | None:
        if backend == "auto":
            return None
        return backends.why_not(problem.op, backend, device.type, problem.dtype, problem.shape[-1])

    return Peer(backend, (problem.op,), lambda op, case, inputs: problem.bind(inputs, backend), missing)


def _bare_product(inputs: Inputs) -> timing.Thunk:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.linear(x, weight, bias)


def _row(problem: Problem, backend: str, *, gate: str, peer: bool = False, note: str = "") -> Row:
    return Row(
        bench="kernels", case=problem.case, op=problem.op, backend=backend, peer=peer, shape=problem.shape,
        dtype=str(problem.dtype).removeprefix("torch."), tokens=problem.tokens, dim=problem.dim, gate=gate,
        bytes=problem.bytes, note=note,
    )  # fmt: skip


def format_row(row: Row) -> str:
    """One line for the terminal: times, throughput, the ratio to the ceiling, or why there is none."""
    head = f"{row.op:<27} {row.case:<24} {row.backend:<16} "
    if row.p50_us is None:
        return head + f"{row.gate}: {row.note}" if row.note else head + row.gate
    rate = f"{row.tflops:7.1f} TFLOP/s" if row.tflops is not None else f"{row.tbps:7.3f} TB/s   "
    held = f"{row.ratio:6.3f} x {row.ceiling} {row.ceiling_us:.1f}" if row.ratio is not None else ""
    times = f"{row.p50_us:9.2f} us ({row.p20_us:.2f}-{row.p80_us:.2f})"
    return f"{head}{times:<30} {rate}  wall {row.wall_us:6.1f} us  {held}" + (f"  [{row.note}]" if row.note else "")
