"""Attention's output for one rank's heads, written to the rows of the ranks that own the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attention_output_push(attended: torch.Tensor, outs: Sequence[torch.Tensor], column: int) -> None:
    """attended [B, S, W] in consecutive pieces, one a rank, to columns [column, column + W) of outs[r] [B, S_r, D]."""
    pieces = attended.split([out.shape[1] for out in outs], dim=1)
    for out, piece in zip(outs, pieces, strict=True):
        out[:, :, column : column + attended.shape[2]] = piece
