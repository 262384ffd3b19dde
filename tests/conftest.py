"""What every test runs under: one thread (the models are tiny), and poisoned memory for the ops and the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

POISONED = ("ops", "models", "realtime", "stages")

torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # tests/gpu does without
    import hypothesis

    hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one may take a second for an example
    hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers must collect the same names: no name is made of an object's address or of a tensor's values."""
    if drawn := [item.nodeid for item in items if " at 0x" in item.nodeid or "tensor(" in item.nodeid]:
        raise pytest.UsageError(f"parametrize: got {drawn[0][:120]!r}, must be a name that every process makes alike")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that torch hands out uninitialised (torch.empty and its kin, and what kernels allocate) holds NaN, or the
    largest integer: whatever reads a value that nothing wrote shows it.
    """
    poison = request.path.parent.name in POISONED and "unpoisoned" not in request.keywords
    torch.use_deterministic_algorithms(poison, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
