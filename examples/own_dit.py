"""Three calls in a forward that isn't ours: one self-attention layer of an engine in each table format and layout.

Each engine keeps its own tables and caches; nothing is copied to suit the ops. `RolledAttention` is what such engines
do by hand: norm, RoPE, roll the cache, write, attend. It and the three calls get the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lingbot_kernels import reference
from lingbot_kernels.integrations import functional as lingbot
from lingbot_kernels.ring import KVRing

HEADS, HEAD_DIM, EPS = 4, 32, 1e-6
ROWS, COLUMNS, FRAMES = 4, 6, 2
DIM, FRAME = HEADS * HEAD_DIM, ROWS * COLUMNS
WINDOW, SINK = 6 * FRAME, FRAME


def engine_angles(start_frame: int) -> Tensor:
    """Angles of a chunk's pairs [S, head_dim / 2], float64: what every engine's tables are made of."""
    table = reference.rope_cos_sin(
        FRAMES * FRAME, start_frame * FRAME, FRAME, COLUMNS, HEAD_DIM, 1e4, "cpu", dtype=torch.float64
    )
    cos, sin = table.chunk(2, dim=1)
    return torch.atan2(sin, cos)


def cos_then_sin(angles: Tensor) -> Tensor:
    return lingbot.rope_from_cos_sin(torch.cat([angles.cos(), angles.sin()], dim=1).float())


def separate(angles: Tensor) -> Tensor:
    return lingbot.rope_from_halves(angles.cos().float(), angles.sin().float())


def interleaved(angles: Tensor) -> Tensor:
    cos, sin = (x.float().repeat_interleave(2, dim=1)[None, :, None] for x in (angles.cos(), angles.sin()))
    return lingbot.rope_from_interleaved(cos, sin)  # [1, S, 1, head_dim]


def complex_numbers(angles: Tensor) -> Tensor:
    return lingbot.rope_from_complex(torch.polar(torch.ones_like(angles), angles)[:, None])  # complex128 [S, 1, D/2]


def float32_angles(angles: Tensor) -> Tensor:
    return lingbot.rope_from_angles(angles.float())


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos|sin": cos_then_sin,
    "cos, sin": separate,
    "interleaved": interleaved,
    "complex": complex_numbers,
    "angles": float32_angles,
}


class Weights(nn.Module):
    """The engine's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.norm_q, self.norm_k = nn.RMSNorm(DIM, EPS), nn.RMSNorm(DIM, EPS)


class RolledAttention:
    """By hand: norm, RoPE, roll the window behind the sink, write, attend."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.k = self.v = torch.empty(1, 0, HEADS, HEAD_DIM)

    def __call__(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.weights.qkv(x).chunk(3, dim=-1)
        q, k = self.weights.norm_q(q), self.weights.norm_k(k)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]

        def rotate(y: Tensor) -> Tensor:
            pairs = torch.view_as_complex(y.double().unflatten(-1, (HEADS, -1, 2)).contiguous())
            return torch.view_as_real(pairs * turn).flatten(-2).float()

        self.k = torch.cat([self.k, rotate(k)], dim=1)
        self.v = torch.cat([self.v, v.unflatten(-1, (HEADS, -1))], dim=1)
        overflow = max(0, self.k.shape[1] - WINDOW)
        if overflow:
            self.k, self.v = (torch.cat([y[:, :SINK], y[:, SINK + overflow :]], dim=1) for y in (self.k, self.v))
        heads = (y.transpose(1, 2) for y in (rotate(q), self.k, self.v))
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class RingAttention:
    """The same with three calls."""

    def __init__(self, weights: Weights, layout: str) -> None:
        self.weights, self.layout, self.ring = weights, layout, KVRing(WINDOW, SINK)
        self.caches = lingbot.allocate_cache(
            1, WINDOW, HEADS, HEAD_DIM, dtype=torch.float32, device="cpu", layout=layout
        )

    def __call__(self, x: Tensor, table: Tensor, start_frame: int) -> Tensor:
        weights = self.weights
        q, k, v = weights.qkv(x).chunk(3, dim=-1)  # strided views: never made contiguous
        with lingbot.placed_chunk(self.ring, start_frame * FRAME, x.shape[1]) as position:
            q = lingbot.norm_rope_write(
                q, k, v, weights.norm_q.weight, weights.norm_k.weight, table, *self.caches, position, EPS,
                layout=self.layout,
            )  # fmt: skip
            return lingbot.attend(q, *self.caches, position, layout=self.layout)


@torch.no_grad()
def main() -> None:
    worst = 0.0
    for layout in lingbot.LAYOUTS:
        for name, make_table in FORMATS.items():
            torch.manual_seed(0)
            weights = Weights()
            by_hand, ours = RolledAttention(weights), RingAttention(weights, layout)
            for chunk in range(6):
                x, angles = torch.randn(1, FRAMES * FRAME, DIM), engine_angles(FRAMES * chunk)
                want = by_hand(x, angles)
                got = ours(x, make_table(angles), FRAMES * chunk)
                difference = ((got - want).norm() / want.norm()).item()
                worst = max(worst, difference)
            print(f"{name:12} {layout}  last chunk differs by {difference:.1e}")
    if not worst < 1e-5:
        raise SystemExit(f"largest difference {worst:.1e}, must be under 1e-5")


if __name__ == "__main__":
    main()
