"""Several linear layers of one input as one matrix product, under the names that checkpoints give the single layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels.quantization import Int8Linear, Taken
from lingbot_kernels.quantization.linear import not_codes


class FusedRows(nn.Module):
    """Linear layers `names`, [out_features, in_features] each, kept as the rows of one weight: there is no second copy.

    The module that owns it, a `FusedLinearOwner`, shows the rows in its state dict as `<name>.weight` and so on, for
    each of `parts`.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    out_features: int

    def rows_of(self, names: tuple[str, ...]) -> slice:
        """The rows of layers `names`, which must be neighbours in the order kept."""
        first = self.names.index(names[0])
        if self.names[first : first + len(names)] != names:
            raise ValueError(f"names: got {names}, must be neighbours in {self.names}")
        size = getattr(self, self.parts[0]).shape[0] // len(self.names)
        return slice(first * size, (first + len(names)) * size)

    def row_views(self) -> dict[str, Tensor]:
        """`<name>.<part>` of each layer, as views of the parameters."""
        parts = {part: getattr(self, part).chunk(len(self.names)) for part in self.parts}
        return {f"{name}.{part}": rows[i] for i, name in enumerate(self.names) for part, rows in parts.items()}

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


class FusedLinear(FusedRows):
    """Fused layers in the model's dtype: weight [n * out_features, in_features], bias [n * out_features]."""

    parts = ("weight", "bias")

    def __init__(self, in_features: int, out_features: int, names: tuple[str, ...], **factory: Any) -> None:
        super().__init__()
        self.names = names
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(len(names) * out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(len(names) * out_features, **factory))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, *names: str, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `names`, neighbours in the order kept, as strided views of one product [..., out_features]."""
        rows = self.rows_of(names)
        return F.linear(x, self.weight[rows], self.bias[rows]).chunk(len(names), dim=-1)


class Int8FusedLinear(FusedRows, Int8Linear):
    """Fused layers with int8 weights: their rows of codes, scales and bias."""

    parts = ("weight", "weight_scale", "bias")

    def __init__(self, in_features: int, out_features: int, names: tuple[str, ...], **kwargs: Any) -> None:
        Int8Linear.__init__(self, in_features, len(names) * out_features, **kwargs)
        self.names, self.out_features = names, out_features

    def forward(self, *names: str, x: Taken) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The outputs of `names`, neighbours in the order kept, as strided views of one product [..., out_features]."""
        return self.product(x, self.rows_of(names)).chunk(len(names), dim=-1)

    def extra_repr(self) -> str:
        return f"{'‖'.join(self.names)}, {super().extra_repr()}"


class FusedLinearOwner(nn.Module):
    """A module whose `FusedRows` children appear in its state dict as the single layers, directly under its own
    prefix.
    """

    def _fused(self) -> list[tuple[str, FusedRows]]:
        return [(name, child) for name, child in self._modules.items() if isinstance(child, FusedRows)]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, fused in self._fused():
            for part in fused.parts:
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
            cut = [key for key, value in given.items() if views[key].dtype == torch.int8 != value.dtype]
            error_msgs += [not_codes(prefix + key, given[key]) for key in cut]
            if wrong or cut:
                continue
            if local_metadata.get("assign_to_params_buffers", False) and len(given) == len(views):
                for part in fused.parts:
                    rows = torch.cat([given[f"{name}.{part}"] for name in fused.names])
                    setattr(fused, part, nn.Parameter(rows, requires_grad=getattr(fused, part).requires_grad))
            else:
                with torch.no_grad():
                    for key, value in given.items():
                        views[key].copy_(value)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
