"""The causal rollout of an accelerated Wan transformer against its plain modules with a rolled cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs lingbot-kernels[diffusers]")

from wan_models import CHANNELS, HEAD_DIM, HEADS, TEXT, error, make

from lingbot_kernels import RealtimeCausalDiTState
from lingbot_kernels.integrations.diffusers import KVWindow, accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

FRAMES, SIZE, WINDOW, SINK = 2, (4, 8), 7, 1
TOKENS = SIZE[0] // 2 * (SIZE[1] // 2)


class RolledProcessor:
    """Self-attention as a causal engine writes it on plain diffusers: cat, evict behind the sink, attend."""

    def __init__(self) -> None:
        self.k = self.v = torch.empty(1, 0, HEADS, HEAD_DIM)
        self.again = False

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

        def rotated(y: Tensor) -> Tensor:
            a, b = y.unflatten(-1, (HEADS, -1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(y.dtype)

        q, k = rotated(attn.norm_q(attn.to_q(x))), rotated(attn.norm_k(attn.to_k(x)))
        v = attn.to_v(x).unflatten(-1, (HEADS, -1))
        length = k.shape[1]
        if self.again:
            self.k, self.v = self.k[:, :-length], self.v[:, :-length]
        self.k, self.v = torch.cat([self.k.to(k), k], dim=1), torch.cat([self.v.to(v), v], dim=1)
        overflow, sink = self.k.shape[1] - WINDOW * TOKENS, SINK * TOKENS
        if overflow > 0:
            self.k, self.v = (torch.cat([y[:, :sink], y[:, sink + overflow :]], dim=1) for y in (self.k, self.v))
        heads = (y.transpose(1, 2) for y in (q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class RolledWan:
    """A plain WanTransformer3DModel whose chunks see a rolled window of K and V."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rope = model.rope.forward
        self.processors = [RolledProcessor() for _ in model.blocks]
        for block, processor in zip(model.blocks, self.processors, strict=True):
            block.attn1.set_processor(processor)

    @torch.no_grad()
    def __call__(self, latents, timestep, text, start_frame, again):
        def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
            whole = self.rope(x.new_empty(1, CHANNELS, start_frame + FRAMES, *SIZE))
            cos, sin = (table[:, start_frame * TOKENS :] for table in whole)
            return cos, sin

        self.model.rope.forward = shifted
        for processor in self.processors:
            processor.again = again
        return self.model(latents, timestep, text, return_dict=False)[0]


def chunks(count: int, dtype: torch.dtype = torch.float32) -> list[list[tuple[Tensor, Tensor]]]:
    """For each chunk (latents, timestep) of two steps and the context update."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(count, 3, 1, CHANNELS, FRAMES, *SIZE, generator=generator).to(dtype)
    return [[(x, torch.tensor([t])) for x, t in zip(chunk, (999, 500, 0), strict=True)] for chunk in latents]


@torch.no_grad()
def causal(model: Any, state: RealtimeCausalDiTState, chunk: Any, text: Tensor, start: int) -> list[Tensor]:
    """The chunk's two steps, then its context update."""
    *steps, (clean, zero) = chunk
    out = [model(x, t, text, state=state, start_frame=start, return_dict=False)[0] for x, t in steps]
    assert model(clean, zero, text, state=state, start_frame=start, update_cache_only=True) is None
    return out


