"""Names that stay, bounds, broken input, and the places of reports."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lingbot_kernels.tools import diffusion_case_parser as parser
from lingbot_kernels.tools._case_parser.collect import ParsedConfig

SCRIPT = Path(parser.__file__)
CASE = "from stubs import DiffusionTestCase as C\n"


def visit(text: str) -> parser.DiffusionTestCaseVisitor:
    visitor = parser.DiffusionTestCaseVisitor(source=text)
    visitor.visit(ast.parse(text))
    return visitor


def ids(text: str, name: str = "ONE_GPU_CASES") -> list[str]:
    visitor = visit(text)
    assert visitor.unresolved == []
    return visitor.cases[name]


def test_visitor_without_imports_or_source() -> None:
    visitor = parser.DiffusionTestCaseVisitor()
    visitor.visit(
        ast.parse('def make():\n    return DiffusionTestCase("a")\nONE_GPU_CASES = []\nONE_GPU_CASES.append(make())')
    )
    assert visitor.cases == {"ONE_GPU_CASES": ["a"]}


def test_visitor_process_expr_and_factory_id() -> None:
    visitor = visit(CASE + 'def make(i="m", *, gpus=1):\n    return C(f"{i}_{gpus}")\nONE_GPU_CASES = []\n')
    visitor._process_expr(ast.parse('ONE_GPU_CASES.append(make("x", gpus=2))').body[0])
    visitor._process_expr(ast.parse("ONE_GPU_CASES.append(make())", mode="eval").body)
    assert visitor.cases["ONE_GPU_CASES"] == ["x_2", "m_1"]
    assert visitor._extract_factory_case_id(ast.parse('make("z")', mode="eval").body) == "z_1"
    factory = ast.parse('def other(server, *, gpus):\n    return C("fixed", server, gpus)').body[0]
    assert visitor._extract_factory_case_id(factory) == "fixed"
    assert visitor._extract_factory_case_id(ast.parse("len([])", mode="eval").body) is None
    visitor.visit(ast.parse('ONE_GPU_CASES += [C("later")]').body[0])
    assert visitor.cases["ONE_GPU_CASES"] == ["x_2", "m_1", "later"]


def test_parse_testcase_configs_warns_of_what_is_unresolved(tmp_path: Path) -> None:
    config = tmp_path / "cases.py"
    config.write_text(CASE + 'from gone import make\nONE_GPU_CASES = [C("a"), make()]\nOTHER = [C("o")]\n')
    with pytest.warns(parser.UnresolvedCaseWarning, match=r"cases\.py:3:26: .*make"):
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


def test_unresolved_has_place_source_and_reason() -> None:
    visitor = visit(CASE + "from gone import load\n\nONE_GPU_CASES = [\n    C('a'),\n    *load(),\n]\n")
    (u,) = visitor.unresolved
    assert (u.file, u.line, u.column, u.source) == ("<config>", 6, 6, "*load(),")
    assert "load" in u.reason
    assert visitor.cases == {"ONE_GPU_CASES": ["a"]}


@pytest.mark.parametrize(
    "line",
    [
        "from gone import *",
        "setattr(object(), name(), 1)",
        "ONE_GPU_CASES.append(getattr(factory, name)())",
        "from gone import x; x.cases = ONE_GPU_CASES",
        "from gone import run; run(lambda: ONE_GPU_CASES.append(C('z')))",
        "import sys; sys.modules[__name__].ONE_GPU_CASES.append(C('z'))",
        "ONE_GPU_CASES = {c.id: c for c in ONE_GPU_CASES}",
        "ONE_GPU_CASES.append('text')",
        "ONE_GPU_CASES.append(None)",
        "ONE_GPU_CASES.append(C())",
        "ONE_GPU_CASES.append(C(3))",
        "ONE_GPU_CASES = 5",
        "[X] = ONE_GPU_CASES = open('f')",
        "ONE_GPU_CASES[0].retag('b')",
        "for n in {'x', 'y'}: ONE_GPU_CASES.append(C(n))",
        "ONE_GPU_CASES.extend(ONE_GPU_CASES.__class__([C('q')]))",
        "def f():\n    ONE_GPU_CASES.append(C('z'))\nimport atexit; atexit.register(f)",
        "import threading; threading.Thread(target=ONE_GPU_CASES.clear).start()",
    ],
)
def test_what_could_hide_a_case_is_reported(line: str) -> None:
    visitor = visit(CASE + "ONE_GPU_CASES = [C('a')]\n" + line + "\n")
    assert visitor.unresolved, visitor.cases


@pytest.mark.parametrize(
    "text",
    [
        "def f(n):\n    return f(n + 1)\nONE_GPU_CASES = f(0)",
        "def f(n):\n    return f(n) + f(n)\nONE_GPU_CASES = f(0)",
        "while True:\n    pass",
        "X = []\nwhile True:\n    X.append(1)",
        "X = [0] * 10**9",
        "X = 'a' * 10**9",
        "X = '%1000000000d' % 5\nY = f'{5:>999999999}'\nZ = '{:>999999999}'.format(5)\nW = 'a'.ljust(10**9)",
        "X = 10 ** 10 ** 10\nY = 1 << 10**10",
        "x = 2\nfor i in range(200):\n    x = x * x",
        "X = [[0] * 1000 for i in range(1000)]\nY = [a for x in X for a in x for b in X]",
        "X = [0]\nfor i in X:\n    X.append(i)",
        "def g():\n    while True:\n        yield 1\nX = list(g())",
        "import itertools\nX = list(itertools.product(range(1000), repeat=5))",
        "X = {}\nX['x'] = X\nY = [X]\nX['y'] = Y\nimport gone; gone.f(X, Y)\nimport copy\nZ = copy.deepcopy(Y)",
        "X = []\nX.append(X)\nX == X\nZ = f'{X}'",
        "from gone import flag\nX = []\n" + "".join(f"if flag({i}):\n    X.append({i})\n" for i in range(800)),
        "from gone import flag\nX = 0\n" + "".join(f"if flag({i}):\n    X = X + {i}\n" for i in range(60)),
        "from gone import flag\nX = []\nfor i in range(400):\n    if flag(i):\n        break\n    X.append(i)",
        "class A(A):\n    pass",
        "class A:\n    @property\n    def x(self):\n        return self.x\nX = A().x",
        "ONE_GPU_CASES = " + " + ".join(["[]"] * 5000),
        "X = " + "-" * 900 + "1",
        "X = " + ".a" * 0 + "a" + ".b" * 900,
        "X = " + "[" * 90 + "]" * 90,
        "\n".join(" " * i + "if a:" for i in range(95)) + "\n" + " " * 95 + "b",
    ],
)
def test_bounded(text: str) -> None:
    start = time.perf_counter()
    try:
        tree = ast.parse(text)
    except (SyntaxError, RecursionError, MemoryError):
        pytest.skip("this Python doesn't parse it")
    visitor = parser.DiffusionTestCaseVisitor(source=text)
    visitor.visit(tree)
    assert time.perf_counter() - start < 20


def test_stopping_early_is_reported_and_keeps_what_was_found() -> None:
    visitor = visit(CASE + "ONE_GPU_CASES = [C('a')]\nwhile True:\n    pass\nONE_GPU_CASES.append(C('b'))\n")
    assert visitor.cases["ONE_GPU_CASES"] == ["a"]
    (u,) = visitor.unresolved
    assert u.line in (3, 4) and "steps" in u.reason


def test_five_thousand_cases_in_a_second(tmp_path: Path) -> None:
    lines = [
        f'    DiffusionTestCase("case_{i}", ServerArgs(model_path=M, extras=["--n", "{i}"])),' for i in range(5000)
    ]
    config = tmp_path / "cases.py"
    config.write_text(
        "from stubs import DiffusionTestCase, ServerArgs, M\nONE_GPU_CASES = [\n" + "\n".join(lines) + "\n]\n"
    )
    best = min(_seconds(config) for _ in range(3))
    assert best < 1.0, f"{best:.2f} s"


def _seconds(config: Path) -> float:
    start = time.process_time()
    assert len(parser.parse_testcase_configs(config)["ONE_GPU_CASES"]) == 5000
    return time.process_time() - start


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
    start = time.perf_counter()
    unreadable = 0
    for source in _broken_sources():
        config.write_bytes(source)
        parsed: ParsedConfig = parser.collect.parse_config(
            config, parser.CASE_LIST_TO_SUITE, case_class="C", id_param="id"
        )
        assert parsed.readable or parsed.unresolved
        unreadable += not parsed.readable
    assert 50 < unreadable < 450
    assert time.perf_counter() - start < 60


TEMPLATES = [
    "X = {a}",
    "X += {a}",
    "X.append({a})",
    "X[{a}] = {b}",
    "for i in {a}: X = {b}",
    "X = {a} + {b}",
    "X = {a} if {b} else {c}",
    "def f(a={a}): return {b}",
    "X = [{a}, {b}]",
    "X = ({a})({b})",
    "del X[{a}]",
    "X = {a} in {b}",
    "with {a} as X: {b}",
    "class K(f): X = {a}",
    "X = {{{a}: {b}}}",
    "X, Y = {a}",
    "assert {a}",
    "raise {a}",
    "X = f'{{{a}}}'",
    "X = {a} < {b}",
    "try:\n    {a}\nexcept {b}:\n    {c}",
    "while {a}:\n    break",
    "X = -({a})",
    "X = list({a})",
    "X.sort(key={a})",
]


def test_shuffled_tokens_never_raise() -> None:
    """Valid Python in a random order: names unbound, wrong types, odd targets."""
    rng = random.Random(11)
    pieces = [
        "X",
        "C('a')",
        "[C('b')]",
        "1",
        "None",
        "lambda: X",
        "f",
        "{}",
        "{1, 2}",
        "'s'",
        "X[0]",
        "X.a",
        "f()",
        "*X",
        "[*X]",
        "x for x in X",
    ]
    for _ in range(1500):
        a, b, c = (rng.choice(pieces) for _ in range(3))
        template = rng.choice(TEMPLATES)
        text = "X = []\n" + "\n".join([template.format(a=a, b=b, c=c)] * 2) + "\n"
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.DiffusionTestCaseVisitor(case_class="C", source=text).visit(tree)
