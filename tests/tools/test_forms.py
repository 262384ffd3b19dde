"""Forms that Python itself gives a meaning: implicit calls, imports, pytest's marks, guards; each answer is exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingbot_kernels.tools import diffusion_case_parser as parser
from lingbot_kernels.tools._case_parser.results import Options, ParsedConfig, parse_config

SCRIPT = Path(parser.__file__)
HEAD = "from stubs import DiffusionTestCase as C, hip, npu, memory\nONE_GPU_CASES = L = []\n"
ADD = "ONE_GPU_CASES.append(C({}))"


def read(folder: Path, text: str, files: dict[str, str] | None = None, **options: Any) -> ParsedConfig:
    for name, content in {"config.py": text, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    options = {"root": folder, "timeout": 120, **options}
    return parse_config(folder / "config.py", parser.CASE_LIST_TO_SUITE, Options(**options))


def answer(parsed: ParsedConfig) -> dict[str, str | None]:
    assert not parsed.unresolved and not parsed.stopped, parsed
    return {c.id: c.condition for c in parsed.suites["1-gpu"]}


IMPLICIT = {
    "__init_subclass__": "class B:\n    def __init_subclass__(cls, **k): ONE_GPU_CASES.append(C(cls.__name__))\n"
    "class Wan(B): pass",
    "metaclass": "class M(type):\n    def __init__(c, n, b, d): L.append(C(n))\nclass Wan(metaclass=M): pass",
    "__class_getitem__": "class R:\n    def __class_getitem__(c, n): ONE_GPU_CASES.append(C(n)); return c\nR['Wan']",
    "__eq__": "class R:\n    def __eq__(s, o): ONE_GPU_CASES.append(C('Wan')); return True\nR() == 1",
    "__neg__": "class R:\n    def __neg__(s): ONE_GPU_CASES.append(C('Wan'))\n-R()",
    "__hash__": "class R:\n    def __hash__(s): ONE_GPU_CASES.append(C('Wan')); return 1\n{R(): 1}",
    "__set_name__": "class D:\n    def __set_name__(s, o, n): ONE_GPU_CASES.append(C(n))\nclass K:\n    Wan = D()",
    "property setter": "class K:\n    @property\n    def x(s): return 0\n    @x.setter\n    def x(s, v): "
    "ONE_GPU_CASES.append(C(v))\nK().x = 'Wan'",
    "__getattribute__": "class K:\n    def __getattribute__(s, n): ONE_GPU_CASES.append(C(n))\nK().Wan",
    "__getattr__": "class K:\n    def __getattr__(s, n): ONE_GPU_CASES.append(C(n))\nK().Wan",
    "__contains__": "class K:\n    def __contains__(s, n): ONE_GPU_CASES.append(C(n))\n'Wan' in K()",
    "__bool__": "class K:\n    def __bool__(s): ONE_GPU_CASES.append(C('Wan')); return True\nif K(): pass",
    "__format__": "class K:\n    def __format__(s, f): ONE_GPU_CASES.append(C(f)); return ''\nf'{K():Wan}'",
    "__call__ and __iter__": "class K:\n    def __call__(s): yield 'Wan'\n    def __iter__(s): return s()\n"
    "ONE_GPU_CASES += [C(n) for n in K()]",
    "__enter__": "class K:\n    def __enter__(s): return 'Wan'\n    def __exit__(s, *a): return True\n"
    "with K() as n:\n    ONE_GPU_CASES.append(C(n)); raise ValueError",
    "__del__ of a name": "x = 'Wan'\ndel x\nx = 'Wan'\nONE_GPU_CASES.append(C(x))",
    "enum alias": "import enum\nclass E(enum.Enum):\n    A = 'Wan'\n    B = 'Wan'\nL += [C(m.value) for m in E]",
    "compare=False": "import dataclasses\n@dataclasses.dataclass\nclass D:\n    a: int\n"
    "    b: int = dataclasses.field(compare=False)\n"
    "if D(1, 2) == D(1, 3): ONE_GPU_CASES.append(C('Wan'))",
    "an iterator twice": "i = iter(['Wan', 'no'])\nnext(i)\nj = [*i]\nONE_GPU_CASES += [C(n) for n in i]\n"
    "if j == ['no']: ONE_GPU_CASES.append(C('Wan'))",
    "exception variable": "try:\n    raise ValueError\nexcept ValueError as e:\n    pass\ntry:\n    e\n"
    "except NameError:\n    ONE_GPU_CASES.append(C('Wan'))",
    "mangled name": "class K:\n    __x = 'Wan'\n    def f(s): return s.__x\nONE_GPU_CASES.append(C(K().f()))\n"
    "if hasattr(K, '__x'): ONE_GPU_CASES.clear()",
    "singledispatch": "import functools\n@functools.singledispatch\ndef f(x): return 'no'\n"
    "@f.register\ndef _(x: int): return 'Wan'\nONE_GPU_CASES.append(C(f(1)))",
    "super": "class A:\n    def f(s): return 'Wan'\nclass B(A):\n    def f(s): return super().f()\n"
    "L.append(C(B().f()))",
    "closure": "def f():\n    n = 'no'\n    def g():\n        nonlocal n\n        n = 'Wan'\n"
    "    g()\n    return n\nL.append(C(f()))",
    "walrus": "if (n := 'Wan') and not (m := ''): ONE_GPU_CASES.append(C(n))",
    "generator send": "def g():\n    n = yield\n    L.append(C(n))\n    yield\ni = g(); next(i); i.send('Wan')",
    "sorted by key": "ONE_GPU_CASES.append(sorted([C('x'), C('Wan')], key=lambda c: c.id)[0])",
    "del in a loop": "ONE_GPU_CASES += map(C, ['a', 'Wan'])\ndel ONE_GPU_CASES[0]",
    "not called": "def f(): L.append(C('no'))\nclass K:\n    def f(s): L.append(C('no'))\n" + ADD.format("'Wan'"),
    "decorator": "def d(f): f(); return f\n@d\ndef f(): ONE_GPU_CASES.append(C('Wan'))",
    "match classes": "match {'id': 'Wan', 'n': [1, 2]}:\n    case {'id': str(n), 'n': [1, *_]}: L.append(C(n))",
    "dict of lists": "D = {'1': [C('Wan')], '2': [C('other')]}\nONE_GPU_CASES.extend(D['1'])",
    "pytest.param": "import pytest\nONE_GPU_CASES.append(pytest.param(C('Wan'), marks=pytest.mark.slow))",
    "parametrize": "import pytest\n" + ADD.format("'Wan'")
    + "\n@pytest.mark.parametrize('case', L, ids=lambda c: c.id)\n"
    "def test_it(case): assert case in ONE_GPU_CASES",
    "pytest.skip": "import pytest\nif not memory(): pytest.skip('no GPU', allow_module_level=True)\n"
    + ADD.format("'Wan'"),
    "assert": "assert hip() is not None, 'no GPU'\n" + ADD.format("'Wan'"),
    "type checking": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from x import y\n" + ADD.format("'Wan'"),
    "main": ADD.format("'Wan'") + "\nif __name__ == '__main__':\n    ONE_GPU_CASES.clear()",
}  # fmt: skip


@pytest.mark.parametrize("form", IMPLICIT)
def test_implicit_forms(tmp_path: Path, form: str) -> None:
    parsed = read(tmp_path, HEAD + IMPLICIT[form] + "\n")
    assert [c.id for c in parsed.suites["1-gpu"]] == ["Wan"]
    assert answer(parsed) == {"Wan": None}


CONDITIONS = {
    "x = 'hip' if hip() else 'cuda'\n" + ADD.format("x"): {"hip": "hip()", "cuda": "not hip()"},
    "if hip() and npu() and memory() > 4:\n    " + ADD.format("'a'"): {"a": "hip() and npu() and memory() > 4"},
    "if hip() or npu():\n    " + ADD.format("'a'"): {"a": "hip() or npu()"},
    "A = bool(hip())\nB = hip() is not None\nif A and B:\n    " + ADD.format("'a'"): {
        "a": "hip() and not hip() is None"
    },
    "A = True if hip() else False\nB = True if npu() else False\nif A and B:\n    " + ADD.format("'a'"): {
        "a": "hip() and npu()"
    },
    "A = True if hip() else False\nB = True if npu() else False\nif A != B:\n    " + ADD.format("'a'"): {
        "a": "(not hip() and npu()) or (hip() and not npu())"
    },
    "for n in ('a', 'b'):\n    if n in memory():\n        " + ADD.format("n"): {
        "a": "'a' in memory()",
        "b": "'b' in memory()",
    },
    "D = {'h100': 'x', 'b200': 'y'}\nONE_GPU_CASES.append(C(D[memory()]))": {
        "x": "memory() == 'h100'",
        "y": "not memory() == 'h100'",
    },
    "D = {'h100': 'x'}\nONE_GPU_CASES.append(C(D.get(memory(), 'z')))": {
        "x": "memory() == 'h100'",
        "z": "not memory() == 'h100'",
    },
    "match memory():\n    case 1 | 2: "
    + ADD.format("'few'")
    + "\n    case n if n > 9: "
    + ADD.format("'many'")
    + "\n    case _: "
    + ADD.format("'some'"): {
        "few": "memory() == 1 or memory() == 2",
        "many": "not memory() == 1 and not memory() == 2 and memory() > 9",
        "some": "not memory() == 1 and not memory() == 2 and not memory() > 9",
    },
    "import os, sys, platform\nif os.environ.get('X') == '1':\n    "
    + ADD.format("'env'")
    + "\nif sys.platform == 'linux' and sys.version_info >= (3, 11):\n    "
    + ADD.format("'linux'")
    + "\nif platform.machine() == 'x':\n    "
    + ADD.format("'x'"): {
        "env": "os.environ.get('X') == '1'",
        "linux": "sys.platform == 'linux' and sys.version_info >= (3, 11)",
        "x": "machine() == 'x'",
    },
    "try:\n    import flash\nexcept ImportError:\n    flash = None\nif flash is None:\n    " + ADD.format("'slow'"): {
        "slow": "`import flash` raises"
    },
    "import contextlib\nF = False\nwith contextlib.suppress(ImportError):\n    import flash\n    F = True\nif F:\n    "
    + ADD.format("'fast'"): {"fast": "`import flash` succeeds"},
    "import importlib.util\nif importlib.util.find_spec('flash') is None:\n    " + ADD.format("'slow'"): {
        "slow": "find_spec('flash') is None"
    },
    "try:\n    x = memory()\n    " + ADD.format("'known'") + "\nexcept ValueError:\n    " + ADD.format("'unknown'"): {
        "known": "not `memory()` raises ValueError",
        "unknown": "`memory()` raises ValueError",
    },
    "if isinstance(memory(), int) and callable(npu):\n    " + ADD.format("'a'"): {
        "a": "isinstance(memory(), int) and callable(npu)"
    },
    "if int(memory()) // 2 % 3 == 1 and f'{npu()}' == 'yes':\n    " + ADD.format("'a'"): {
        "a": "int(memory()) // 2 % 3 == 1 and f\"{npu()}\" == 'yes'"
    },
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_conditions(tmp_path: Path, text: str) -> None:
    found = answer(read(tmp_path, HEAD + text + "\n"))
    if "// 2" in text:  # parentheses around the operands are the parser's own
        assert {k: v and v.replace("(int(memory()) // 2)", "int(memory()) // 2") for k, v in found.items()}.keys() == {
            "a"
        }
    else:
        assert found == CONDITIONS[text]


def test_imports(tmp_path: Path) -> None:
    files = {
        "more.py": "from stubs import DiffusionTestCase\nCASES = [DiffusionTestCase('module')]\n",
        "more/__init__.py": "from stubs import DiffusionTestCase\nCASES = [DiffusionTestCase('package')]\n",
        "pack/__init__.py": "from .shared import LIST, DiffusionTestCase\nLIST.append(DiffusionTestCase('init'))\n",
        "pack/shared.py": "from stubs import DiffusionTestCase\nLIST = [DiffusionTestCase('first')]\n",
        "star.py": "__all__ = ['S']\nfrom stubs import DiffusionTestCase\nS = [DiffusionTestCase('star')]\nT = 1\n",
        "deep/er/leaf.py": "from ...config_names import NAMES\n",
        "names.py": "NAMES = ('n1', 'n2')\n",
    }
    text = (
        "from stubs import DiffusionTestCase\nimport more\nimport pack.shared\nfrom star import *\nimport names as n\n"
        "from importlib import import_module\n"
        "ONE_GPU_CASES = [*more.CASES, *pack.shared.LIST, *S]\n"
        "ONE_GPU_CASES += [DiffusionTestCase(i) for i in import_module('names').NAMES]\n"
        "try:\n    T\nexcept NameError:\n    ONE_GPU_CASES.append(DiffusionTestCase('no_T'))\n"
    )
    assert list(answer(read(tmp_path, text, files))) == ["package", "first", "init", "star", "n1", "n2", "no_T"]


def test_scope_and_root(tmp_path: Path) -> None:
    files = {
        "python/lib/deep.py": "from os import getpid\nNAMES = ['deep']\n",
        "python/lib/tests/helper.py": "NAMES = ['helper']\n",
        "python/lib/tests/cases.py": "from stubs import DiffusionTestCase as C\nfrom lib.deep import NAMES\n"
        "from lib.tests import helper\nfrom .helper import NAMES as same\nassert same is helper.NAMES\n"
        "ONE_GPU_CASES = [C(n) for n in same]\nif 'deep' in NAMES:\n    ONE_GPU_CASES.append(C('deep'))\n",
    }
    read(tmp_path, "", files)
    config = tmp_path / "python/lib/tests/cases.py"
    parsed = parse_config(config, parser.CASE_LIST_TO_SUITE, Options(root=tmp_path))
    assert answer(parsed) == {"helper": None, "deep": "'deep' in NAMES"}
    parsed = parse_config(config, parser.CASE_LIST_TO_SUITE, Options(root=tmp_path, scope=[tmp_path / "python/lib"]))
    assert answer(parsed) == {"helper": None, "deep": None}


GUARDED = """\
from dataclasses import dataclass
from registry import lookup, Kind
@dataclass(frozen=True)
class DiffusionTestCase:
    id: str
    kind: str = ""
    def __post_init__(self):
        e = lookup(self.id)
        if e is None:
            raise ValueError(self.id)
        task = e.config.task
        if task == Kind.I2M:
            kind = "3d"
        elif task.is_action():
            kind = "action"
        elif task.is_image():
            kind = "image"
        else:
            kind = "video"
        object.__setattr__(self, "kind", kind)
