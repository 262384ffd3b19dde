"""Weights that change while a session lives: what the old ones made is dropped, its history in the window stays."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_inputs, make_model, ring_bits, same_bits, same_ring, small_config
from torch import Tensor, nn

from lingbot_kernels import CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.realtime.weights import WeightsIdentity


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, switched as PEFT's layers are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.scaling = {"default": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters:
            return y
        return y + self.scaling["default"] * (x @ self.a.t() @ self.b.t())

    def merge(self) -> None:
        self.base_layer.weight.data += self.scaling["default"] * self.b.detach() @ self.a.detach()
        self.merged_adapters.append("default")


def layer(model: Any) -> Any:
    return model.blocks[1].cross_attn.v


def in_place(model: Any) -> None:
    with torch.no_grad():
        layer(model).weight.mul_(3)


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        layer(model).weight.mul_(3)


def through_the_state_dict(model: Any) -> None:
    model.state_dict()["blocks.1.cross_attn.v.bias"].add_(1)


def fused_through_the_state_dict(model: Any) -> None:
    """A layer that is kept as rows of a fused one; it makes no cache, but the graphs read it."""
    model.state_dict()["blocks.1.self_attn.k.weight"].mul_(2)


def loaded_submodule(model: Any) -> None:
    model.blocks[1].load_state_dict({name: 2 * value for name, value in model.blocks[1].state_dict().items()})


def assigned_submodule(model: Any) -> None:
    weights = {name: 2 * value for name, value in layer(model).state_dict().items()}
    layer(model).load_state_dict(weights, assign=True)


def replaced_parameter(model: Any) -> None:
    layer(model).weight = nn.Parameter(2 * layer(model).weight.detach())


def replaced_memory(model: Any) -> None:
    layer(model).weight.data = 2 * layer(model).weight.detach()


def replaced_module(model: Any) -> None:
    model.blocks[1].cross_attn.v = Adapted(layer(model))


def removed_parameter(model: Any) -> None:
    layer(model).bias = None


def time_embedding(model: Any) -> None:
    with torch.no_grad():
        model.time_projection[1].weight.mul_(2)


def camera_layer(model: Any) -> None:
    with torch.no_grad():
        model.blocks[0].cam_shift_layer.weight.mul_(-2)


def unseen(model: Any) -> None:
    layer(model).weight.data += 1
    model.weights_changed()


CHANGES = (
    in_place, in_inference_mode, through_the_state_dict, fused_through_the_state_dict, loaded_submodule,
    assigned_submodule, replaced_parameter, replaced_memory, replaced_module, removed_parameter, time_embedding,
    camera_layer, unseen,
)  # fmt: skip


def steps(model: CausalLingBotTransformer, state: RealtimeCausalDiTState, chunk: int) -> list[Tensor]:
    """The same latents, prompt and camera as before, at the next position, for two steps."""
    given = make_inputs(model.config, 1)
    camera, text = CAMERA, TEXT
    latents = torch.cat([given.noise[0], given.condition[0]], 1)
    out = [
        model(latents, text, time, state=state, start_frame=3 * chunk, camera=camera, step_index=step)
        for step, time in enumerate((900.0, 500.0))
    ]
    return [x for x in out if x is not None]


CAMERA, TEXT = make_inputs(small_config(), 1).camera[0], make_inputs(small_config(), 1).text  # the tensors are the keys


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_old_weights_made_is_dropped_and_the_history_stays(change: Callable[[Any], None]) -> None:
    """Against a session with every cache off, whose weights change at the same place."""
    off = dict.fromkeys(("rope_cache", "time_cache", "camera_cache", "text_cache"), False)
    outputs, rings = [], []
    for switches in ({}, off):
        torch.manual_seed(5)
        model, state = make_model(), RealtimeCausalDiTState(**switches)
        before = steps(model, state, 0)
        change(model)
        outputs.append([*before, *steps(model, state, 1), *steps(model, state, 2)])
        rings.append(ring_bits(state))
        if not switches:
            stats = state.stats()
            assert (stats["text"]["misses"], stats["camera_modulation"]["misses"]) == (2, 2)
            assert stats["time_embeddings"]["misses"] == 4 and stats["rope"]["misses"] == 3
    assert all(same_bits(a, b) for a, b in zip(*outputs, strict=True))
    assert same_ring(*rings)


@pytest.mark.parametrize("how", ["merge", "scale", "off"])
def test_an_adapter_that_is_switched(how: str) -> None:
    torch.manual_seed(5)
    model, state = make_model(), RealtimeCausalDiTState()
    replaced_module(model)
    steps(model, state, 0)
    if how == "merge":
        layer(model).merge()  # writes through `.data`, which torch doesn't count
    elif how == "scale":
        layer(model).scaling["default"] = 2.0
    else:
        layer(model)._disable_adapters = True
    steps(model, state, 1)
    assert state.stats()["text"]["misses"] == 2
    steps(model, state, 2)
    assert state.stats()["text"]["misses"] == 2


def test_nothing_is_dropped_while_nothing_changes() -> None:
    model, state = make_model(), RealtimeCausalDiTState()
    for chunk in range(3):
        steps(model, state, chunk)
        model.state_dict()
        [weight.sum() for weight in model.parameters()]
    assert state.stats()["text"]["misses"] == 1 and state.stats()["time_embeddings"]["misses"] == 2


def test_new_weights_for_the_whole_model_are_refused() -> None:
    model, state = make_model(), RealtimeCausalDiTState()
    steps(model, state, 0)
    model.load_state_dict(make_model(seed=1).state_dict())
    with pytest.raises(ValueError, match="state: got one that another model"):
        steps(model, state, 1)
    assert state.next_frame == 3


# The identity on its own.


def test_a_token_stays_until_something_changes() -> None:
    model, identity = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)), WeightsIdentity()
    tokens = [identity.token(model) for _ in range(2)]
    with torch.no_grad():
        model[1].weight.zero_()
    tokens += [identity.token(model) for _ in range(2)]
    identity.renew()
    tokens += [identity.token(model) for _ in range(2)]
    model.append(nn.Linear(3, 3))
    tokens += [identity.token(model) for _ in range(2)]
    assert [tokens.index(token) for token in tokens] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_replaced_weights_are_freed_at_once() -> None:
    """And one that takes the memory of another is not taken for it."""
    model, identity = nn.Linear(300, 300), WeightsIdentity()
    token, old = identity.token(model), weakref.ref(model.weight)
    model.weight = None
    gc.collect()
    assert old() is None
    seen = {id(token)}
    kept = [token]
    for _ in range(20):
        model.weight = nn.Parameter(torch.zeros(300, 300))
        kept.append(identity.token(model))
        seen.add(id(kept[-1]))
        model.weight = None
    assert len(seen) == 21


def test_copies_have_tokens_of_their_own() -> None:
    model, identity = nn.Linear(2, 2), WeightsIdentity()
    token = identity.token(model)
    for other in (copy.copy(identity), copy.deepcopy(identity), pickle.loads(pickle.dumps(identity))):
        assert other.token(model) is not token
    model = copy.deepcopy(make_model())
    steps(model, RealtimeCausalDiTState(), 0)


def test_weights_that_tell_nothing_of_writes() -> None:
    """Made in inference mode: another tensor is seen, a write is not."""
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    identity = WeightsIdentity()
    token = identity.token(model)
    assert identity.token(model) is token
    model.bias = nn.Parameter(torch.zeros(2))
    assert identity.token(model) is not token


def test_hooks_that_move_weights_change_nothing() -> None:
    model, identity = nn.Linear(2, 2), WeightsIdentity()
    model._hf_hook = object()  # as accelerate's offloading leaves
    token = identity.token(model)
    model.to(torch.float64)
    assert identity.token(model) is token
