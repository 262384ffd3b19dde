"""Compares the case parser with real execution on generated modules, under a stub case class and stub conditions.

``python tests/tools/differential.py --modules 50000 --seed 0`` prints the counts; a silent difference exits 1.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import module_generator  # noqa: E402

from lingbot_kernels.tools._case_parser import results  # noqa: E402

PARSER_SECONDS, MAX_PARSE_SECONDS = 10.0, 60.0
SUITES = {"ONE_GPU_CASES": "one", "TWO_GPU_CASES": "two"}


@dataclass
class Case:
    """Stub of the case class."""

    id: str
    gpus: int = 1
    extra: dict = field(default_factory=dict)


class Stub:
    """The outside world of a module: `bits` fixes the flags."""

    def __init__(self, bits: int) -> None:
        def flag(i: int) -> Callable[[], bool]:
            return lambda: bool(bits >> i & 1)

        flags = [flag(i) for i in range(6)]

        def fails() -> None:
            if flags[3]():
                raise ValueError("stub")

        def mutate(x: Any) -> None:
            if isinstance(x, list) and flags[0]():
                x.append(Case("hidden"))

        def transform(x: list) -> list:
            return [Case("transformed"), *x[1:]] if flags[1]() else list(x)

        def decorate(f: Callable) -> Callable:
            if flags[0]():
                f()
            return f

        def keep(f: Callable) -> None:
            if flags[1]():
                f()

        left = [3]

        def more() -> bool:
            left[0] -= 1
            return left[0] > 0 and flags[2]()

        platform = types.ModuleType("platform_stub")
        vars(platform).update(
            DiffusionTestCase=Case,
            flag0=flags[0],
            flag1=flags[1],
            flag2=flags[2],
            fails=fails,
            count=lambda: 2 if flags[4]() else 1,
        )
        outside = types.ModuleType("outside")
        vars(outside).update(
            mutate=mutate, transform=transform, decorate=decorate, keep=keep, more=more,
            names=lambda: ["u1", "u2"][: 1 + flags[1]()],
            make=lambda i: Case(i + "_made"), text=lambda: "text", zero=lambda: int(flags[0]()),
            mutate_held=lambda: mutate(outside.held),
        )  # fmt: skip
        self.modules = {"platform_stub": platform, "outside": outside}
        self.optional = {"optional0": flags[4], "optional1": flags[5]}
        self.platform = platform

    def namespace(self) -> dict[str, Any]:
        real = builtins.__import__

        def load(name: str, *args: Any) -> Any:
            if name in self.modules:
                return self.modules[name]
            if name in self.optional:
                if self.optional[name]():
                    return types.ModuleType(name)
                raise ImportError(name)
            return real(name, *args)

        return {"__builtins__": {**vars(builtins), "__import__": load}, "__name__": "config"}


@dataclass
class Outcome:
    """One module: how it was answered, and the silent difference if there is one."""

    compared: int = 0
    reported: bool = False
    conditional: bool = False
    difference: str | None = None


class Expired(BaseException):
    """A generated module runs for too long; no ``except Exception`` of it may take this."""


def _expired(*_: Any) -> None:
    raise Expired


def _execute(code: types.CodeType, ns: dict[str, Any]) -> bool | None:
    """Whether the module runs to its end; None when it takes too long (some loop over a list that they extend)."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.1)
            exec(code, ns)
            return True
        except Exception:
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Expired:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return None


def executions(text: str, seed: int) -> Iterator[tuple[Stub, dict[str, list[str]]]]:
    """The lists' ids in every variant that imports, for the flags' extreme and some random values."""
    code = compile(text, "config", "exec")
    signal.signal(signal.SIGALRM, _expired)
    rng = Random(seed)
    for bits in (0, 63, *(rng.getrandbits(6) for _ in range(10))):
        stub = Stub(bits)
        ns = stub.namespace()
        sys.modules["config"] = types.ModuleType("config")
        ended = _execute(code, ns)
        if ended is None:
            return
        if not ended:
            continue
        found = {}
        for name in SUITES:
            value = ns.get(name, [])
            if not isinstance(value, list) or not all(isinstance(c, Case) for c in value):
                break
            found[name] = [c.id for c in value]
        else:
            yield stub, found


class Parser:
    """The parser with one child interpreter for many modules."""

    def __init__(self) -> None:
        here = str(ROOT / "lingbot_kernels" / "tools")
        code = (
            f"import sys, json; sys.path.insert(0, {here!r}); from _case_parser import worlds; sys.path.pop(0)\n"
            "for line in sys.stdin: print(json.dumps(worlds.answer(json.loads(line))), flush=True)\n"
        )
        command = [sys.executable, "-I", "-S", "-B", "-c", code]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = Path(tempfile.mkdtemp())
        self.serial = 0

    def __call__(self, text: str) -> results.ParsedConfig:
        self.serial += 1
        config = self.folder / f"config_{self.serial}.py"
        config.write_text(text)
        options = results.Options("DiffusionTestCase", "id", timeout=PARSER_SECONDS)
        parsed = results.parse_config(config, SUITES, options, run=self._run)
        config.unlink()
        return parsed

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())


