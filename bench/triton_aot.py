"""Compiles, without a GPU, exactly what a launcher would launch, and reads from the cubin what the kernel needs.

with recorded_launches() as launches: rms_norm(...)   # CPU tensors of the right dtypes, shapes and strides
launches[0].compile(arch=90).registers
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lingbot_kernels.triton import _launch

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled to. Spilled bytes are a thread's, shared ones a program's, its pipeline's included;
    `accesses` counts SASS global loads and stores.
    """

    name: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    accesses: dict[str, int]
    instructions: int
    sass: str


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: `kernel[grid](*args, **kwargs)`."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def compile(self, arch: int) -> Compiled:
        """Specialise as the launch would, compile for sm_`arch` (into Triton's cache) and disassemble."""
        target = GPUTarget("cuda", arch, 32)
        backend = make_backend(target)
        kwargs = {**self.kwargs, "debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.args, **kwargs)
        options, signature, constexprs, attrs = self.kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        usage, sass = disassemble(compiled.asm["cubin"])
        fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
        return Compiled(
            self.kernel.__name__,
            compiled.metadata.num_warps,
            fields["REG"],
            fields["STACK"] + fields["LOCAL"],
            fields["SHARED"] + compiled.metadata.shared,
            dict(Counter(opcode for opcode in opcodes if opcode.startswith(("LDG", "STG")))),
            sum(opcode != "NOP" for opcode in opcodes),
            sass,
        )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of a cubin, as text, by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    return usage, sass


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside it no kernel is launched: each launch is appended to the list that this gives."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, must be unset to compile kernels")
    launches: list[Launch] = []
    run, use_compiled = JITFunction.run, _launch.use_compiled

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, grid, args, kwargs))

    JITFunction.run = record
    _launch.use_compiled = False
    try:
        yield launches
    finally:
        JITFunction.run = run
        _launch.use_compiled = use_compiled
