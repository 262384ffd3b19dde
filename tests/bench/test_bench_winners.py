"""The table of winners: decided by margin, written between its markers, the same for the same rows."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from lingbot_kernels.benchmarks import winners
from lingbot_kernels.ops import _winners
from lingbot_kernels.ops._winners import AttentionWinners, Winners


def row(op, tokens, dim, backend, p50_us, case=None, **more):
    return {
        "bench": "kernels", "case": case or f"s{tokens}-d{dim}", "op": op, "backend": backend, "gpu": "GPU A",
        "driver": "1", "torch": "2.11", "triton": "3.6", "commit": "abc", "p20_us": p50_us, "p50_us": p50_us,
        "p80_us": p50_us, "bytes": 1, "ceiling_us": 1.0, "ratio": p50_us, "gate": "green", "tokens": tokens,
        "dim": dim, "peer": False, "date": "2026-01-01", **more,
    }  # fmt: skip


def both(op, tokens, dim, cuda, triton, **more):
    return [row(op, tokens, dim, "cuda", cuda, **more), row(op, tokens, dim, "triton", triton, **more)]


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "_winners.py"
    path.write_text(Path(_winners.__file__).read_text())
    return path


def loaded(path: Path, name: str = "CUDA_WINNERS"):
    """A table that a file holds."""
    spec = importlib.util.spec_from_file_location("regenerated_winners", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return getattr(module, name)


def test_default_is_the_backend_that_wins_most():
    measured = {("a", 1, 1): 1.1, ("b", 1, 1): 1.2, ("c", 1, 1): 0.9}
    assert winners.decide(measured) == Winners("cuda", (("c", 0, 0, "triton"),))
    flipped = {shape: 1 / ratio for shape, ratio in measured.items()}
    assert winners.decide(flipped) == Winners("triton", (("c", 0, 0, "cuda"),))


def test_no_rule_within_the_margin():
    assert winners.decide({("a", 1, 1): 0.985, ("b", 1, 1): 1.5}) == Winners("cuda")
    assert winners.decide({("a", 1, 1): 0.975, ("b", 1, 1): 1.5}).rules == (("a", 0, 0, "triton"),)


def test_one_rule_where_an_ops_shapes_agree_but_for_undecided_ones():
    measured = {("a", 1000, 5120): 0.9, ("a", 4000, 5120): 1.01, ("a", 4000, 1536): 0.8, ("b", 1, 1): 2.0,
                ("c", 1, 1): 2.0}  # fmt: skip
    assert winners.decide(measured).rules == (("a", 0, 0, "triton"),)


def test_every_decided_shape_gets_its_winner():
    shapes = [("a", tokens, dim) for tokens in (1131, 2262, 4680) for dim in (1536, 5120)]
    for pattern in itertools.product([0.8, 1.0, 1.25], repeat=len(shapes)):
        measured = {**dict(zip(shapes, pattern, strict=True)), ("b", 1, 1): 2.0}
        decided = winners.decide(measured)
        for shape, ratio in measured.items():
            if ratio != 1.0:
                assert decided.pick(*shape) == ("cuda" if ratio > 1 else "triton"), (decided, shape)
        assert len(decided.rules) <= len(measured)


def test_update_rewrites_the_table_and_nothing_else(table):
    before = table.read_text()
    rows = both("rms_norm", 4524, 5120, 10.0, 8.0) + both("gated_residual", 4524, 5120, 10.0, 20.0) * 2
    rows += both("layer_norm_modulate", 4524, 5120, 10.0, 12.0)
    assert winners.update(rows, table) == (Winners("cuda", (("rms_norm", 0, 0, "triton"),)), AttentionWinners())
    after = table.read_text()
    assert loaded(table).pick("rms_norm", 7, 7) == "triton"
    assert loaded(table).pick("gated_residual", 4524, 5120) == "cuda"
    assert "GPU A, torch 2.11, triton 3.6, commit abc" in after
    assert after.split(winners.BEGIN)[0] == before.split(winners.BEGIN)[0]
    assert after.split(winners.END)[1] == before.split(winners.END)[1]
    winners.update(list(reversed(rows)), table)
    assert table.read_text() == after


def test_update_is_formatted_as_ruff_would(table):
    rows = both("a", 10, 10, 1.0, 3.0) + both("b", 10, 10, 1.0, 3.0) + both("c", 10, 10, 3.0, 1.0)
    winners.update(rows, table)
    lines = table.read_text().splitlines()
    assert '        ("c", 0, 0, "triton"),' in lines
    assert '    default="cuda",' in lines


def test_rows_that_decide_nothing_are_left_out():
    rows = both("a", 1, 1, 1.0, 2.0)
    rows += both("b", 1, 1, 2.0, 1.0, gate="red")
    rows += [row("c", 1, 1, "triton", 1.0), row("d", 1, 1, "reference", 1.0)]
    assert winners.ratios(rows) == {("a", 1, 1): 2.0}


def test_the_last_measurement_counts_and_variants_enter_as_a_mean():
    rows = both("a", 1, 1, 1.0, 9.0) + both("a", 1, 1, 1.0, 2.0) + both("a", 1, 1, 1.0, 8.0, case="s1-d1-wrap")
    assert winners.ratios(rows) == pytest.approx({("a", 1, 1): 4.0})


def attention(queries, keys, heads, library, p50_us, **more):
    shape = (1, queries, keys, heads, 128)
    return row(
        "windowed_attention", queries, 128 * heads, library, p50_us, f"s{queries}-k{keys}-{heads}", shape=shape,
        dtype="bfloat16", **more,
    )  # fmt: skip


def test_attention_is_decided_by_queries_keys_and_width(table):
    rows = [attention(4524, 512, 40, name, us) for name, us in (("fa4", 115), ("fa3", 124), ("cudnn", 88))]
    rows += [attention(4524, 27144, 40, name, us) for name, us in (("fa4", 3315), ("fa3", 3220), ("cudnn", 4600))]
    rows += [attention(4680, 28080, 12, "fa4", 1123), attention(4680, 28080, 12, "fa3", 1110)]  # within the margin
    rows += [attention(9000, 900, 40, "fa3", 1.0), attention(9000, 900, 40, "fa4", 9.0, gate="red")]  # of one alone
    decided = winners.decide_attention(winners.attention_times(rows))
    assert decided.rules == ((4524, 512, 5120, "cudnn"), (4524, 27144, 5120, "fa3"))
    assert decided.pick(4524, 512, 5120) == "cudnn" and decided.pick(4524, 27144, 5120) == "fa3"
    assert decided.pick(4680, 28080, 1536) is None and decided.pick(1131, 27144, 5120) is None
    assert winners.update([*rows, *both("a", 1, 1, 1.0, 2.0)], table)[1] == decided
    assert loaded(table, "ATTENTION_WINNERS").rules == decided.rules


def test_every_measured_shape_of_attention_gets_a_winner():
    shapes = [(queries, keys, dim) for queries in (1131, 4524) for keys in (512, 27144) for dim in (1536, 5120)]
    for pattern in itertools.product(("fa4", "fa3", "cudnn"), repeat=len(shapes)):
        times = {
            shape: {name: 1.0 if name == best else 2.0 for name in ("fa4", "fa3", "cudnn")}
            for shape, best in zip(shapes, pattern, strict=True)
        }
        decided = winners.decide_attention(times)
        for shape, best in zip(shapes, pattern, strict=True):
            assert (decided.pick(*shape) or "fa4") == best


def test_refusals_leave_the_file_alone(table):
    before = table.read_text()
    with pytest.raises(ValueError, match="nothing to decide"):
        winners.update([row("a", 1, 1, "cuda", 1.0)], table)
    with pytest.raises(ValueError, match="several GPUs"):
        winners.update(both("a", 1, 1, 1.0, 2.0) + both("a", 1, 1, 1.0, 2.0, gpu="GPU B"), table)
    assert table.read_text() == before
    table.write_text("CUDA_WINNERS = None\n")
    with pytest.raises(ValueError, match="must hold the lines"):
        winners.update(both("a", 1, 1, 1.0, 2.0), table)


def test_the_packages_own_table_has_its_markers():
    text = Path(_winners.__file__).read_text()
    assert text.count(winners.BEGIN) == text.count(winners.END) == 1
