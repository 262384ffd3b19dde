"""RoPE table of a run of tokens of a (frame, row, column) grid, and its application."""

from __future__ import annotations

import torch

from lingbot_kernels.reference._common import accumulation_dtype


def rope_frequencies(head_dim: int, theta: float) -> tuple[list[float], list[float], list[float]]:
    """Angular frequencies, radians a position, of the (frame, row, column) pairs of one head.

    head_dim splits into t = head_dim - 4 * (head_dim // 6) and h = w = 2 * (head_dim // 6) channels; pair i of an axis
    of D channels turns by theta ** (-(2 * i) / D). Temporal pairs come first, then rows, then columns.
    """
    spatial = 2 * (head_dim // 6)
    t, h, w = (
        [theta ** (-(2 * i) / channels) for i in range(channels // 2)]
        for channels in (head_dim - 2 * spatial, spatial, spatial)
    )
    return t, h, w


def rope_cos_sin(
    num_tokens: int,
    token_start: int,
    frame_stride: int,
    width: int,
    head_dim: int,
    theta: float,
    device: torch.device | str,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """cos‖sin [num_tokens, head_dim] of tokens n = token_start + i of a grid of `frame_stride` tokens a frame.

    Token n lies at (n // frame_stride, n % frame_stride // width, n % width). Columns 0 .. head_dim/2 hold the cosines,
    the rest the sines, one a pair. Angles, cos and sin are float64, rounded once to `dtype` (or to the dtype of `out`,
    which is then filled and returned).
    """
    n = token_start + torch.arange(num_tokens, dtype=torch.int64, device=device)
    positions = (n // frame_stride, n % frame_stride // width, n % width)
    angles = torch.cat(
        [
            torch.outer(position.double(), torch.tensor(frequencies, dtype=torch.float64, device=device))
            for position, frequencies in zip(positions, rope_frequencies(head_dim, theta), strict=True)
        ],
        dim=1,
    )
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    return table.to(dtype) if out is None else out.copy_(table)


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [B, S, H, head_dim] by cos_sin [S, head_dim] or [B, S, head_dim]; one rounding
    to x's dtype.
    """
    accumulate = accumulation_dtype(x.dtype)
    cos, sin = cos_sin.to(accumulate).unsqueeze(-2).chunk(2, dim=-1)
    a, b = x.to(accumulate).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