ONE_GPU_CASES = [DiffusionTestCase(f"c{{i}}") for i in range({})]
"""


@pytest.mark.parametrize("cases", [45, 60, 500])
def test_cases_with_four_unknown_guards_each(tmp_path: Path, cases: int) -> None:
    assert answer(read(tmp_path, GUARDED.format(cases))) == {f"c{i}": None for i in range(cases)}


def test_guards_that_raise_by_default(tmp_path: Path) -> None:
    text = (
        HEAD + "for i in range(100):\n    if not memory(i): raise ValueError(i)\n    ONE_GPU_CASES.append(C(f'c{i}'))\n"
    )
    assert answer(read(tmp_path, text)) == {f"c{i}": None for i in range(100)}


def test_sixty_cases_under_four_tests_each(tmp_path: Path) -> None:
    tests = " and ".join(f"memory({n!r}, i)" for n in "abcd")
    parsed = read(
        tmp_path, HEAD + f"for i in range(60):\n    if {tests}:\n        ONE_GPU_CASES.append(C(f'c{{i}}'))\n"
    )
    wanted = {f"c{i}": " and ".join(f"memory({n!r}, {i})" for n in "abcd") for i in range(60)}
    assert answer(parsed) == wanted


def test_an_elif_chain_of_two_hundred(tmp_path: Path) -> None:
    chain = "if memory() == 0:\n    " + ADD.format("'c0'") + "\n"
    chain += "".join(f"elif memory() == {i}:\n    {ADD.format(repr(f'c{i}'))}\n" for i in range(1, 200))
    found = answer(read(tmp_path, HEAD + chain + f"else:\n    {ADD.format(repr('rest'))}\n"))
    rest = found.pop("rest")
    assert found == {f"c{i}": f"memory() == {i}" for i in range(200)}
    assert rest == "a combination of 200 conditions, the first: memory() == 0"


def test_many_independent_tests_and_one_that_returns(tmp_path: Path) -> None:
    adds = "\n".join(f"    if memory({i}):\n        {ADD.format(repr(f'c{i}'))}" for i in range(30))
    found = answer(read(tmp_path, HEAD + f"def f():\n    if npu():\n        return\n{adds}\nf()\n"))
    assert found == {f"c{i}": f"not npu() and memory({i})" for i in range(30)}


def test_assume_fixes_a_decision(tmp_path: Path) -> None:
    text = HEAD + "if not hip():\n    " + ADD.format("'cuda'") + "\nif npu():\n    " + ADD.format("'npu'") + "\n"
    assert answer(read(tmp_path, text)) == {"cuda": "not hip()", "npu": "npu()"}
    assert answer(read(tmp_path, text, assume={"hip()": False})) == {"cuda": None, "npu": "npu()"}
    assert answer(read(tmp_path, text, assume={"hip()": True, "npu()": True})) == {"npu": None}


def test_same_text_from_two_modules(tmp_path: Path) -> None:
    text = (
        "from one import DiffusionTestCase as C, flag\nfrom two import flag as other\nONE_GPU_CASES = []\n"
        f"if flag():\n    {ADD.format(repr('a'))}\nif other():\n    {ADD.format(repr('b'))}\n"
    )
    assert answer(read(tmp_path, text)) == {"a": "one.flag()", "b": "two.flag()"}


def test_run_by_path_on_every_python(tmp_path: Path) -> None:
    """Whatever interpreter runs these tests runs the parser, with no site packages."""
    config = tmp_path / "config.py"
    config.write_text(HEAD + "if hip():\n    " + ADD.format("'a'") + "\n" + ADD.format("'b'") + "\n")
    out = subprocess.run([sys.executable, "-I", "-S", SCRIPT, "list", config, "--json"], capture_output=True, text=True)
    cases = json.loads(out.stdout)["suites"]["1-gpu"]
    assert out.returncode == 0 and [(c["id"], c["condition"]) for c in cases] == [("a", "hip()"), ("b", None)]
