"""`doctor`: says what serves each op here, and why the others can't."""

from __future__ import annotations

import json
import platform
import sys

import pytest
import torch

from lingbot_kernels.benchmarks import environment, tables
from lingbot_kernels.ops import _native, windowed_attention
from lingbot_kernels.ops._dispatch import BACKENDS, OPS, resolve, why_not


def test_json_has_the_environment_and_every_op(invoke):
    report = json.loads(invoke("doctor", "--json").output)
    found = report["environment"]
    assert found["python"] == platform.python_version() and found["torch"] == torch.__version__
    assert (found["core"] is None) == (_native.core() is None) == (found["core_missing"] is not None)
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (report["dtype"], report["requested"]) == ("bfloat16", "auto")
    assert set(report["ops"]) == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
    for device, rows in report["ops"].items():
        assert list(rows) == list(OPS)
        for op, row in rows.items():
            assert row["backend"] is not None and row["error"] is None
            if op not in ("windowed_attention", "linear_gelu"):
                assert row["backend"] == resolve(op, None, device, torch.bfloat16, 4680, 5120)
                others = [name for name in BACKENDS if name != row["backend"]]
                assert row["others"] == {name: why_not(op, name, device, torch.bfloat16) for name in others}
    assert report["ops"]["cpu"]["windowed_attention"]["backend"] == "sdpa"
    assert "CUDA tensors" in report["ops"]["cpu"]["windowed_attention"]["others"]["fa4"]


def test_text_names_every_op_and_every_reason(invoke):
    output = " ".join(invoke("doctor").output.split())
    for op in OPS:
        assert op in output
    in_triton = sum("triton" not in homes.absent for homes in OPS.values())
    assert f"triton ({in_triton} ops): serves CUDA tensors, not cpu" in output
    assert "cuda (linear_gelu): matrix products are left to a library" in output
    for name in ("python", "torch", "driver", "cuDNN", "triton", "flash-attn-4", "compiled core"):
        assert name in output


def test_without_the_compiled_core_it_says_so(invoke, monkeypatch):
    from lingbot_kernels.ops import _dispatch

    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_missing", "the compiled core is not importable (gone)")
    _dispatch._resolve.cache_clear()
    try:
        text, report = invoke("doctor").output, json.loads(invoke("doctor", "--json").output)
    finally:
        _dispatch._resolve.cache_clear()
    assert "compiled core    no: the compiled core is not importable (gone)" in text
    row = report["ops"]["cpu"]["rms_norm"]
    assert row["backend"] == "reference" and "not importable (gone)" in row["others"]["cpu"]


def test_a_backend_that_was_asked_for_and_cannot_serve_is_an_answer(invoke, monkeypatch):
    monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", "cuda")
    report = json.loads(invoke("doctor", "--json").output)
    row = report["ops"]["cpu"]["rms_norm"]
    assert row["backend"] is None and "serves CUDA tensors" in row["error"] and row["others"]["reference"] is None
    assert "nothing" in invoke("doctor").output
    monkeypatch.setenv("LINGBOT_KERNELS_BACKEND", "cudda")
    assert "LINGBOT_KERNELS_BACKEND" in invoke("doctor", code=2).output


def test_float64_is_the_reference_s(invoke):
    report = json.loads(invoke("doctor", "--json", "--dtype", "float64").output)
    served = {op: row["backend"] for op, row in report["ops"]["cpu"].items()}
    assert served["qk_norm_rope_kv_write"] == "reference" and served["windowed_attention"] == "sdpa"
    assert "not float64" in report["ops"]["cpu"]["rms_norm"]["others"]["cpu"]


def test_commit_is_none_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("LINGBOT_KERNELS_COMMIT", raising=False)
    assert environment.commit_of(tmp_path) is None


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (86016, "86.0 kB"), (3.7e9, "3.7 GB")])
def test_bytes_text(count, text):
    assert tables.bytes_text(count) == text


def test_attention_reasons_come_from_the_attention_op():
    module = sys.modules["lingbot_kernels.ops.windowed_attention"]
    assert callable(windowed_attention) and module.why_not("cudnn", "cpu", torch.bfloat16, 128) is not None


def test_it_says_what_networks_take(invoke, tmp_path):
    from lingbot_kernels import CausalLingBotTransformer, Int8Recipe, LingBotConfig

    model = CausalLingBotTransformer(LingBotConfig.preset("tiny"), dtype=torch.bfloat16)
    model.quantize(Int8Recipe(products=("qkv", "ffn_up"), leave_out=("blocks.1",)))
    folder = tmp_path / "world"
    model.save_pretrained(folder)
    found = json.loads(invoke("doctor", "--checkpoint", str(folder), "--json").output)["networks"]
    (row,) = found["world"]
    assert (row["precision"], row["int8_products"], row["left_out"]) == ("int8", ["qkv", "ffn_up"], ["blocks.1"])
    assert row["weights"] == sum(x.nbytes for x in model.parameters())
    plain, int8, attention = found["lingbot-world-14b"]
    assert int8["weights"] < 0.7 * plain["weights"] and int8["precision"] == "int8"
    assert attention["precision"] == "int8_qk" and attention["weights"] == int8["weights"]
    assert [x["int8_attention"] for x in (row, plain, int8, attention)] == [False, False, False, True]
    assert attention["session"] < int8["session"] - 4.5 * 2**30
    text = " ".join(invoke("doctor", "--checkpoint", str(folder)).output.split())
    assert (
        "attention's Q and K" in text
        and "qkv, ffn_up but blocks.1" in text
        and "lingbot-world-14b bfloat16 34.5" in text
    )
    (folder / "config.json").write_text("{")
    assert "config.json" in invoke("doctor", "--checkpoint", str(folder), code=2).output
