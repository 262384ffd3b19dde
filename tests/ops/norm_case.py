"""Arguments and refusals that the norm, modulation and residual ops share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ops.op_case import Arguments, Errors

# (dtype of the residual stream, dtype of the branch)
STREAMS = (
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
)  # fmt: skip
SHAPES = ((2, 5, 48), (1, 1, 128), (3, 2, 54), (1, 7, 5120))

Refusals = dict[str, tuple[Callable[[Arguments], Arguments], Errors, str]]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Off-centre values, so that the mean matters to a norm."""
    return (0.5 + torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def vectors(shape: tuple[int, int, int], per_batch: bool, *names: str) -> Arguments:
    """Modulation vectors, float32 [D] or [B, D]."""
    size = (shape[0], shape[2]) if per_batch else (shape[2],)
    return {name: 0.3 * draw(size, seed=10 + i) for i, name in enumerate(names)}


def stream_refusals() -> Refusals:
    """What every op on a residual stream x [2, 5, 48] and a branch delta refuses."""
    return {
        "x dims": (lambda a: {"x": a["x"][0]}, ValueError, r"x: got .*must be \[B, S, D\]"),
        "x one dim": (lambda a: {"x": a["x"][0, 0]}, ValueError, r"x: got .*must be \[B, S, D\]"),
        "x integers": (lambda a: {"x": a["x"].int()}, Exception, "int32"),
        "x stride": (lambda a: {"x": a["x"].mT.contiguous().mT}, ValueError, "x: got inner stride 5, must be 1"),
        "x sliced": (lambda a: {"x": draw((2, 6, 48))[:, 1:]}, ValueError, "x: got strides .*must be contiguous"),
        "x narrower": (lambda a: {"x": a["x"].bfloat16()}, TypeError, "x: got torch.bfloat16, must be torch.float32"),
        "delta shape": (lambda a: {"delta": a["delta"][:, 1:]}, ValueError, r"delta: got .*\[2, 4, 48\]"),
        "delta dims": (lambda a: {"delta": a["delta"][0]}, ValueError, r"delta: got .*must be \[B, S, D\]"),
        "delta meta": (lambda a: {"delta": a["delta"].to("meta")}, ValueError, "delta: got .*on meta"),
        "delta sliced": (
            lambda a: {"delta": draw((2, 6, 48))[:, 1:]}, ValueError, "delta: got strides .*must be contiguous",
        ),
    }  # fmt: skip


def vector_refusals(*names: str) -> Refusals:
    """What every op refuses of a modulation vector of x [2, 5, 48]."""
    cases: Refusals = {}
    for name in names:
        cases |= {
            f"{name} shape": (lambda a, n=name: {n: draw((47,))}, ValueError, rf"{name}: got shape \[47\], must be"),
            f"{name} batch": (lambda a, n=name: {n: draw((3, 48))}, ValueError, rf"{name}: got shape \[3, 48\]"),
            f"{name} dtype": (
                lambda a, n=name: {n: draw((48,), torch.bfloat16)}, TypeError, f"{name}: got torch.bfloat16",
            ),
            f"{name} meta": (lambda a, n=name: {n: draw((48,)).to("meta")}, TypeError, f"{name}: got .*on meta"),
            f"{name} stride": (
                lambda a, n=name: {n: draw((96,))[::2]}, ValueError, f"{name}: got inner stride 2, must be 1",
            ),
        }  # fmt: skip
    return cases


def weight_refusals(*names: str) -> Refusals:
    """What every op refuses of an affine weight of x [2, 5, 48] in float32."""
    cases: Refusals = {}
    for name in names:
        cases |= {
            f"{name} shape": (lambda a, n=name: {n: draw((1, 48))}, ValueError, rf"{name}: got shape \[1, 48\]"),
            f"{name} dtype": (lambda a, n=name: {n: draw((48,)).half()}, TypeError, f"{name}: got torch.float16"),
            f"{name} meta": (lambda a, n=name: {n: draw((48,)).to("meta")}, TypeError, f"{name}: got .*on meta"),
            f"{name} stride": (lambda a, n=name: {n: draw((96,))[::2]}, ValueError, rf"{name}: got stride \(2,\)"),
        }
    return cases