@functools.cache
def _parser(process: int) -> Parser:
    return Parser()


def parse(text: str) -> results.ParsedConfig:
    return _parser(os.getpid())(text)


def compare(text: str, seed: int = 0, parsed: results.ParsedConfig | None = None) -> Outcome:
    """Parse and execute a module; a difference counts only where the parser reported nothing."""
    start = time.perf_counter()
    parsed = parse(text) if parsed is None else parsed
    out = Outcome(reported=bool(parsed.unresolved))
    if time.perf_counter() - start > MAX_PARSE_SECONDS:
        out.difference = f"parsing took {time.perf_counter() - start:.1f} s"
    answers = {name: parsed.suites[suite] for name, suite in SUITES.items()}
    out.conditional = any(c.condition for cases in answers.values() for c in cases)
    duplicated = {(d.id, s) for d in parsed.duplicates for s in d.suites}
    for stub, found in executions(text, seed):
        out.compared += 1
        for name, ids in found.items():
            answer = {c.id: c.condition for c in answers[name]}
            times = Counter(ids)
            problem = None
            if lost := [i for i in times if i not in answer]:
                problem = f"lost {lost}"
            elif extra := [i for i, condition in answer.items() if condition is None and i not in times]:
                problem = f"declared as always there, but absent: {extra}"
            elif parsed.tests == 0 and list(dict.fromkeys(ids)) != list(answer):
                problem = f"order {ids} against {list(answer)}"
            elif unseen := [i for i, n in times.items() if n > 1 and (i, SUITES[name]) not in duplicated]:
                problem = f"duplicates not reported: {unseen}"
            else:
                wrong = [(i, c) for i, c in answer.items() if c and holds(c, stub) not in (None, i in times)]
                problem = f"condition doesn't tell: {wrong}" if wrong else None
            if problem and not out.reported:
                out.difference = f"{name}: {problem}; executed {found}"
                return out
        both = set(found["ONE_GPU_CASES"]) & set(found["TWO_GPU_CASES"])
        if not out.reported and any((i, s) not in duplicated for i in both for s in SUITES.values()):
            out.difference = f"same id in two suites not reported: {both}"
            return out
    return out


def holds(condition: str, stub: Stub) -> bool | None:
    """Truth of a condition's text where it is made of the stub's functions alone."""
    try:
        return bool(eval(condition, {"__builtins__": {}}, vars(stub.platform)))
    except Exception:
        return None


@dataclass
class Totals:
    """Counts over many modules."""

    modules: int = 0
    executed: int = 0
    executions: int = 0
    reported: int = 0
    conditional: int = 0
    differences: list[tuple[int, str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        resolved = self.executed - self.reported
        share = 100 * resolved / max(self.executed, 1)
        return [
            f"modules generated: {self.modules}",
            f"modules compared (at least one variant imports): {self.executed}, in {self.executions} executions",
            f"fully resolved: {resolved} ({share:.1f} %), with conditional cases among all: {self.conditional}",
            f"with unresolved reports: {self.reported}",
            f"silent differences: {len(self.differences)}",
        ]


def run(modules: int, seed: int, unresolved: float, *, stop_at: int = 5, first: int = 0) -> Totals:
    """Generate and compare `modules` modules from number `first` on."""
    totals = Totals()
    for i in range(first, first + modules):
        rng = Random(seed * 1_000_003 + i)
        text = module_generator.generate(rng, unresolved=unresolved if i % 2 else 0.0)
        outcome = compare(text, i)
        totals.modules += 1
        if outcome.compared:
            totals.executed += 1
            totals.executions += outcome.compared
            totals.reported += outcome.reported
            totals.conditional += outcome.conditional
        if outcome.difference:
            totals.differences.append((i, outcome.difference, text))
            if len(totals.differences) >= stop_at:
                break
    return totals


def _run_part(part: tuple[int, int, int, float]) -> Totals:
    first, modules, seed, unresolved = part
    return run(modules, seed, unresolved, first=first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unresolved", type=float, default=0.06, help="share of unresolvable statements in every other module"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    start = time.perf_counter()
    size = 100
    parts = [(i, min(size, args.modules - i), args.seed, args.unresolved) for i in range(0, args.modules, size)]
    totals = Totals()
    with multiprocessing.Pool(args.jobs) as pool:
        for part in pool.imap_unordered(_run_part, parts):
            for name, value in vars(part).items():
                setattr(totals, name, getattr(totals, name) + value)
            shown = f"{totals.modules} of {args.modules}, {len(totals.differences)} differences"
            print(f"{time.perf_counter() - start:7.1f} s: {shown}", file=sys.stderr, flush=True)
    for number, difference, text in totals.differences:
        print(f"--- module {number}: {difference}\n{text}")
    print("\n".join(totals.lines()))
    print(f"seconds: {time.perf_counter() - start:.1f}")
    return 1 if totals.differences else 0


if __name__ == "__main__":
    sys.exit(main())
