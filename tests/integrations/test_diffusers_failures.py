"""Causal forwards of an accelerated transformer that fail, and weights that change between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")

from failures import ERRORS, STRIDE, Interrupt, OutOfMemory, failing
from helpers import same_bits
from wan_models import CHANNELS, TEXT, make

from lingbot_kernels import RealtimeCausalDiTState
from lingbot_kernels.integrations import diffusers as integration
from lingbot_kernels.integrations.diffusers import KVWindow, accelerate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

FRAMES, SIZE = 2, (4, 4)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Twins:
    """Two sessions: one whose forwards fail, and one whose never do. The ring is full with the second chunk."""

    def __init__(self, chunks: int = 0) -> None:
        self.model = make()
        accelerate(self.model, kv_cache=KVWindow(5, 1))
        self.states = [RealtimeCausalDiTState() for _ in range(2)]
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, CHANNELS, FRAMES, *SIZE, generator=generator)
        self.texts = [torch.randn(1, length, TEXT, generator=generator) for length in (5, 9)]
        self.index = 0
        for _ in range(chunks):
            self.advance()

    @torch.no_grad()
    def step(self, state: RealtimeCausalDiTState, **changes: Any) -> Tensor | None:
        given = {
            "hidden_states": self.latents + self.index,
            "timestep": torch.tensor([900 - self.index % 2]),
            "encoder_hidden_states": self.texts[self.index // 2 % 2],
            "start_frame": self.index // 2 * FRAMES,
            "update_cache_only": self.index % 2 == 1,
        }
        out = self.model(**{**given, **changes}, state=state, return_dict=False)
        return None if out is None else out[0]

    def advance(self) -> None:
        """The next forward in both: a step, then the chunk's context update."""
        got, want = (self.step(state) for state in self.states)
        assert (got is None and want is None) or same_bits(got, want)
        for pair in zip(*(state.kv_cache.layers for state in self.states), strict=True):
            assert all(same_bits(a, b) for a, b in zip(*pair, strict=True))
        assert self.states[0].stats() == self.states[1].stats()
        self.index += 1

    def stats(self) -> dict[str, Any]:
        """Of the first session. The text K/V of the prompt before may be gone, so their bytes are not counted."""
        stats = self.states[0].stats()
        return {**stats, "text": (stats["text"]["hits"], stats["text"]["misses"])}

    def fail(self, failure: Any, error: type[BaseException]) -> bool:
        """Whether the next forward fails. Nothing of it is left then; it is done again."""
        before = self.stats()
        try:
            with failure:
                self.step(self.states[0])
        except error as raised:
            assert "injected" in str(raised)
            assert self.stats() == before
            self.advance()
            return True
        self.step(self.states[1])
        self.index += 1
        return False


@pytest.mark.parametrize("forwards", [0, 2, 6], ids=["first", "second", "steady"])
def test_a_forward_interrupted_anywhere(forwards: int) -> None:
    twins, tested = Twins(forwards), integration.AcceleratedWanTransformer3DModel.forward
    for count in itertools.count():
        error = ERRORS[count % len(ERRORS)]
        if not twins.fail(Interrupt(count * STRIDE, error, tested), error):
            break
        if forwards < 6:
            twins = Twins(forwards)
    assert count > 200 // STRIDE


def test_a_forward_without_memory_anywhere() -> None:
    twins = Twins(6)
    for count in itertools.count():
        if not twins.fail(OutOfMemory(count * STRIDE), torch.OutOfMemoryError):
            break
    assert count > 100 // STRIDE


@pytest.mark.parametrize("after", [False, True])
def test_a_block_that_fails(after: bool) -> None:
    for nth in range(3):
        twins = Twins(6)
        failure = failing(integration.AcceleratedWanTransformerBlock, "forward", nth, after, KeyboardInterrupt)
        assert twins.fail(failure, KeyboardInterrupt)
        twins.advance()


