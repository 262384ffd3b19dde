"""A forward never reads a tensor's value on the host: on a GPU each such read waits for all that was launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_inputs, make_model, small_config
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState, use_backend

READS = (
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "masked_select", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__",
    "__repr__", "__format__",
)  # fmt: skip
FUNCTIONS = ("nonzero", "equal", "allclose", "masked_select", "unique", "is_nonzero", "from_numpy")


class HostRead(AssertionError):
    pass


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            raise HostRead(name)

        return read

    for name in READS:
        assert hasattr(Tensor, name), name
        monkeypatch.setattr(Tensor, name, forbidden(f"Tensor.{name}"))
    for name in FUNCTIONS:
        monkeypatch.setattr(torch, name, forbidden(f"torch.{name}"))
    to = Tensor.to

    def checked_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "cpu" in (*args, kwargs.get("device")):
            raise HostRead("Tensor.to('cpu')")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", checked_to)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("caches", [True, False])
def test_no_value_is_read_in_a_whole_chunk(
    dtype: torch.dtype, backend: str, caches: bool, request: pytest.FixtureRequest
) -> None:
    """Also while the ring wraps, at the first chunk (every cache is filled) and with generated noise."""
    model = make_model(small_config(window_frames=7, sink_frames=2), dtype)
    stage, inputs = CausalDenoisingStage(model), make_inputs(model.config, 4)
    state = RealtimeCausalDiTState(rope_cache=caches, time_cache=caches, camera_cache=caches, text_cache=caches)
    request.getfixturevalue("no_reads")
    with use_backend(backend):
        for i, noise in enumerate(inputs.noise):
            arguments = inputs.chunk(i)
            if i % 2:
                arguments["renoise"] = None
            chunk = stage.denoise_chunk(state, noise, **arguments, update_context=i != 2)
            if i == 2:
                stage.update_context(state, chunk, text=inputs.text, camera=inputs.camera[i])
    state.nbytes()
    state.stats()


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), bool, int, float,
        lambda x: x.nonzero(), lambda x: torch.nonzero(x), lambda x: x.to("cpu"), lambda x: [0][x],
        lambda x: 1 if x else 0, lambda x: range(x), lambda x: f"{x}", lambda x: x.to(device="cpu"),
        lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_guard_itself_sees_each_kind_of_read(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(HostRead):
        read(torch.zeros(1, dtype=torch.int64))
