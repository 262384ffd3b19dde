"""How a layer takes its rows: as they are, or as int8 codes that the pass which has the row in registers makes.

Between two products stands one pass. What it writes is what the layer after it takes, so it is asked for there:

    rows = rows_for(layer)
    x, y = rows.residual_norm_modulate(x, delta, shift, scale, eps)
    layer(y)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lingbot_kernels import ops


class QuantizedRows(NamedTuple):
    """Rows as int8 codes [B, S, Kp] and a float32 scale each [B, S], of values times signs and rotated."""

    codes: Tensor
    scale: Tensor


Taken = Tensor | QuantizedRows


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as they are. The passes are those of `lingbot_kernels.ops`."""

    def layer_norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Taken:
        return ops.layer_norm_modulate(x, shift, scale, eps, out_dtype=dtype)

    def residual_norm_modulate(
        self, x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None
    ) -> tuple[Tensor, Taken]:
        return ops.residual_norm_modulate(x, delta, shift, scale, eps, gate)

    def gated_residual_camera_norm(
        self, x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
        weight: Tensor, bias: Tensor, eps: float,
    ) -> tuple[Tensor, Taken]:  # fmt: skip
        return ops.gated_residual_camera_norm(x, delta, gate, cam_scale, cam_shift, weight, bias, eps)


PLAIN = Rows()


@dataclass(frozen=True, eq=False)
class Int8Rows(Rows):
    """Rows as int8 codes: times `signs` [Kp] (None: as they are), rotated with `rotate`."""

    signs: Tensor | None
    rotate: bool

    def layer_norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Taken:
        return QuantizedRows(*ops.layer_norm_modulate_quantize(x, shift, scale, eps, self.signs, self.rotate))

    def residual_norm_modulate(
        self, x: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None
    ) -> tuple[Tensor, Taken]:
        x, codes, row_scale = ops.residual_norm_modulate_quantize(
            x, delta, shift, scale, eps, gate, self.signs, self.rotate
        )
        return x, QuantizedRows(codes, row_scale)

    def gated_residual_camera_norm(
        self, x: Tensor, delta: Tensor, gate: Tensor | None, cam_scale: Tensor | None, cam_shift: Tensor | None,
        weight: Tensor, bias: Tensor, eps: float,
    ) -> tuple[Tensor, Taken]:  # fmt: skip
        x, codes, row_scale = ops.gated_residual_camera_norm_quantize(
            x, delta, gate, cam_scale, cam_shift, weight, bias, eps, self.signs, self.rotate
        )
        return x, QuantizedRows(codes, row_scale)

    def quantize(self, x: Tensor) -> QuantizedRows:
        """Rows x [B, S, K] that no pass of ours made."""
        return QuantizedRows(*ops.rotate_quantize(x, self.signs, self.rotate))
