"""The shapes that the kernel bench runs: shards of a chunk of the 14B and the 1.3B model at 480p, and one for CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FRAMES_PER_CHUNK = 3
WINDOW_FRAMES = 18
SINK_FRAMES = 3
TEXT_KEYS = 512


@dataclass(frozen=True)
class KernelCase:
    """One shape.

    Attributes:
        name: as in the rows, `s<tokens>-d<dim>`, with a suffix for what is special about it.
        rows, columns: tokens of a frame.
        heads, head_dim: of the whole model; dim = heads * head_dim.
        ffn_dim: hidden width of the MLP.
        ranks: sequence shards of a chunk; a shard's tokens are what the ops are given.
        wrap: the chunk's slots run over the end of the ring; only ops that write the ring are measured.
        residual_float32: the residual ops are measured with a float32 stream too.
    """

    name: str
    rows: int
    columns: int
    heads: int
    head_dim: int
    ffn_dim: int
    ranks: int = 1
    wrap: bool = False
    residual_float32: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def chunk_tokens(self) -> int:
        return FRAMES_PER_CHUNK * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Tokens of one shard, the first (and largest) one."""
        return -(-self.chunk_tokens // self.ranks)

    @property
    def token_start(self) -> int:
        """Absolute index of the chunk's first token: the window has just filled."""
        return WINDOW_FRAMES * self.frame_tokens

    def ring_start(self, tokens: int, capacity: int, sink: int) -> int:
        """Ring position of a chunk of `tokens` tokens: right after the sink, or half of it over the end."""
        return capacity - tokens // 2 if self.wrap else sink


_14B: dict[str, Any] = {"heads": 40, "head_dim": 128, "ffn_dim": 13824}
_1_3B: dict[str, Any] = {"heads": 12, "head_dim": 128, "ffn_dim": 8960}

KERNEL_CASES: dict[str, KernelCase] = {
    case.name: case
    for case in (
        KernelCase("s4524-d5120", 29, 52, **_14B, residual_float32=True),
        KernelCase("s4680-d5120", 30, 52, **_14B),
        KernelCase("s2262-d5120", 29, 52, **_14B, ranks=2),
        KernelCase("s1131-d5120", 29, 52, **_14B, ranks=4),
        KernelCase("s4680-d1536", 30, 52, **_1_3B, residual_float32=True),
        KernelCase("s4524-d5120-wrap", 29, 52, **_14B, wrap=True),
        KernelCase("s780-d1536", 13, 20, **_1_3B, residual_float32=True),
        KernelCase("s780-d1536-wrap", 13, 20, **_1_3B, wrap=True),
        KernelCase("s192-d512", 8, 8, heads=4, head_dim=128, ffn_dim=1024, residual_float32=True),
        KernelCase("s192-d512-wrap", 8, 8, heads=4, head_dim=128, ffn_dim=1024, wrap=True),
    )
}
HEADLINE = "s4524-d5120"
_DEFAULT = {
    ("cuda", False): (
        "s4524-d5120", "s4680-d5120", "s2262-d5120", "s1131-d5120", "s4680-d1536", "s4524-d5120-wrap",
    ),
    ("cuda", True): ("s4524-d5120", "s1131-d5120"),
    ("cpu", False): ("s780-d1536", "s780-d1536-wrap"),
    ("cpu", True): ("s192-d512", "s192-d512-wrap"),
}  # fmt: skip


def default_kernel_cases(device_type: str, quick: bool) -> tuple[str, ...]:
    """Names of the cases measured where none are asked for."""
    return _DEFAULT[device_type, quick]
