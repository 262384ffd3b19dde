"""The command line as a whole: help without torch, version, delegation, and what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_video import SMALL

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig, __version__
from lingbot_kernels.cli import BENCHES, COMMANDS, bench, main
from lingbot_kernels.commands.cases import command as cases_command


def in_new_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


HELP = [
    ["--help"],
    ["bench", "--help"],
    *([name, "--help"] for name in COMMANDS),
    *(["bench", name, "-h"] for name in BENCHES),
]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_does_not_load_torch(arguments):
    program = (
        "import sys\nfrom lingbot_kernels.cli import main\n"
        f"try:\n    main({arguments!r}, prog_name='lingbot-kernels')\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        "assert not {'torch', 'numpy', 'rich'} & sys.modules.keys()"
    )
    done = in_new_process("-c", program)
    assert done.returncode == 0, done.stderr
    assert "sage:" in done.stdout


def test_python_m_is_the_command_line():
    done = in_new_process("-m", "lingbot_kernels", "--version")
    assert (done.returncode, done.stdout) == (0, f"lingbot-kernels, version {__version__}\n")


@pytest.mark.parametrize(("group", "table"), [(main, COMMANDS), (bench, BENCHES)])
def test_each_entry_of_a_table_is_a_command_with_help(group, table, invoke):
    prefix = [] if group is main else ["bench"]
    listed = invoke(*prefix, "--help").output
    for name, (_, line) in table.items():
        assert name in listed and line[:40] in listed
        if name != "cases":
            text = invoke(*prefix, name, "--help").output
            assert "Examples:" in text and ("--json" in text or name == "play")  # which ends with no result


def test_help_groups_options_and_examples_are_valid(invoke):
    text = invoke("rollout", "--help").output
    heads = [
        "Rollout:",
        "Camera and prompt:",
        "Network:",
        "Where and how it runs:",
        "Chunk, window and schedule:",
        "Output:",
    ]
    places = [text.index(f"\n{head}\n") for head in heads]
    assert places == sorted(places)
    known = {option for parameter in main.get_command(None, "rollout").params for option in parameter.opts}  # type: ignore[arg-type]
    for line in text.splitlines():
        if line.strip().startswith("lingbot-kernels rollout"):
            assert {word for word in line.split() if word.startswith("--")} <= known


def test_cases_gets_its_arguments_untouched_and_gives_its_exit_code(invoke, monkeypatch):
    from lingbot_kernels.tools import diffusion_case_parser

    seen = []
    monkeypatch.setattr(diffusion_case_parser, "main", lambda argv: seen.append(argv) or 7)
    arguments = ["--help", "a b", "--", "-x", "--version", "--flag=1", ""]
    invoke("cases", *arguments, code=7)
    assert seen == [arguments]
    assert not cases_command.params


BAD_ARGUMENTS = [
    (["--preset", "huge"], "--preset", "tiny"),
    (["--chunks", "0"], "--chunks", "0"),
    (["--device", "tpu"], "--device", "tpu"),
    (["--device", "meta"], "--device", "must be auto, cpu, cuda"),
    (["--device", "cuda:99"], "--device", "GPUs"),
    (["--height", "40"], "--height", "multiple of 16"),
    (["--dtype", "int8"], "--dtype", "int8"),
    (["--timesteps", "1000,x"], "--timesteps", "1000,x"),
    (["--timesteps", "1200"], "--timesteps", "1200"),
    (["--shift", "-1"], "--shift", "-1"),
    (["--sink-frames", "18"], "--sink-frames", "window_frames"),
    (["--frames-per-chunk", "17"], "--frames-per-chunk", "17"),
    (["--actions", "w+q"], "--actions", "'q'"),
    (["--camera-scale", "far"], "--camera-scale", "far"),
    (["--camera-scale", "0"], "--camera-scale", "positive"),
    (["--poses", "none.npy"], "--poses", "none.npy"),
    (["--poses", "text.npy"], "--poses", "text.npy"),
    (["--poses", "wrong.npy"], "--poses", "[5, 4]"),
    (["--poses", "poses.npy", "--intrinsics", "wrong.npy"], "--intrinsics", "[5, 4]"),
    (["--intrinsics", "poses.npy"], "--intrinsics", "--poses or --actions"),
    (["--poses", "poses.npy", "--actions", "w"], "--actions", "exclude"),
    (["--no-camera", "--actions", "w"], "--actions", "--no-camera"),
    (["--prompt-embeds", "wrong.npy"], "--prompt-embeds", "64"),
    (["--prompt-embeds", "text.npy"], "--prompt-embeds", "text.npy"),
    (["--prompt-embeds", "two.safetensors"], "--prompt-embeds", "prompt_embeds"),
    (["--prompt-embeds", "text.txt"], "--prompt-embeds", ".safetensors or .npy"),
    (["--json", "nowhere/rollout.json"], "--json", "nowhere"),
    (["--plot", "rollout.jpeg"], "--plot", ".png"),
    (["--save-latents", "latents.pt"], "--save-latents", ".safetensors or .npy"),
    (["--backend", "cuda"], "--backend", "can't serve"),
    (["--checkpoint", ".", "--preset", "tiny"], "--checkpoint", "exclude"),
    (["--chunk", "x"], "--chunk", "Did you mean"),
]


@pytest.fixture
def bad_files(tmp_path):
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (9, 1, 1)))
    np.save(tmp_path / "wrong.npy", np.zeros((5, 4)))
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "text.txt").write_text("prompt")
    save_file({name: np.zeros((4, 64), np.float32) for name in "ab"}, tmp_path / "two.safetensors")


@pytest.mark.parametrize(
    ("arguments", "option", "detail"), BAD_ARGUMENTS, ids=[" ".join(bad[0]) for bad in BAD_ARGUMENTS]
)
def test_a_bad_argument_is_one_line_that_names_the_option(arguments, option, detail, invoke, bad_files, tmp_path):
    before = sorted(tmp_path.iterdir())
    output = invoke("rollout", *SMALL, *arguments, code=2).output
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert option in line and detail in line
    assert output.rstrip().endswith(line)
    assert sorted(tmp_path.iterdir()) == before


def test_a_plot_without_matplotlib_is_refused_before_the_rollout(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = invoke("rollout", *SMALL, "--plot", "rollout.png", code=2).output
    assert "--plot" in output and "lingbot-kernels[plot]" in output


def test_a_bad_checkpoint_prints_every_problem(invoke, tmp_path):
    folder = tmp_path / "checkpoint"
    CausalLingBotTransformer(LingBotConfig.preset("tiny")).save_pretrained(folder)
    (shard,) = folder.glob("*.safetensors")
    weights = load_file(shard)
    del weights["head.head.bias"]
    weights["blocks.1.ffn.0.bias"] = weights["blocks.1.ffn.0.bias"][:-1]
    save_file(weights, shard)
    output = invoke("rollout", *SMALL, "--checkpoint", folder, code=1).output
    assert "head.head.bias" in output and "blocks.1.ffn.0.bias" in output and "Traceback" not in output


def test_a_foreign_config_prints_what_is_wrong(invoke, tmp_path):
    folder = tmp_path / "checkpoint"
    assert "1 problem" in invoke("rollout", *SMALL, "--checkpoint", tmp_path, code=1).output
    CausalLingBotTransformer(LingBotConfig.preset("tiny")).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "i2v", "qk_norm": false, "dim": 128}')
    output = invoke("rollout", *SMALL, "--checkpoint", folder, code=1).output
    assert "Error: " in output and "qk_norm" in output


def test_an_unknown_command_is_a_usage_error(invoke):
    assert "No such command 'rollin'" in invoke("rollin", code=2).output
    assert "No such command 'nothing'" in invoke("bench", "nothing", code=2).output
