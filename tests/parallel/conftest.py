"""Pools of ranks, one for each world size, shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Ranks]]:
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size in pools and pools[size].lost:
            pools.pop(size).close()
        if size not in pools:
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(params=[2, 3, 4], ids=lambda size: f"{size}ranks")
def ranks(request: pytest.FixtureRequest, pool: Callable[[int], Ranks]) -> Ranks:
    return pool(request.param)
