"""What int8 costs: the fidelity gate on small networks, and the report that says whether to use it."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lingbot_kernels import Int8Recipe, LingBotConfig
from lingbot_kernels.benchmarks import quality
from lingbot_kernels.benchmarks.quality import QualityBench, QualityPlan, choose, judge, psnr_db
from lingbot_kernels.benchmarks.random_weights import fill_weights
from lingbot_kernels.benchmarks.replaced_layers import E4M3, Fp8Linear, WideLinear, e4m3_rows, layer_names, replaced
from lingbot_kernels.benchmarks.scene import Scene
from lingbot_kernels.cli import main
from lingbot_kernels.commands._options import SessionOptions
from lingbot_kernels.commands.session import make_scene
from lingbot_kernels.models.fused_linear import FusedLinear
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.ops import BACKENDS  # noqa: F401  (the ops are registered)

WIDER = {"dim": 256, "num_heads": 4, "ffn_dim": 512, "window_frames": 9}
CHUNKS = 6  # from the fourth on, each evicts


def make_quality_scene(monkeypatch: pytest.MonkeyPatch, weights: str, chunks: int = CHUNKS) -> Scene:
    """`tiny` widened, bfloat16, on a small grid."""
    own = LingBotConfig.preset

    def wider(name: str, **changes: Any) -> LingBotConfig:
        return own(name, **{**WIDER, **changes})

    monkeypatch.setattr(LingBotConfig, "preset", staticmethod(wider))
    scene = make_scene(SessionOptions(device="cpu", dtype="bfloat16", height=64, width=96), chunks)
    fill_weights(scene.model, weights)
    return scene


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """The whole report of a plain and a loud network."""
    with pytest.MonkeyPatch.context() as patch:
        return {
            weights: QualityBench(
                make_quality_scene(patch, weights), QualityPlan(weights, Int8Recipe(), CHUNKS, min_psnr=62.5)
            ).run()
            for weights in ("plain", "loud")
        }


def worst(report: dict[str, Any], precision: str) -> float:
    return min(report["teacher_forced"][precision]["psnr_db"])


@pytest.mark.parametrize("weights", ["plain", "loud"])
def test_the_fidelity_gate(reports: dict[str, dict[str, Any]], weights: str) -> None:
    """int8 lies well above fp8 on the same products and not far below bfloat16; loud channels cost it little."""
    report = reports[weights]
    assert worst(report, "int8") >= worst(report, "fp8") + 8
    assert worst(report, "int8") >= worst(report, "bfloat16") - (6 if weights == "plain" else 7)
    if weights == "loud":
        assert worst(report, "int8") >= worst(report, "int8_plain") + 2  # what the rotation is for
    qk = report["teacher_forced"]["int8_qk"]["psnr_db"]
    assert qk != report["teacher_forced"]["int8"]["psnr_db"] and min(qk) >= worst(report, "int8") - 1
    drift = report["free_rollout"]
    assert abs(drift["int8"]["psnr_db"][-1] - report["teacher_forced"]["int8"]["psnr_db"][-1]) < 3


def test_what_the_report_holds(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["loud"]
    assert list(report["teacher_forced"]) == ["bfloat16", "int8", "int8_plain", "fp8", "int8_qk"]
    assert all(len(found["psnr_db"]) == CHUNKS for found in report["teacher_forced"].values())
    assert list(report["by_product"]) == list(Int8Recipe().products) and list(report["by_block"])[-1] == "blocks.2"
    whole = math.sqrt(sum(error**2 for error in report["by_product"].values()))
    assert whole == pytest.approx(math.sqrt(sum(error**2 for error in report["by_block"].values())), rel=0.3)
    assert report["memory"]["int8"]["weights"] < report["memory"]["bfloat16"]["weights"]
    assert report["memory"]["int8_qk"]["session"] < report["memory"]["int8"]["session"]
    assert report["step_ms"] is None
    json.dumps(report)
    rows = quality.bench_rows(report)
    assert [(row["op"], row["precision"]) for row in rows] == [
        *(("teacher_forced", name) for name in ("bfloat16", "int8", "int8_plain", "fp8", "int8_qk")),
        ("free_rollout", "bfloat16"),
        ("free_rollout", "int8"),
        ("free_rollout", "int8_qk"),
    ]
    assert rows[1]["case"] == f"tiny-loud-3layers-{CHUNKS}chunks-s72" and len(rows[1]["psnr_db"]) == CHUNKS


def test_what_is_left_out_is_measured(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["loud"]
    chosen = report["leave_out"]
    assert worst(report, "int8") < 62.5 <= chosen["predicted_db"]
    assert chosen["names"] and abs(chosen["measured_db"] - chosen["predicted_db"]) < 1.5
    Int8Recipe(leave_out=tuple(chosen["names"])).check(3, camera=True)


def test_the_model_ends_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_quality_scene(monkeypatch, "plain", 1)
    before = {name: x.clone() for name, x in scene.model.state_dict().items()}
    kinds = [type(module) for module in scene.model.modules()]
    QualityBench(scene, QualityPlan("plain", Int8Recipe(), 1)).run()
    after = scene.model.state_dict()
    assert after.keys() == before.keys() and kinds == [type(module) for module in scene.model.modules()]
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())


def fake(int8: float, bfloat16: float = 60.0, fp8: float = 40.0, **settings: Any) -> dict[str, Any]:
    forced = {"bfloat16": bfloat16, "int8": int8, "int8_plain": int8 - 1, "fp8": fp8}
    return {
        "model": {"weights": "checkpoint"},
        "settings": {"min_psnr": None, **settings},
        "teacher_forced": {name: {"psnr_db": [value + 1, value]} for name, value in forced.items()},
        "by_block": {"blocks.0": 0.1, "blocks.1": 0.1},
        "by_product": {"qkv": 0.01, "ffn_down": 0.1},
    }


def test_verdicts() -> None:
    assert judge(fake(54.0)) == (True, "Use int8: the worst chunk has 54.0 dB, 6.0 below bfloat16 and 14.0 above fp8.")
    good, said = judge(fake(52.0))
    assert not good and "8.0 below bfloat16" in said and "must be at most 7 below" in said
    wanted = fake(54.0, min_psnr=57.0)
    wanted["leave_out"] = {"names": ["blocks.0.ffn_down"], "predicted_db": 57.5, "measured_db": 57.2}
    assert judge(wanted)[1].startswith("Use int8 with leave_out=blocks.0.ffn_down: 57.2 dB")
    wanted["leave_out"]["measured_db"] = 56.0
    assert judge(wanted)[0] is False


def test_choices() -> None:
    recipe = Int8Recipe(products=("qkv", "ffn_down"))
    names, predicted = choose(fake(54.0), recipe, 2, 53.0)
    assert names == [] and predicted == pytest.approx(54.0)
    names, predicted = choose(fake(54.0), recipe, 2, 55.5)
    assert names == ["blocks.0.ffn_down"] and 55.5 <= predicted < 57.1
    names, predicted = choose(fake(54.0), recipe, 2, 70.0)
    assert names == ["blocks.0", "blocks.1"] and predicted == pytest.approx(60.0)  # bfloat16 itself has no more


def test_psnr() -> None:
    want = torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert psnr_db(want, want) == math.inf
    assert psnr_db(want + 0.4, want) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(want * float("nan"), want) == -math.inf


def test_stand_ins() -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.one, model.fused = torch.nn.Linear(200, 32).bfloat16(), FusedLinear(200, 16, ("a", "b")).bfloat16()
    x = torch.randn(2, 5, 200).bfloat16()
    one, (a, b) = model.one(x), model.fused("a", "b", x=x)
    with replaced(model, ("one", "fused"), WideLinear):
        wide = x.float()
        exact = torch.nn.functional.linear(wide, model.one.layer.weight.float(), model.one.layer.bias.float())
        assert torch.equal(model.one(wide), exact) and model.one(wide).dtype == torch.float32
        torch.testing.assert_close(model.fused("b", x=wide)[0], b.float(), rtol=0.02, atol=0.02)
    with replaced(model, ("one", "fused"), Fp8Linear):
        error = (model.one(x) - one).float().norm() / one.float().norm()
        assert 0.01 < error < 0.06
        assert [y.shape for y in model.fused("a", "b", x=x)] == [a.shape, b.shape]
    assert torch.equal(model.one(x), one)
    codes, scale = e4m3_rows(torch.tensor([[448.0, -1.0], [0.0, 0.0]]))
    assert codes.dtype == E4M3 and scale[0] == 1 and codes[1].float().eq(0).all()


def test_loud_weights_are_loud_and_the_same_again() -> None:
    cfg = LingBotConfig.preset("tiny", dim=512, num_heads=4, ffn_dim=1000)
    model, again = CausalLingBotTransformer(cfg), CausalLingBotTransformer(cfg)
    plain = copy.deepcopy(model)
    for one, kind in ((model, "loud"), (again, "loud"), (plain, "plain")):
        fill_weights(one, kind, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    block, quiet = model.blocks[1], plain.blocks[1]
    assert int((block.norm3.weight == 20).sum()) == int((block.modulation[0, 1] == 19).sum()) == 2  # 0.3% of 512
    _, k, v = block.self_attn.qkv.bias.chunk(3)
    assert 1.8 < float(k.detach().std()) < 2.2 and 1.35 < float(v.detach().std()) < 1.65
    assert int((block.ffn[0].bias > quiet.ffn[0].bias + 1.9).sum()) == 100
    with pytest.raises(ValueError, match="kind: got 'noisy', must be one of plain, loud"):
        fill_weights(model, "noisy")


def test_the_command(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    small = ["--preset", "tiny", "--device", "cpu", "--height", "32", "--width", "64", "--chunks", "2", "--layers", "2"]
    files = ["--json", str(tmp_path / "q.json"), "--plot", str(tmp_path / "q.png"), "--rows", str(tmp_path / "q.jsonl")]
    result = CliRunner().invoke(main, ["quality", *small, *files, "--quiet"])
    assert result.exit_code in (0, 1), result.output
    report = json.loads((tmp_path / "q.json").read_text())
    assert result.exit_code == (0 if report["good"] else 1) and report["verdict"] in result.output.replace("\n", " ")
    assert "fp8, a scale a row" in result.output and report["model"]["weights"] == "loud"
    assert (tmp_path / "q.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--leave-out", "blocks.9"], "must name one of the network's 3 blocks"),
        (["--leave-out", "head"], "must be 'blocks.<index>'"),
        (["--weights", "noisy"], "'noisy' is not one of"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["quality", "--preset", "tiny", "--device", "cpu", *options])
    assert result.exit_code == 2 and message in result.output.replace("\n", " ").replace("│ ", "")


def test_layer_names() -> None:
    names = layer_names(2, Int8Recipe(leave_out=("blocks.0",)))
    assert names[0] == "blocks.1.self_attn.qkv" and len(names) == 6
    assert len(layer_names(1)) == 10 and len(layer_names(1, camera=False)) == 6
