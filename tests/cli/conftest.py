"""Runs the command line in this process, in an empty folder, on videos of 32x32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from lingbot_kernels.cli import main

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """invoke("doctor", "--json") -> the result, with the exit code checked; unexpected exceptions are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LINGBOT_KERNELS_BACKEND", raising=False)

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lingbot-kernels")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run
