"""Direct calls of the compiled CPU core, each under every instruction set this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_C = pytest.importorskip("lingbot_kernels._C", reason="lingbot_kernels._C is not built")


@pytest.fixture(params=_C.cpu.isas, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa
    _C.cpu.set_isa(request.param)
    yield request.param
    _C.cpu.set_isa(before)
