"""`bench caching`: the variants are what they are called, and a wrong bit fails."""

from __future__ import annotations

import json

import pytest
import torch
from small_video import SMALL

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig
from lingbot_kernels.benchmarks import caching
from lingbot_kernels.benchmarks.rows import latest, read_rows
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.session import make_scene
from lingbot_kernels.realtime.memory import GIB, session_memory, weights_memory

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
        "--rows",
        "caching.jsonl",
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
    assert report["settings"]["layers"] == "3 of 3"

    rows = read_rows(tmp_path / "caching.jsonl")
    assert [row["op"] for row in rows] == [variant.op for variant in caching.VARIANTS]
    for row, entry in zip(rows, report["rows"], strict=True):
        assert (row["bench"], row["case"], row["gate"]) == ("caching", "tiny-s12-kv24", "green")
        assert row["precision"] == row["dtype"] == "float32"
        assert row["p50_us"] == pytest.approx(1e3 * entry["total_ms"]["p50"], rel=1e-4)
        assert row["ratio"] == pytest.approx(row["p50_us"] / rows[0]["p50_us"], rel=1e-3)
        saved = entry["saved"].get("total_ms", {"ms": 0, "share": 0})
        assert (row["saved_ms"], row["share"]) == (saved["ms"], saved["share"])
        assert row["bytes"] == (entry["cache_bytes"] or 0) and (row["samples"], row["method"]) == (4, "clock")


def test_fewer_layers_are_marked_and_rows_are_appended(invoke, tmp_path):
    arguments = ("--layers", 1, "--window-frames", 6, "--chunks", 2, "--repeats", 1, "--rows", "rows.jsonl")
    for _ in range(2):
        invoke("bench", "caching", *SMALL, *arguments, "--json", "report.json")
    report, rows = json.loads((tmp_path / "report.json").read_text()), read_rows(tmp_path / "rows.jsonl")
    assert report["settings"]["layers"] == "1 of 3" and report["model"]["config"]["num_layers"] == 1
    assert len(rows) == 14 and len(latest(rows)) == 7
    for row in rows:
        assert row["case"] == "tiny-1layers-s12-kv24" and "1 of 3 layers, not extrapolated" in row["note"]


def test_layers_are_a_preset_s(invoke, tmp_path):
    CausalLingBotTransformer(LingBotConfig.preset("tiny")).save_pretrained(tmp_path / "checkpoint")
    result = invoke("bench", "caching", "--checkpoint", "checkpoint", "--layers", 1, code=2)
    assert "--layers and --checkpoint exclude each other" in result.output


def small_bench(chunks=3):
    return caching.CachingBench(make_scene(SessionOptions(device="cpu", height=32, width=32), chunks), chunks)


def test_each_variant_switches_off_what_it_says():
    """Counted in misses and in calls, not in time."""
    bench = small_bench()
    misses, heads = {}, {}
    for variant in caching.VARIANTS:
        calls = []
        handle = bench.scene.model.head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        session = bench.begin(variant)
        for inputs in bench.inputs():
            session.denoise(inputs)
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
def test_a_wrong_bit_is_seen_and_fails(order, invoke, monkeypatch, tmp_path):
    bench = small_bench(2)
    begin = bench.begin

    def begin_wrongly(variant):
        session = begin(variant)
        if variant.off == "text K/V cache":
            denoise = session.denoise
            session.denoise = lambda inputs: torch.nextafter(denoise(inputs), torch.tensor(9.0))
        return session

    monkeypatch.setattr(bench, "begin", begin_wrongly)
    getattr(bench, order)(0)
    assert bench.identical == [name != "text K/V cache" for name in NAMES]

    monkeypatch.setattr(caching, "CachingBench", lambda *_: bench)
    interleave = order.removeprefix("by_")
    arguments = ("--chunks", 2, "--repeats", 1, "--interleave", interleave, "--rows", "rows.jsonl")
    result = invoke("bench", "caching", *SMALL, *arguments, code=1)
    assert "the latents differ without: text K/V cache" in result.output and " NO" in result.output
    row = read_rows(tmp_path / "rows.jsonl")[4]
    assert (row["op"], row["gate"], row["p50_us"]) == ("text_cache", "red", None) and "differ" in row["note"]
    assert "saved_ms" not in row


def test_the_order_rotates_and_memory_decides():
    assert [caching.rotated(3, turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert caching.pick_interleave(75, 8, 800) == "chunk"
    assert caching.pick_interleave(75, 8, 799) == "rollout"


def test_a_session_s_bytes_are_the_plan_s():
    bench = small_bench()
    session = bench.begin(caching.VARIANTS[0])
    session.denoise(next(bench.inputs()))
    assert session.state.nbytes() < bench.session_bytes() < session.state.nbytes() + 2**27


def test_a_wide_model_with_few_layers_fits_a_gpu_of_80_gib():
    """The seven sessions of 8 layers of the 14B model at 464x832 and their weights."""
    cfg = LingBotConfig.preset("lingbot-world-14b", num_layers=8)
    session, weights = session_memory(cfg, (29, 52), torch.bfloat16), weights_memory(cfg, torch.bfloat16)
    free = 78 * GIB - weights.total
    assert caching.pick_interleave(session.total, len(caching.VARIANTS), free) == "chunk"


def test_savings_are_paired():
    saved = caching.savings([1, 10, 100], [2, 12, 103])
    assert saved == {"ms": 2, "share": pytest.approx(2 / 12)}
