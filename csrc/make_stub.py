"""Writes the functions of the compiled core into lingbot_kernels/_C.pyi, from `class _Ops` on: python csrc/make_stub.py

After a change of csrc/bindings.cpp or csrc/params.h, with the core built anew. What stands before is written by hand.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from lingbot_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "lingbot_kernels" / "_C.pyi"
FLOATS = {"eps", "theta", "softmax_scale", "last_key_count"}


def function_of(name: str, last: str) -> str:
    """An op's definition; the core documents its arguments, "q.ptr" for a nested field."""
    documented = getattr(_C.cpu, name).__doc__.partition("(")[2].rpartition(", ")[0].split(", ")
    fields = [argument.replace(".", "_") for argument in documented]
    arguments = [f"{field}:~{'float' if field in FLOATS else 'int'}" for field in fields]  # ~: no end of a line
    listed = ", ".join(["self", *arguments, f"{last}:~int", "/"])
    lines = textwrap.fill(listed, 120, initial_indent=" " * 8, subsequent_indent=" " * 8).replace("~", " ")
    return f"    def {name}(\n{lines}\n    ) -> None: ...\n"


def stub() -> str:
    """The whole stub: its hand-written part as it stands, then the ops of both backends and those of the CPU alone."""
    by_hand = STUB.read_text().partition("class _Ops:")[0]
    alone = set(re.findall(r"\bX\(cpu, (\w+)\)", (ROOT / "csrc" / "bindings.cpp").read_text()))
    names = [name for name, op in vars(_C.cpu).items() if callable(op) and name != "set_isa" and name[0] != "_"]
    both = "".join(function_of(name, "threads_or_stream") for name in names if name not in alone)
    cpu = "".join(function_of(name, "threads") for name in names if name in alone)
    return (
        f"{by_hand}class _Ops:  # written by csrc/make_stub.py, from here on\n{both}\n"
        f"class _Cpu(_Ops):\n    isas: tuple[str, ...]\n{cpu}    def set_isa(self, name: str) -> None: ...\n\n"
        "cpu: _Cpu\ncuda: _Ops  # only where compiled_with_cuda\n"
    )


if __name__ == "__main__":
    STUB.write_text(stub())
