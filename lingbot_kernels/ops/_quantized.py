"""What the ops that give rows as int8 codes share."""

from __future__ import annotations

import torch
from torch import Tensor

from lingbot_kernels.ops._check import describe
from lingbot_kernels.ops._declare import Output
from lingbot_kernels.reference.rotate_quantize import padded_width


def codes_of(x: Tensor, signs: Tensor | None) -> list[Output]:
    """The outputs codes int8 [B, S, Dp] and row_scale float32 [B, S] for rows x [B, S, D]; refuses signs that are not
    int8 [Dp].
    """
    batch, tokens, dim = x.shape
    if dim < 1:
        raise ValueError(f"x: got {describe(x)}, must have one channel or more")
    width = padded_width(dim)
    if signs is not None:
        if signs.shape != (width,):
            raise ValueError(
                f"signs: got shape {list(signs.shape)}, must be [{width}], x's {dim} channels in whole blocks of 128"
            )
        if signs.dtype != torch.int8 or signs.device != x.device:
            raise TypeError(f"signs: got {describe(signs)}, must be torch.int8 on {x.device}")
        if not signs.is_contiguous():
            raise ValueError(f"signs: got stride {signs.stride()}, must be contiguous")
    return [Output(x, (batch, tokens, width), torch.int8), Output(x, (batch, tokens), torch.float32)]
