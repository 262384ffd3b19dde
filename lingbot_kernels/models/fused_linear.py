"""Several linear layers of one input as one matrix product, under the names that checkpoints give the single layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """Linear layers `names`, [out_features, in_features] each, kept as the rows of one weight: there is no second copy.

    The module that owns it, a `FusedLinearOwner`, shows the rows in its state dict as `<name>.weight` and
    `<name>.bias`.
    """

    def __init__(self, in_features: int, out_features: int, names: tuple[str, ...], **factory: Any) -> None:
        super().__init__()
        self.names = names
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(len(names) * out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(len(names) * out_features, **factory))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, *names: str, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `names`, neighbours in the order kept, as strided views of one product [..., out_features]."""
        first = self.names.index(names[0])
        if self.names[first : first + len(names)] != names:
            raise ValueError(f"names: got {names}, must be neighbours in {self.names}")
        rows = slice(first * self.out_features, (first + len(names)) * self.out_features)
        return F.linear(x, self.weight[rows], self.bias[rows]).chunk(len(names), dim=-1)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The owner has loaded the rows; no checkpoint has keys of the fused layer itself."""
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix)]

    def row_views(self) -> dict[str, Tensor]:
        """`<name>.weight` and `<name>.bias` of each layer, as views of the parameters."""
        weights, biases = self.weight.chunk(len(self.names)), self.bias.chunk(len(self.names))
        return {
            f"{name}.{part}": rows
            for name, weight, bias in zip(self.names, weights, biases, strict=True)
            for part, rows in (("weight", weight), ("bias", bias))
        }


class FusedLinearOwner(nn.Module):
    """A module whose `FusedLinear` children appear in its state dict as the single layers, directly under its own
    prefix.
    """

    def _fused(self) -> list[tuple[str, FusedLinear]]:
        return [(name, child) for name, child in self._modules.items() if isinstance(child, FusedLinear)]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, fused in self._fused():
            for part in ("weight", "bias"):
                del destination[f"{prefix}{name}.{part}"]
            for key, rows in fused.row_views().items():
                destination[prefix + key] = rows if keep_vars else rows.detach()
        return destination

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for _, fused in self._fused():
            views = fused.row_views()
            given = {key: state_dict.pop(prefix + key) for key in views if prefix + key in state_dict}
            missing_keys += [prefix + key for key in views if key not in given]
            wrong = [key for key, value in given.items() if value.shape != views[key].shape]
            error_msgs += [
                f"{prefix + key}: got shape {list(given[key].shape)}, must be {list(views[key].shape)}" for key in wrong
            ]
            if wrong:
                continue
            if local_metadata.get("assign_to_params_buffers", False) and len(given) == len(views):
                for part in ("weight", "bias"):
                    rows = torch.cat([given[f"{name}.{part}"] for name in fused.names])
                    setattr(fused, part, nn.Parameter(rows, requires_grad=getattr(fused, part).requires_grad))
            else:
                with torch.no_grad():
                    for key, value in given.items():
                        views[key].copy_(value)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
