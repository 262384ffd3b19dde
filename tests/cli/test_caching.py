"""`bench caching`: the variants are what they are called, and a wrong bit fails."""

from __future__ import annotations

import json

import pytest
import torch
from small_video import SMALL

from lingbot_kernels.commands import caching
from lingbot_kernels.commands._options import SessionOptions

NAMES = [
    None,
    "RoPE cache",
    "time-embedding cache",
    "camera cache",
    "text K/V cache",
    "update_cache_only",
    "all of them",
]


@pytest.mark.parametrize("interleave", ["auto", "rollout"])
def test_rows(interleave, invoke, tmp_path):
    arguments = (
        "--window-frames",
        6,
        "--chunks",
        3,
        "--repeats",
        2,
        "--interleave",
        interleave,
        "--json",
        "caching.json",
    )
    output = invoke("bench", "caching", *SMALL, *arguments).output
    report = json.loads((tmp_path / "caching.json").read_text())
    assert list(report) == ["environment", "device", "model", "settings", "steady_chunks", "bit_identical", "rows"]
    assert report["bit_identical"] is True and report["steady_chunks"] == [1, 2]
    assert report["settings"]["interleave"] == ("chunk" if interleave == "auto" else "rollout")
    assert [row["off"] for row in report["rows"]] == NAMES
    whole, *others = report["rows"]
    assert whole["saved"] == {}
    for row in others:
        assert row["bit_identical"] is True and row["off"] in output
        for name in caching.TIMES:
            assert row[name]["p20"] <= row[name]["p50"] <= row[name]["p80"]
            assert row["saved"][name]["share"] == pytest.approx(row["saved"][name]["ms"] / row[name]["p50"])
    assert [row["cache_bytes"] is not None for row in report["rows"]] == [False, True, True, True, True, False, False]
    assert report["rows"][3]["cache_bytes"] == 3 * 2 * 12 * 128 * 4


def small_bench(chunks=3):
    return caching.CachingBench(SessionOptions(device="cpu", height=32, width=32), chunks)


def test_each_variant_switches_off_what_it_says():
    """Counted in misses and in calls, not in time."""
    bench = small_bench()
    misses, heads = {}, {}
    for variant in caching.VARIANTS:
        calls = []
        handle = bench.model.head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        session = bench.begin(variant)
        for inputs in bench.inputs():
            session.denoise(inputs, bench.text)
        handle.remove()
        stats = session.state.stats()
        misses[variant.off] = {name: stats[name]["misses"] for name in stats if "misses" in str(stats[name])}
        heads[variant.off] = len(calls)
        kept = {name: stats[name]["bytes"] for name in misses[variant.off]}
        assert variant.store is None or kept[variant.store] == 0
    base = {"rope": 3, "time_embeddings": 5, "camera_modulation": 3, "text": 1}
    assert misses[None] == misses["update_cache_only"] == base
    for variant in caching.VARIANTS:
        if variant.store is not None:
            assert misses[variant.off] == {**base, variant.store: 15}
    assert set(misses["all of them"].values()) == {15}
    # A context update with update_cache_only never reaches the head.
    assert {name: count for name, count in heads.items() if count != 12} == {"update_cache_only": 15, "all of them": 15}


@pytest.mark.parametrize("order", ["by_chunk", "by_rollout"])
def test_a_wrong_bit_is_seen_and_fails(order, invoke, monkeypatch):
    bench = small_bench(2)
    begin = bench.begin

    def begin_wrongly(variant):
        session = begin(variant)
        if variant.off == "text K/V cache":
            denoise = session.denoise
            session.denoise = lambda inputs, text: torch.nextafter(denoise(inputs, text), torch.tensor(9.0))
        return session

    monkeypatch.setattr(bench, "begin", begin_wrongly)
    getattr(bench, order)(0)
    assert bench.identical == [name != "text K/V cache" for name in NAMES]

    monkeypatch.setattr(caching, "CachingBench", lambda *_: bench)
    interleave = order.removeprefix("by_")
    result = invoke("bench", "caching", *SMALL, "--chunks", 2, "--repeats", 1, "--interleave", interleave, code=1)
    assert "the latents differ without: text K/V cache" in result.output and " NO" in result.output


def test_the_order_rotates_and_memory_decides():
    assert [caching.rotated(3, turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert caching.pick_interleave(100, 7, 1400) == "chunk"
    assert caching.pick_interleave(100, 7, 1399) == "rollout"


def test_savings_are_paired():
    saved = caching.savings([1, 10, 100], [2, 12, 103])
    assert saved == {"ms": 2, "share": pytest.approx(2 / 12)}
