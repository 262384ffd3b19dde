"""Compiles for sm_90, without a GPU, exactly what a launcher would launch, and reads from the cubin what it needs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled to: bytes are a thread's, `accesses` maps SASS global loads and stores to their counts."""

    name: str
    num_warps: int
    grid: tuple[int, ...]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    accesses: dict[str, int]
    instructions: int
    sass: str


def compile_launch(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Compiled:
    """Specialise as `kernel[grid](*args, **kwargs)` would, compile for sm_90 and disassemble."""
    backend = make_backend(TARGET)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
    accesses: dict[str, int] = {}
    for opcode in opcodes:
        if opcode.startswith(("LDG", "STG")):
            accesses[opcode] = accesses.get(opcode, 0) + 1
    return Compiled(
        kernel.__name__,
        compiled.metadata.num_warps,
        grid,
        fields["REG"],
        fields["STACK"] + fields["LOCAL"],
        fields["SHARED"],
        accesses,
        sum(opcode != "NOP" for opcode in opcodes),
        sass,
    )


@contextmanager
def recorded_launches() -> Iterator[list[Callable[[], Compiled]]]:
    """Inside it no kernel is launched: each launch is appended as a function that compiles it."""
    launches: list[Callable[[], Compiled]] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(lambda: compile_launch(self, grid, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run