def text(seed: int = 4) -> Tensor:
    return torch.randn(1, 5, TEXT, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fused_projections", [False, True])
def test_a_rollout_with_eviction_equals_a_rolled_cache(fused_projections):
    model, rolled = make(), RolledWan(make())
    if fused_projections:
        model.fuse_qkv_projections()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    state = RealtimeCausalDiTState()
    for index, chunk in enumerate(chunks(6)):
        start = index * FRAMES
        got = causal(model, state, chunk, text(), start)
        want = [rolled(x, t, text(), start, again=i > 0) for i, (x, t) in enumerate(chunk)]
        for a, b in zip(got, want, strict=False):
            assert a.shape == b.shape and error(a, b) < 2e-6, index
    assert state.stats()["visible_tokens"] == WINDOW * TOKENS
    assert state.next_frame == 6 * FRAMES


def test_bfloat16_rollout_is_within_1_25_of_the_rolled_formulation():
    torch.manual_seed(0)
    half, plain, exact = (make().to(torch.bfloat16) for _ in range(3))
    plain.rope = make().rope  # float32, as from_pretrained keeps it
    exact = exact.double()
    exact.rope = make().double().rope
    accelerate(half, kv_cache=KVWindow(WINDOW, SINK))
    state, plain, exact = RealtimeCausalDiTState(), RolledWan(plain), RolledWan(exact)
    got, want, oracle = [], [], []
    prompt = text().bfloat16()
    for index, chunk in enumerate(chunks(6, torch.bfloat16)):
        got += causal(half, state, chunk, prompt, index * FRAMES)
        for i, (x, t) in enumerate(chunk):
            a = plain(x, t, prompt, index * FRAMES, i > 0)
            b = exact(x.double(), t, prompt.double(), index * FRAMES, i > 0)
            if i < 2:
                want.append(a)
                oracle.append(b)
    got, want, oracle = (torch.cat(x) for x in (got, want, oracle))
    assert error(got, oracle) <= 1.25 * error(want, oracle)


def test_the_first_chunk_is_an_ordinary_forward_and_ordinary_forwards_stay_so():
    model = make()
    (x, t), *_ = chunks(1)[0]
    with torch.no_grad():
        plain = model(x, t, text()).sample
        accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
        ordinary = model(x, t, text()).sample
        state = RealtimeCausalDiTState()
        first = model(x, t, text(), state=state, start_frame=0).sample
        assert error(first, plain) < 2e-6
        assert torch.equal(model(x, t, text()).sample, ordinary)
        restore(model)
        assert torch.equal(model(x, t, text()).sample, plain)


def test_an_offset_of_every_start_frame_changes_nothing():
    """Attention sees differences of positions alone."""
    model = make()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    outs = []
    for offset in (0, 5000):
        state, out = RealtimeCausalDiTState(), []
        for index, chunk in enumerate(chunks(3)):
            out += causal(model, state, chunk, text(), offset + index * FRAMES)
        outs.append(torch.cat(out))
    assert error(*outs) < 1e-4  # positions near 5000 in float32 tables


def test_sessions_can_be_interleaved_and_start_again():
    model = make()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    prompts, states = [text(7), text(8)], [RealtimeCausalDiTState() for _ in range(2)]
    alone = []
    for prompt in prompts:
        state = RealtimeCausalDiTState()
        alone.append([causal(model, state, chunk, prompt, i * FRAMES) for i, chunk in enumerate(chunks(5))])
    for i, chunk in enumerate(chunks(5)):
        for which, (prompt, state) in enumerate(zip(prompts, states, strict=True)):
            got = causal(model, state, chunk, prompt, i * FRAMES)
            assert all(torch.equal(a, b) for a, b in zip(got, alone[which][i], strict=True))
    states[0].dispose()
    again = causal(model, states[0], chunks(5)[0], prompts[0], 0)
    assert all(torch.equal(a, b) for a, b in zip(again, alone[0][0], strict=True))


def test_text_keys_are_made_once_a_prompt():
    model, state, prompt = make(), RealtimeCausalDiTState(), text()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    for i, chunk in enumerate(chunks(2)):
        causal(model, state, chunk, prompt, i * FRAMES)
    stats = state.stats()["text"]
    assert (stats["misses"], stats["hits"]) == (1, 5)
    causal(model, state, chunks(3)[2], text(9), 2 * FRAMES)
    assert state.stats()["text"]["misses"] == 2


def test_the_context_update_stops_at_the_last_write():
    model, state = make(), RealtimeCausalDiTState()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    calls = []
    last = model.blocks[-1]
    for name in ("to_q", "to_k", "to_v", "to_out"):
        module = getattr(last.attn1, name)
        module = module[0] if name == "to_out" else module
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    last.attn2.register_forward_hook(lambda *_: calls.append("attn2"))
    model.proj_out.register_forward_hook(lambda *_: calls.append("proj_out"))
    clean, zero = chunks(1)[0][2]
    with torch.no_grad():
        model(clean, zero, text(), state=state, start_frame=0, update_cache_only=True)
        assert calls == ["to_k", "to_v"]
        held = [x.clone() for pair in state.kv_cache.layers for x in pair]
        model(clean, zero, text(), state=state, start_frame=0)
    visible = FRAMES * TOKENS
    for a, b in zip(held, [x for pair in state.kv_cache.layers for x in pair], strict=True):
        assert torch.equal(a[:, :visible], b[:, :visible])


def test_refusals_leave_the_session_as_it_was():
    model, state = make(), RealtimeCausalDiTState()
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    for i, chunk in enumerate(chunks(2)):
        causal(model, state, chunk, text(), i * FRAMES)
    held = [x.clone() for pair in state.kv_cache.layers for x in pair]
    good = dict(
        hidden_states=chunks(1)[0][0][0], timestep=torch.tensor([1]), encoder_hidden_states=text(), state=state,
        start_frame=2 * FRAMES,
    )  # fmt: skip
    wide = torch.randn(1, CHANNELS, FRAMES, 4, 12)
    bad = [
        (dict(start_frame=9), "leaves a gap"),
        (dict(start_frame=0), "goes back"),
        (dict(start_frame=None), "start_frame: got None"),
        (dict(start_frame=-1), "start_frame: got -1"),
        (dict(timestep=torch.ones(1, FRAMES * TOKENS)), "timestep: got shape"),
        (dict(hidden_states=wide), "layout"),
        (dict(hidden_states=torch.randn(1, CHANNELS, FRAMES, 5, 8)), "hidden_states: got"),
        (dict(hidden_states=torch.randn(1, CHANNELS, 7, *SIZE)), "capacity - sink"),
        (dict(attention_kwargs={"scale": 0.5}), "attention_kwargs: got"),
    ]
    for change, message in bad:
        with pytest.raises((ValueError, TypeError), match=message), torch.no_grad():
            model(**(good | change))
        assert state.next_frame == 2 * FRAMES
    for a, b in zip(held, [x for pair in state.kv_cache.layers for x in pair], strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    other = make(seed=2)
    accelerate(other, kv_cache=KVWindow(WINDOW, SINK))
    with pytest.raises(ValueError, match="another model"), torch.no_grad():
        other(**good)


def test_inference_mode_may_come_and_go_within_a_session():
    model = make(num_layers=2)
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    plain, mixed = RealtimeCausalDiTState(), RealtimeCausalDiTState()
    prompt = text()
    for index, chunk in enumerate(chunks(5)):
        want = causal(model, plain, chunk, prompt, index * FRAMES)
        with torch.inference_mode(index % 2 == 0):
            got = causal(model, mixed, chunk, prompt, index * FRAMES)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("part", ["blocks", "whole"])
def test_a_compiled_transformer_rolls_out_alike(part):
    """Blocks without a graph break; the whole with one, for the session's bookkeeping."""
    model = make(num_layers=2)
    accelerate(model, kv_cache=KVWindow(WINDOW, SINK))
    eager, compiled = [], []
    for out in (eager, compiled):
        state, called = RealtimeCausalDiTState(), model
        if out is compiled and part == "blocks":
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        elif out is compiled:
            called = torch.compile(model, backend="aot_eager")
        for index, chunk in enumerate(chunks(5)):
            out += causal(called, state, chunk, text(), index * FRAMES)
    assert error(torch.cat(compiled), torch.cat(eager)) < 1e-6
    torch.compiler.reset()
