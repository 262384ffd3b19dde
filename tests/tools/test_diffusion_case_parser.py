"""Names that stay, bounds, broken input, and the places of reports."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingbot_kernels.tools import diffusion_case_parser as parser
from lingbot_kernels.tools._case_parser.results import Options, ParsedConfig, parse_config

SCRIPT = Path(parser.__file__)
CASE = "from stubs import DiffusionTestCase as C\n"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ParsedConfig]:
    """Reads the text of a config, and of modules beside it, by both readers."""

    def reads(text: str, files: dict[str, str] | None = None, **options: Any) -> ParsedConfig:
        for name, content in {"config.py": text, **(files or {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        options = {"case_class": "DiffusionTestCase", "id_param": "id", "root": tmp_path, **options}
        return parse_config(tmp_path / "config.py", parser.CASE_LIST_TO_SUITE, Options(**options))

    return reads


Read = Callable[..., ParsedConfig]


def test_visitor_without_imports_or_source() -> None:
    visitor = parser.DiffusionTestCaseVisitor()
    visitor.visit(
        ast.parse('def make():\n    return DiffusionTestCase("a")\nONE_GPU_CASES = []\nONE_GPU_CASES.append(make())')
    )
    assert visitor.cases == {"ONE_GPU_CASES": ["a"]} and visitor.unresolved == []


def test_visitor_process_expr_and_factory_id() -> None:
    text = CASE + 'def make(i="m", *, gpus=1):\n    return C(f"{i}_{gpus}")\nONE_GPU_CASES = []\n'
    visitor = parser.DiffusionTestCaseVisitor(source=text)
    visitor.visit(ast.parse(text))
    visitor._process_expr(ast.parse('ONE_GPU_CASES.append(make("x", gpus=2))').body[0])
    visitor._process_expr(ast.parse("ONE_GPU_CASES.append(make())", mode="eval").body)
    assert visitor.cases["ONE_GPU_CASES"] == ["x_2", "m_1"]
    assert visitor._extract_factory_case_id(ast.parse('make("z")', mode="eval").body) == "z_1"
    factory = ast.parse('def other(server, *, gpus):\n    return C("fixed", server, gpus)').body[0]
    assert visitor._extract_factory_case_id(factory) == "fixed"
    assert visitor._extract_factory_case_id(ast.parse("len([])", mode="eval").body) is None
    visitor.visit(ast.parse('ONE_GPU_CASES += [C("later")]').body[0])
    assert visitor.cases["ONE_GPU_CASES"] == ["x_2", "m_1", "later"]
    assert visitor.unresolved == []


def test_parse_testcase_configs_warns_of_what_is_unresolved(tmp_path: Path) -> None:
    config = tmp_path / "cases.py"
    config.write_text(CASE + 'from gone import make\nONE_GPU_CASES = [C("a"), make()]\nOTHER = [C("o")]\n')
    column = 26 if sys.version_info >= (3, 11) else 1
    with pytest.warns(parser.UnresolvedCaseWarning, match=rf"cases\.py:3:{column}: .*make"):
        assert parser.parse_testcase_configs(config) == {"ONE_GPU_CASES": ["a"]}
    config.write_text("ONE_GPU_CASES = [")
    with pytest.raises(SyntaxError, match="never closed"):
        parser.parse_testcase_configs(config)
    with pytest.raises(FileNotFoundError):
        parser.parse_testcase_configs(tmp_path / "none.py")


def test_resolve_case_config_path(tmp_path: Path) -> None:
    config = tmp_path / "python" / "pkg" / "gpu_cases.py"
    config.parent.mkdir(parents=True)
    config.write_text("")
    run_suite = config.parent / "run_suite.py"
    run_suite.write_text(
        "if 1:\n    from pkg.gpu_cases import ONE_GPU_CASES\nfrom pkg.gpu_cases import TWO_GPU_CASES\n"
    )
    assert parser.resolve_case_config_path(tmp_path, run_suite) == config
    run_suite.write_text("from .gpu_cases import ONE_GPU_CASES, TWO_GPU_CASES\n")
    assert parser.resolve_case_config_path(tmp_path, run_suite).samefile(config)
    run_suite.write_text("from pkg.gpu_cases import ONE_GPU_CASES\nfrom pkg.others import TWO_GPU_CASES\n")
    with pytest.raises(RuntimeError, match="one module"):
        parser.resolve_case_config_path(tmp_path, run_suite)
    run_suite.write_text("from pkg.gpu_cases import ONE_GPU_CASES\n")
    with pytest.raises(RuntimeError, match="both"):
        parser.resolve_case_config_path(tmp_path, run_suite)
    run_suite.write_text("from pkg.none import ONE_GPU_CASES, TWO_GPU_CASES\n")
    with pytest.raises(FileNotFoundError, match="none"):
        parser.resolve_case_config_path(tmp_path, run_suite)


def test_collect_diffusion_suites(tmp_path: Path) -> None:
    (tmp_path / "cases.py").write_text(
        CASE + 'ONE_GPU_CASES = [C("full"), C("e2e"), C("neither"), C("none"), C("full")]\n'
    )
    (tmp_path / "run_suite.py").write_text(
        'from extra import MORE\nSTANDALONE_FILES = {"1-gpu": ["a.py", *MORE], "2-gpu": []}\n'
        'STANDALONE_FILE_EST_TIMES = {"1-gpu": {"a.py": 60}}\n'
    )
    (tmp_path / "extra.py").write_text('MORE = [f"{n}.py" for n in ("b", "c")]\n')
    scenarios = {
        "full": {"estimated_full_test_time_s": 42.5, "expected_e2e_ms": 1000},
        "e2e": {"expected_e2e_ms": 6000.0, "estimated_full_test_time_s": None},
        "neither": {},
    }
    (tmp_path / "baselines.json").write_text(json.dumps({"scenarios": scenarios}))
    suites = parser.collect_diffusion_suites(
        tmp_path / "cases.py", tmp_path / "run_suite.py", tmp_path / "baselines.json"
    )
    one = suites["1-gpu"]
    assert [(c.case_id, c.suite, c.est_time) for c in one.cases] == [
        ("full", "1-gpu", 42.5),
        ("e2e", "1-gpu", 126.0),
        ("neither", "1-gpu", 300.0),
        ("none", "1-gpu", 300.0),
    ]
    assert one.standalone_files == ["a.py", "b.py", "c.py"]
    assert one.standalone_est_times == {"a.py": 60.0}
    assert one.missing_standalone_estimates == ["b.py", "c.py"]
    assert suites["2-gpu"].cases == [] and set(suites) == set(parser.CASE_LIST_TO_SUITE.values())


def test_unresolved_has_place_source_and_reason(read: Read) -> None:
    parsed = read(CASE + "from gone import load\n\nONE_GPU_CASES = [\n    C('a'),\n    *load(),\n]\n")
    (u,) = parsed.unresolved
    column = 6 if sys.version_info >= (3, 11) else 5
    assert (Path(u.file).name, u.line, u.column, u.source) == ("config.py", 6, column, "*load(),")
    assert "load" in u.reason
    assert parsed.lists == {"ONE_GPU_CASES": ["a"]}


@pytest.mark.parametrize(
    "line",
    [
        "from gone import *",
        "setattr(object(), name(), 1)",
        "ONE_GPU_CASES.append(getattr(factory, name)())",
        "from gone import x; x.cases = ONE_GPU_CASES",
        "from gone import run; run(lambda: ONE_GPU_CASES.append(C('z')))",
        "ONE_GPU_CASES = {c.id: c for c in ONE_GPU_CASES}",
        "ONE_GPU_CASES.append('text')",
        "ONE_GPU_CASES.append(None)",
        "ONE_GPU_CASES.append(C())",
        "ONE_GPU_CASES.append(C(3))",
        "ONE_GPU_CASES = 5",
        "[X] = ONE_GPU_CASES = open('f')",
        "ONE_GPU_CASES[0].retag('b'); from gone import tag; tag(ONE_GPU_CASES[0])",
        "for n in {'x', 'y'}: ONE_GPU_CASES.append(C(n))",
        "def f():\n    ONE_GPU_CASES.append(C('z'))\nimport atexit; atexit.register(f)",
        "import threading; threading.Thread(target=ONE_GPU_CASES.clear).start()",
        "from gone import more\nwhile more(): ONE_GPU_CASES.append(C('w'))",
        "from gone import at\ndel ONE_GPU_CASES[at():]",
        "from gone import x\nONE_GPU_CASES.append(C('%s' % [x]))",
    ],
)
def test_what_could_hide_a_case_is_reported(read: Read, line: str) -> None:
    parsed = read(CASE + "ONE_GPU_CASES = [C('a')]\n" + line + "\n")
    assert parsed.unresolved, parsed.suites


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import sys; sys.modules[__name__].ONE_GPU_CASES.append(C('z'))", ["a", "z"]),
        ("ONE_GPU_CASES.extend(ONE_GPU_CASES.__class__([C('q')]))", ["a", "q"]),
        ("globals()['ONE_GPU_CASES'].append(C('g'))", ["a", "g"]),
        ("exec('ONE_GPU_CASES.append(C(\"e\"))')", ["a", "e"]),
        ("def f():\n    pass\nimport atexit; atexit.register(f)", ["a"]),
    ],
)
def test_reflection_is_followed(read: Read, line: str, expected: list[str]) -> None:
    parsed = read(CASE + "ONE_GPU_CASES = [C('a')]\n" + line + "\n")
    assert parsed.lists["ONE_GPU_CASES"] == expected and not parsed.unresolved


def test_stopping_early_is_reported_and_keeps_what_was_found(read: Read) -> None:
    text = CASE + "ONE_GPU_CASES = [C('a')]\nraise ValueError('no')\nONE_GPU_CASES.append(C('b'))\n"
    parsed = read(text)
    assert parsed.lists["ONE_GPU_CASES"] == ["a"]
    assert [u.line for u in parsed.stopped] == [3] and "ValueError" in parsed.stopped[0].reason
    assert any("'b'" in u.reason for u in parsed.unresolved)


def test_five_thousand_cases(read: Read) -> None:
    lines = [
        f'    DiffusionTestCase("case_{i}", ServerArgs(model_path=M, extras=["--n", "{i}"])),' for i in range(5000)
    ]
    head = "from stubs import DiffusionTestCase, ServerArgs, M\nONE_GPU_CASES = [\n"
    parsed = read(head + "\n".join(lines) + "\n]\n", timeout=60)
    assert len(parsed.lists["ONE_GPU_CASES"]) == 5000 and not parsed.unresolved


def test_importing_needs_no_package() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('case_parser', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'numpy', 'site', 'lingbot_kernels')))"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(SCRIPT)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def _broken_sources() -> list[bytes]:
    rng = random.Random(7)
    golden = [p.read_bytes() for p in sorted((Path(__file__).parent / "golden").glob("*.py"))]
    out = [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbfONE_GPU_CASES = []",
        b"# -*- coding: nonsense -*-\n",
        b"# coding: latin-1\nX = '\xe9'\n",
    ]
    for _ in range(500):
        text = bytearray(rng.choice(golden))
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(text) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                del text[at : at + rng.randrange(1, 30)]
            elif kind == 1:
                text[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4)))
            elif kind == 2:
                text[at:at] = rng.choice(
                    [b"(", b")", b"[", b"]", b":", b"\n", b"    ", b"*", b"yield ", b"lambda:", b"=", b"if "]
                )
            else:
                lines = bytes(text).split(b"\n")
                lines[rng.randrange(len(lines))] = rng.choice(lines)
                text = bytearray(b"\n".join(lines))
        out.append(bytes(text))
    return out


def test_broken_input_never_raises(tmp_path: Path) -> None:
    config = tmp_path / "broken.py"
    unreadable = 0
    for source in _broken_sources():
        config.write_bytes(source)
        parsed = parse_config(config, parser.CASE_LIST_TO_SUITE, Options("C", "id", static=True))
        assert parsed.readable or parsed.unresolved
        unreadable += not parsed.readable
    assert 50 < unreadable < 450
