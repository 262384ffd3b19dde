"""Launches of Triton kernels: the first call of a kind compiles, later ones skip the work of finding what was compiled.

`kernel[grid](...)` binds and specialises some thirty arguments and formats its options at every call. Here a kind of
call is known by a short key, at least as fine as Triton's own, under which the compiled kernel is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Whether kept kernels are launched; off: every launch is `kernel[grid](...)`, as while launches are recorded.
use_compiled = True

# Releases whose CompiledKernel is run the way `_run` does it; with others every launch is `kernel[grid](...)`.
KNOWN_RELEASE = triton.__version__.startswith("3.6.")
POINTER_ALIGNMENT = 16  # bytes; Triton compiles pointers that are multiples of it differently
INT32 = 1 << 31

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


def _key(
    kernel: JITFunction,
    device: int,
    tensors: tuple[Any, ...],
    counts: tuple[Any, ...],
    strides: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int,
) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """The key of a call, or None where it has to be `kernel[grid](...)`; and its tensors and counts as a kept kernel
    takes them: addresses, which are not looked up again, and ints.

    The key holds of a tensor its dtype and alignment, of a count that it is an int of 32 bits, of all else its value.
    """
    key: list[Any] = [id(kernel), device, num_warps, strides, constants]
    values: list[Any] = []
    for x in (*tensors, *counts):
        if isinstance(x, torch.Tensor):
            address = x.data_ptr()
            values.append(address)
            key += (x.dtype, address % POINTER_ALIGNMENT)
        elif x is None or -INT32 <= x < INT32:
            values.append(x)
            key.append(None if x is None else int)
        else:
            return None, values  # compiled for 64 bits
    return tuple(key), values


def _can_use_compiled(kernel: Any, first: torch.Tensor) -> bool:
    """Kept kernels serve JIT-compiled kernels on CUDA tensors while nothing hooks into launches."""
    return (
        use_compiled
        and KNOWN_RELEASE
        and first.is_cuda
        and isinstance(kernel, JITFunction)  # not interpreted
        and not kernel.pre_run_hooks
        and not knobs.runtime.launch_enter_hook.calls
        and not knobs.runtime.launch_exit_hook.calls
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    counts: tuple[Any, ...],
    strides: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """`kernel[grid](*tensors, *counts, *strides, **constants, num_warps=num_warps)` on the current device and stream.

    tensors: CUDA tensors or None, one of the first two a tensor. counts: values the kernel does not specialise on (an
    int, or a tensor in its place). strides: whatever else it takes. constants: its constexprs, in their order.
    """
    args = (*tensors, *counts, *strides)
    if not _can_use_compiled(kernel, tensors[0] if tensors[0] is not None else tensors[1]):
        kernel[grid](*args, **constants, num_warps=num_warps)
        return
    device = driver.active.get_current_device()
    values = tuple(constants.values())
    key, handed = _key(kernel, device, tensors, counts, strides, values, num_warps)
    compiled = None if key is None else _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, **constants, num_warps=num_warps)
        if key is not None and isinstance(compiled, CompiledKernel):
            if list(constants) != kernel.arg_names[len(args) :]:
                raise ValueError(
                    f"constants of {kernel.__name__} are {list(constants)}, must be {kernel.arg_names[len(args) :]}"
                )
            _compiled[key] = compiled
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    # No launch metadata and no hooks: nothing listens.
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *handed, *strides, *values
    )
