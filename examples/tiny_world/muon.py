"""Muon: momentum whose matrices are made orthogonal before they are taken as a step (Jordan et al. 2024), scaled so
that a step has the root mean square of one of AdamW's (Liu et al. 2025): both serve with one learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose repetition takes singular values to about 1
_ROUNDS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> matrices with the same singular vectors and all singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices alone; those of one shape are made orthogonal together.

    Args:
        params: matrices.
        lr: of AdamW's scale.
        momentum, weight_decay: of Nesterov's momentum, and decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        params = list(params)
        for param in params:
            if param.dim() != 2:
                raise ValueError(f"params: got a tensor of shape {list(param.shape)}, must be matrices")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step; `closure` must be None."""
        if closure is not None:
            raise ValueError("closure: got one, must be None")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(param.shape, []).append(param)
            for shape, params in shapes.items():
                grads = [param.grad for param in params]
                momenta = [self.state[param].setdefault("momentum", torch.zeros_like(param)) for param in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
                steps = orthogonal(torch.stack(ahead)) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(steps.unbind(0)), alpha=-group["lr"])