def test_a_forward_that_evicted_must_be_done_again_first() -> None:
    twins = Twins(6)
    state = twins.states[0]
    with failing(integration.AcceleratedWanTransformerBlock, "forward", 1), pytest.raises(RuntimeError):
        twins.step(state)
    assert (state.next_frame, state.unfinished) == (6, (6, 2))
    with pytest.raises(ValueError, match="start_frame: got 4 for 2 frames, must be 6 for 2"):
        twins.step(state, start_frame=4)
    twins.advance()
    twins.advance()


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        ([1, 2], r"timestep: got shape \[2\], must be \[1\]"),
        (1.0, r"timestep: got shape \[\], must be \[1\]"),
        ([float("nan")], r"timestep: got \[nan\], must be finite"),
        ([float("inf")], r"timestep: got \[inf\], must be finite"),
    ],
)
@pytest.mark.parametrize("forwards", [0, 6])
def test_timesteps_are_refused_before_anything_changes(timestep: Any, message: str, forwards: int) -> None:
    refuse(forwards, message, timestep=torch.tensor(timestep))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, TEXT), "encoder_hidden_states: got shape .* must be .1, L"),
        ((1, 0, TEXT), "encoder_hidden_states: got shape"),
        ((5, TEXT), "encoder_hidden_states: got shape"),
        ((1, 5, TEXT + 1), f"must be .1, L >= 1, {TEXT}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("forwards", [0, 6])
def test_texts_are_refused_before_anything_changes(shape: tuple[int, ...], message: str, forwards: int) -> None:
    refuse(forwards, message, encoder_hidden_states=torch.randn(shape))


def refuse(forwards: int, message: str, **change: torch.Tensor) -> None:
    twins = Twins(forwards)
    before = twins.states[0].stats()
    with pytest.raises(ValueError, match=message):
        twins.step(twins.states[0], **change)
    assert twins.states[0].stats() == before and twins.states[0].unfinished is None
    twins.advance()


def image_model() -> Any:
    model = make(image_dim=10, added_kv_proj_dim=24, pos_embed_seq_len=None)
    accelerate(model, kv_cache=KVWindow(5, 1))
    return model


@pytest.mark.parametrize("shape", [(2, 4, 10), (1, 0, 10), (1, 4, 11), (4, 10)])
def test_an_image_is_checked_as_the_text_is(shape: tuple[int, ...]) -> None:
    model, state = image_model(), RealtimeCausalDiTState()
    given = (torch.randn(1, CHANNELS, FRAMES, *SIZE), torch.tensor([3]), torch.randn(1, 512, TEXT))
    with torch.no_grad():
        with pytest.raises(ValueError, match="encoder_hidden_states_image: got shape"):
            model(*given, torch.randn(shape), state=state, start_frame=0)
        assert state.kv_cache is None
        model(*given, torch.randn(1, 4, 10), state=state, start_frame=0)


def load(model: Any) -> None:
    model.load_state_dict({name: 1.2 * value for name, value in model.state_dict().items()})


def merge(model: Any) -> None:
    model.blocks[1].attn2.to_v.weight.data += 0.5
    model.weights_changed()


def swap(model: Any) -> None:
    to_k = model.blocks[0].attn2.to_k
    model.blocks[0].attn2.to_k = torch.nn.Sequential(to_k, torch.nn.Linear(to_k.out_features, to_k.out_features))


def write(model: Any) -> None:
    with torch.no_grad():
        model.condition_embedder.text_embedder.linear_1.weight.mul_(2)


@pytest.mark.parametrize("change", [load, merge, swap, write], ids=lambda change: change.__name__)
def test_text_keys_of_other_weights_are_dropped(change: Callable[[Any], None]) -> None:
    torch.manual_seed(3)
    twins = Twins(2)
    held = [x[:, :8].clone() for pair in twins.states[0].kv_cache.layers for x in pair]
    change(twins.model)
    twins.index += 1  # a step of the next chunk, with the prompt that both know
    same, copied = (twins.step(s, start_frame=2, encoder_hidden_states=t, update_cache_only=False)
                    for s, t in zip(twins.states, (twins.texts[0], twins.texts[0].clone()), strict=True))  # fmt: skip
    assert same_bits(same, copied)
    assert twins.states[0].stats()["text"]["misses"] == 2
    after = [x[:, :8] for pair in twins.states[0].kv_cache.layers for x in pair]
    assert all(same_bits(a, b) for a, b in zip(held, after, strict=True))


def test_layerwise_casting_is_no_change_of_weights() -> None:
    """Its hooks give each layer other memory around every forward."""
    model = make(num_layers=2).to(torch.bfloat16)
    accelerate(model, kv_cache=KVWindow(5, 1))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    state, text = RealtimeCausalDiTState(), torch.randn(1, 5, TEXT, dtype=torch.bfloat16)
    with torch.no_grad():
        for index in range(3):
            x = torch.randn(1, CHANNELS, FRAMES, *SIZE, dtype=torch.bfloat16)
            model(x, torch.tensor([5]), text, state=state, start_frame=index * FRAMES)
    assert state.stats()["text"]["misses"] == 1
