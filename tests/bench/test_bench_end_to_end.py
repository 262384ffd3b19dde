"""`bench end-to-end` on tiny parts: rows of every kind, the gates, and two ranks that give one rank's frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers", reason="needs lingbot-kernels[pipeline]")
pytest.importorskip("transformers", reason="needs lingbot-kernels[pipeline]")

from lingbot_kernels.benchmarks import decoder
from lingbot_kernels.benchmarks.rows import read_rows
from lingbot_kernels.cli import main
from lingbot_kernels.decoding import DecoderStream

SMALL = ["--preset", "tiny", "--height", "32", "--width", "48", "--device", "cpu"]


def bench(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", "end-to-end", *SMALL, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_rows_of_every_kind(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench("--layers", 1, "--chunks", 2, "--json", path)
    rows = read_rows(path)
    assert [(row["op"], row["backend"]) for row in rows[:3]] == [
        ("decode_chunk", "diffusers"), ("decode_chunk", "lingbot_kernels"), ("decode_chunk", "lingbot_kernels 1/2"),
    ]  # fmt: skip
    case = "tiny-1layers-32x48-1gpu"
    assert [(row["op"], row["case"]) for row in rows[3:]] == [
        ("encode_prompt", f"{case}-64tokens"),
    ] + [
        (op, f"{case}-{suffix}")
        for order in ("after", "beside")
        for op, suffix in (
            ("key_to_frame", f"sustained-{order}"),
            ("key_to_frame", f"idle-{order}"),
            ("frames_per_second", order),
        )
    ]
    for row in rows:
        assert row["bench"] == "end_to_end" and row["gate"] == "green" and row["precision"]
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["op"] == "encode_prompt" or row["ratio"] == pytest.approx(
            row["p50_us"] / row["ceiling_us"], rel=1e-3
        )
    assert rows[0]["peer"] and rows[0]["ratio"] == 1
    assert "dB against float32" in rows[1]["note"] and rows[1]["error"] < 1e-5
    rate = float(rows[-1]["note"].split()[0])
    assert rate == pytest.approx(12 / (rows[-1]["p50_us"] / 1e6), rel=1e-2)
    assert all(f"{phase} 0." in rows[-1]["note"] for phase in ("denoise", "decode", "context"))


def test_int8_rows_say_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench("--layers", 1, "--chunks", 1, "--context", "after", "--no-decoder", "--precision", "int8", "--json", path)
    assert [(row["op"], row["precision"]) for row in read_rows(path)] == [
        ("encode_prompt", "int8"), ("key_to_frame", "int8"), ("key_to_frame", "int8"), ("frames_per_second", "int8"),
    ]  # fmt: skip


def test_a_decoder_whose_bits_depend_on_the_cut_has_no_times(tmp_path, monkeypatch):
    decode = DecoderStream.decode

    def careless(self, latents):
        return decode(self, latents) + 1e-6 * latents.shape[2]

    monkeypatch.setattr(DecoderStream, "decode", careless)
    path = tmp_path / "rows.jsonl"
    bench("--decoder-only", "--json", path, code=1)
    (row,) = read_rows(path)
    assert row["gate"] == "red" and row["p50_us"] is None and "cut of the stream changes bits" in row["note"]


def test_a_decoder_that_is_off_has_no_times(tmp_path, monkeypatch):
    decode = DecoderStream.decode
    monkeypatch.setattr(DecoderStream, "decode", lambda self, latents: decode(self, latents) * 1.01)
    path = tmp_path / "rows.jsonl"
    bench("--decoder-only", "--json", path, code=1)
    (row,) = read_rows(path)
    assert row["gate"] == "red" and row["p50_us"] is None and float(row["note"].split()[0]) < 60


def test_decibel_is_of_the_worst_frame():
    want = torch.zeros(2, 4, 4, 3)
    got = want.clone()
    got[1] += 0.02
    assert decoder.decibel(got, want) == pytest.approx(40.0)


def test_both_switches_at_once_are_refused():
    assert "exclude each other" in bench("--decoder-only", "--no-decoder", code=2)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lingbot_kernels",
        "bench", "end-to-end", *SMALL, "--layers", "1", "--chunks", "2", "--no-decoder", "--json", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = read_rows(path)
    assert len(rows) == 7 and all(row["gate"] == "green" and "2gpu" in row["case"] for row in rows)
