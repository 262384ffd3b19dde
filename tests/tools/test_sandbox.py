"""What a config may not do: a clear report, exit 3, nothing left on disk, bounded time. And what it may."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lingbot_kernels.tools import diffusion_case_parser as parser

SCRIPT = Path(parser.__file__)
HEAD = "from stubs import DiffusionTestCase as C\nONE_GPU_CASES = [C('a')]\n"


def run(config: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "list", str(config), *map(str, args)]
    start = time.perf_counter()
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert time.perf_counter() - start < 60
    assert "Traceback" not in out.stderr
    return out


REFUSED = {
    "writes a file": "open('{folder}/left.txt', 'w').write('x')",
    "writes by pathlib": "import pathlib; pathlib.Path('{folder}/left.txt').write_text('x')",
    "writes by os.open": "import os; os.open('{folder}/left.txt', os.O_CREAT | os.O_WRONLY)",
    "writes by posix": "import posix; posix.mkfifo('{folder}/left')",
    "makes a folder": "import os; os.makedirs('{folder}/left')",
    "removes a file": "import os; os.remove('{folder}/config.py')",
    "renames a file": "import shutil; shutil.move('{folder}/config.py', '{folder}/left.py')",
    "makes a temporary file": "import tempfile; tempfile.mkdtemp(dir='{folder}')",
    "reads elsewhere": "import os; os.open('/etc/hostname', os.O_RDONLY)",
    "opens a socket": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "asks a name server": "import socket; socket.gethostbyname('example.org')",
    "fetches a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    "starts a process": "import subprocess; subprocess.run(['touch', '{folder}/left'])",
    "calls the shell": "import os; os.system('touch {folder}/left')",
    "forks": "import os; os.fork()",
    "kills its parent": "import os; os.kill(os.getppid() if False else 1, 0)",
    "starts a thread": "import threading; threading.Thread(target=print).start()",
    "loads a library": "import ctypes; ctypes.CDLL(None)",
    "installs an import hook": "import sys; sys.meta_path.append(object())",
    "installs a path hook": "import sys; sys.path_hooks.insert(0, object())",
    "changes built-in names": "import builtins; builtins.len = lambda x: 0",
    "swallows the refusal": "try:\n    open('{folder}/left.txt', 'w')\nexcept BaseException:\n    pass",
    "leaves the interpreter": "import os; os._exit(0)",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_operation_stops_the_run(tmp_path: Path, what: str) -> None:
    config = tmp_path / "config.py"
    config.write_text(HEAD + REFUSED[what].format(folder=tmp_path) + "\n")
    out = run(config, "--json")
    assert out.returncode == 3, (out.stdout, out.stderr)
    assert "refused: " in out.stderr and f"{config}:" in out.stderr
    assert os.listdir(tmp_path) == ["config.py"]


STOPPED = {
    "loops for ever": ("while True:\n    pass", "doesn't end within"),
    "sleeps in C": ("import select; select.select([], [], [], 999)", "doesn't end within"),
    "eats memory": ("x = [0] * 10**10", "MemoryError"),
    "eats memory slowly": ("x = []\nwhile True:\n    x.append(bytes(10**7))", "MemoryError"),
    "a string without end": ("x = 'a'\nwhile True:\n    x += x", ""),
    "recurses": ("def f():\n    return f()\nf()", "RecursionError"),
    "recurses in C": ("import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f()\nf()", ""),
    "calls sys.exit": ("import sys; sys.exit(0)", "SystemExit"),
    "raises": ("raise ValueError('no GPU')", "no GPU"),
    "fails an import": ("from json import nothing", "ImportError"),
    "a number without end": ("x = 10 ** 10 ** 10", ""),
}


@pytest.mark.parametrize("what", STOPPED)
def test_what_does_not_end_is_stopped(tmp_path: Path, what: str) -> None:
    config, output = tmp_path / "config.py", tmp_path / "out"
    text, reason = STOPPED[what]
    config.write_text(HEAD + text + "\nONE_GPU_CASES.append(C('b'))\n")
    out = run(config, "--timeout", 3)
    assert out.returncode == 3, (out.stdout, out.stderr)
    assert "stopped early" in out.stderr and reason in out.stderr
    command = [sys.executable, str(SCRIPT), "plan", str(config), "--suite", "1-gpu", "--github-output", str(output)]
    assert subprocess.run([*command, "--timeout", "3"], capture_output=True, timeout=120).returncode == 3
    assert not output.exists()


def test_output_is_swallowed(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(HEAD + "import sys, os\nprint('noise' * 10**7)\nsys.stderr.write('noise' * 10**6)\n")
    out = run(config)
    assert out.returncode == 0 and "noise" not in out.stdout + out.stderr


def test_a_hanging_world_is_reported(tmp_path: Path) -> None:
    """One outcome of a test ends, the other doesn't."""
    config = tmp_path / "config.py"
    config.write_text(HEAD + "from stubs import slow\nif slow():\n    while True:\n        pass\n")
    out = run(config, "--timeout", 8)
    assert out.returncode == 3 and "doesn't end within" in out.stderr and "1-gpu: 1 cases" in out.stdout


def test_reading_inside_the_scope_is_real_and_elsewhere_unknown(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    (tmp_path / "ids.json").write_text('["x", "y"]')
    config.write_text(
        HEAD + "import json, pathlib\nhere = pathlib.Path(__file__).parent\n"
        "ONE_GPU_CASES += [C(i) for i in json.loads((here / 'ids.json').read_text())]\n"
        "with open(here / 'ids.json') as f:\n    ONE_GPU_CASES += [C(i + '2') for i in json.load(f)]\n"
        "if not (here.is_dir() and here.exists() and (here / 'ids.json').is_file()): ONE_GPU_CASES.clear()\n"
        "if pathlib.Path('/etc/passwd').exists():\n    ONE_GPU_CASES.append(C('machine'))\n"
    )
    out = run(config)
    assert out.returncode == 0
    for case_id in ("x", "y", "x2", "y2"):
        assert f"  {case_id}  [ONE_GPU_CASES" in out.stdout
    assert "machine  [ONE_GPU_CASES, line 10, 300 s]  if Path.exists('/etc/passwd')" in out.stdout


def test_static_runs_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(HEAD + f"open({str(tmp_path / 'left')!r}, 'w')\nif hip():\n    ONE_GPU_CASES.append(C('b'))\n")
    out = run(config, "--static")
    assert out.returncode == 0 and "b  [ONE_GPU_CASES, line 5, 300 s]  if hip()" in out.stdout
    config.write_text(HEAD + "for n in NAMES:\n    ONE_GPU_CASES.append(C(n))\n")
    assert run(config, "--static").returncode == 0 and run(config, "--static", "--strict").returncode == 2
    assert os.listdir(tmp_path) == ["config.py"]
