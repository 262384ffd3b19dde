"""Measured winners on CUDA: which of the two kernel backends, or attention libraries, `auto` takes for a shape.

`lingbot-kernels bench kernels --update-winners` regenerates the table below from its rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Winners:
    """`default` unless a rule (op, least tokens, least dim, backend) applies; of those that apply the last one
    counts.
    """

    default: str
    rules: tuple[tuple[str, int, int, str], ...] = ()

    def pick(self, op: str, tokens: int, dim: int) -> str:
        chosen = self.default
        for rule_op, least_tokens, least_dim, backend in self.rules:
            if rule_op == op and tokens >= least_tokens and dim >= least_dim:
                chosen = backend
        return chosen


@dataclass(frozen=True)
class AttentionWinners:
    """The library of a rule (least queries, least keys, least dim, library) that applies; of several the last one
    counts.
    """

    rules: tuple[tuple[int, int, int, str], ...] = ()

    def pick(self, queries: int, keys: int, dim: int) -> str | None:
        """None where nothing was measured that says otherwise than the usual order."""
        chosen = None
        for least_queries, least_keys, least_dim, library in self.rules:
            if queries >= least_queries and keys >= least_keys and dim >= least_dim:
                chosen = library
        return chosen


# Begin of the measured table.
# NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0, commit a01237aa9532.
CUDA_WINNERS = Winners(
    default="cuda",
    rules=(
        ("layer_norm_modulate", 4524, 5120, "triton"),
        ("layer_norm_modulate", 4680, 1536, "triton"),
        ("qkv_unpack_kv_write", 0, 0, "triton"),
        ("residual_norm_modulate", 0, 0, "triton"),
        ("rms_norm", 0, 0, "triton"),
    ),
)
ATTENTION_WINNERS = AttentionWinners()
# End of the measured table.
