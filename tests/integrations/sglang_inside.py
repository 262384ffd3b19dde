"""sglang's real classes under the adapter, on the CPU: run by `test_sglang.py` in a process that can import sglang."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_environment
import torch
from torch import Tensor

sglang_environment.install()

from sglang.multimodal_gen.runtime.layers.kvcache.causal_attention_cache import CausalSelfAttentionKVCache  # noqa: E402
from sglang.multimodal_gen.runtime.models.dits import lingbot_world as theirs  # noqa: E402

from lingbot_kernels import LingBotConfig, ops  # noqa: E402
from lingbot_kernels.benchmarks.sglang_peer import SglangPeer, version, why_not  # noqa: E402
from lingbot_kernels.integrations import sglang as adapter  # noqa: E402
from lingbot_kernels.integrations import sglang_ring  # noqa: E402
from lingbot_kernels.integrations.sglang import accelerate, is_accelerated, restore  # noqa: E402
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer  # noqa: E402
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState  # noqa: E402
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage  # noqa: E402
from lingbot_kernels.stages.schedule import Schedule  # noqa: E402

CHUNKS, SIZE, TIMES = 12, (6, 8), (1000, 750, 500, 250)
TOKENS = 3 * 3 * 4  # of a chunk
PROMPT_UPDATED, ACTIONS = "lingbot_prompt_updated", "camera_actions"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def schedule(name: str = "continuous") -> Schedule:
    return Schedule.make(name, TIMES, 5.0)


def own_model(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLingBotTransformer:
    """A tiny network whose output depends on its window: the biases and norms are random as well."""
    torch.manual_seed(0)
    model = CausalLingBotTransformer(LingBotConfig.preset("tiny", **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(("self_attn.q.weight", "self_attn.k.weight", "head.head.weight")):
                parameter.mul_(3)
    return model.to(dtype)


def peer_of(model: CausalLingBotTransformer, name: str = "continuous", **interactive: Any) -> SglangPeer:
    weights = model.state_dict()
    return SglangPeer(model.config, weights, SIZE, schedule(name), CPU, model.dtype, **interactive)


def inputs(chunks: int = CHUNKS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "noise": draw(1, 16, 3, *SIZE), "renoise": draw(3, 1, 16, 3, *SIZE), "camera": draw(1, 384, 3, *SIZE),
            "condition": draw(1, 20, 3, *SIZE),
        }
        for _ in range(chunks)
    ]  # fmt: skip


TEXTS = [torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(7 + i)) for i in range(2)]


def rollout(
    peer: SglangPeer, chunks: int = CHUNKS, conditions: Callable[[int], Mapping[str, Any]] = lambda i: {},
    text: Callable[[int], Tensor] = lambda i: TEXTS[0],
) -> list[Tensor]:  # fmt: skip
    peer.begin()
    return [peer.chunk(text=text(i), conditions=conditions(i), **given) for i, given in enumerate(inputs(chunks))]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    assert all(bool(x.isfinite().all()) for x in (*got, *want))
    return max(relative(a, b) for a, b in zip(got, want, strict=True))


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(scope="module")
def model() -> CausalLingBotTransformer:
    return own_model()


@pytest.fixture
def peer(model):
    return peer_of(model)


def test_sglang_is_there():
    assert why_not() is None
    assert version() == sglang_environment.VERSION


@pytest.mark.parametrize("name", ["continuous", "official"])
@pytest.mark.parametrize("sink", [3, 6])
def test_parity_over_chunks_with_eviction(name, sink):
    model = own_model(sink_frames=sink)
    peer = peer_of(model, name)
    plain = rollout(peer)
    accelerate(peer.transformer)
    accelerated = rollout(peer)
    assert type(peer.state.kv_cache[0]) is sglang_ring.RingKVCache
    assert worst(accelerated, plain) <= 1e-5
    assert same(rollout(peer), accelerated)
    restore(peer.transformer)
    assert same(rollout(peer), plain)
    accelerate(peer.transformer)
    assert same(rollout(peer), accelerated)
    state, stage = RealtimeCausalDiTState(), CausalDenoisingStage(model, TIMES, schedule=schedule(name))
    own = [stage.denoise_chunk(state, text=TEXTS[0], **given) for given in inputs()]
    assert worst(accelerated, own) <= 1e-5


def test_the_window_matters_to_what_is_compared():
    small, large = (rollout(peer_of(own_model(window_frames=frames))) for frames in (9, 18))
    assert worst(small[:3], large[:3]) == 0
    assert relative(small[-1], large[-1]) > 1e-3


def test_bfloat16_errs_no_more_than_sglang_does():
    truth = rollout(peer_of(own_model(torch.bfloat16).float()))
    peer = peer_of(own_model(torch.bfloat16))
    plain = rollout(peer)
    accelerate(peer.transformer)
    errors, plain_errors = ([relative(x, y) for x, y in zip(run, truth, strict=True)] for run in (rollout(peer), plain))
    assert sum(errors) <= 1.25 * sum(plain_errors)


def test_prompt_switch_and_camera_events(peer):
    def conditions(i: int) -> dict[str, Any]:
        return {PROMPT_UPDATED: i == 5}

    def text(i: int) -> Tensor:
        return TEXTS[int(i >= 5)]

    plain = rollout(peer, conditions=conditions, text=text)
    accelerate(peer.transformer)
    assert worst(rollout(peer, conditions=conditions, text=text), plain) <= 1e-5
    assert relative(plain[6], rollout(peer)[6]) > 1e-4


def test_interactive_window(model):
    options = dict(interactive_kv_window_enable=True, interactive_kv_moving_window=9, interactive_kv_still_window=3)
    peer = peer_of(model, **options)

    def conditions(i: int) -> dict[str, Any]:
        return {ACTIONS: [["w"], [], []] if i % 6 < 3 else [[], [], []]}

    plain = rollout(peer, conditions=conditions)
    accelerate(peer.transformer)
    assert worst(rollout(peer, conditions=conditions), plain) <= 1e-5
    assert relative(plain[-1], rollout(peer_of(model))[-1]) > 1e-4


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("at", [4, 9])
def test_a_session_goes_on_through_accelerate_and_restore(peer, accelerated_first, at):
    plain = rollout(peer)
    peer.begin()
    if accelerated_first:
        accelerate(peer.transformer)
    got = []
    for i, given in enumerate(inputs()):
        if i == at:
            (restore if accelerated_first else accelerate)(peer.transformer)
        got.append(peer.chunk(text=TEXTS[0], **given))
    assert worst(got, plain) <= 1e-5


def test_a_ring_left_alone_is_what_sglang_would_hold(peer):
    rollout(peer)
    plain = [(c.k.clone(), c.v.clone()) for c in peer.state.kv_cache]
    accelerate(peer.transformer)
    rollout(peer)
    for cache, (k, v) in zip(peer.state.kv_cache, plain, strict=True):
        assert relative(cache.k, k) > 0.1  # the order is another
        sglang_ring.leave(cache)
        assert type(cache) is CausalSelfAttentionKVCache
        assert relative(cache.k, k) <= 1e-5 and relative(cache.v, v) <= 1e-5


def test_in_inference_mode(peer):
    plain = rollout(peer)
    accelerate(peer.transformer)
    with torch.inference_mode():
        assert worst(rollout(peer), plain) <= 1e-5


def counted(monkeypatch, owner: Any, name: str) -> list[int]:
    calls = [0]
    whole = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("inference", [False, True])
def test_the_camera_modulation_is_made_once_per_chunk(peer, monkeypatch, inference):
    accelerate(peer.transformer)
    made = counted(monkeypatch, theirs.LingBotWorldCamConditioner, "compute_scale_shift")
    with torch.inference_mode(inference):
        rollout(peer, 3)
    assert made == [3 * len(peer.transformer.blocks)]


def test_a_context_update_ends_with_keys_and_values(peer, monkeypatch):
    accelerate(peer.transformer)
    writes = counted(monkeypatch, ops, "k_norm_rope_kv_write")
    attends = counted(monkeypatch, ops, "windowed_attention")
    rollout(peer, 2)
    layers = len(peer.transformer.blocks)
    assert writes == [2] and attends == [2 * (5 * layers - 1)]


def test_layers_that_are_not_plain_run_by_their_forward(peer):
    """A quantised linear, an adapter: called as modules, with no copy of QKV made."""
    accelerate(peer.transformer)
    want = rollout(peer, 2)
    block = peer.transformer.blocks[1]
    calls = []

    class Doubled(type(block.ffn.fc_in)):
        def forward(self, x: Tensor) -> Any:
            calls.append("ffn")
            out, bias = super().forward(x)
            return 2 * out, bias

    block.ffn.fc_in.__class__ = Doubled
    assert worst(rollout(peer, 2), want) > 1e-3 and calls
    block.ffn.fc_in.__class__ = Doubled.__base__
    handle = block.ffn.register_forward_hook(lambda *_: calls.append("hook"))
    assert worst(rollout(peer, 2), want) <= 1e-5 and "hook" in calls
    handle.remove()
    block._fused_qkv_weight = block._fused_qkv_bias = None
    block.to_k.register_forward_hook(lambda *_: calls.append("k"))
    assert worst(rollout(peer, 2), want) <= 1e-5
    assert calls.count("k") == 2 * 5 and block._fused_qkv_weight is None


def test_hooks_on_blocks_run(peer):
    """As layerwise offload installs them: weights are there within a block's forward alone."""
    accelerate(peer.transformer)
    want = rollout(peer, 2)
    for block in peer.transformer.blocks:
        home = {name: p.data for name, p in block.named_parameters()}

        def fetch(module: Any, *_: Any, home: dict[str, Tensor] = home) -> None:
            for name, p in module.named_parameters():
                p.data = home[name].clone()

        def release(module: Any, *_: Any) -> None:
            for p in module.parameters():
                p.data = torch.empty(0)

        release(block)
        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(release)
    assert same(rollout(peer, 2), want)


def refused(peer: SglangPeer, match: str, kind: type[Exception] = ValueError) -> None:
    before = {name: dict(module.__dict__) for name, module in peer.transformer.named_modules()}
    with pytest.raises(kind, match=match):
        accelerate(peer.transformer)
    assert not is_accelerated(peer.transformer)
    assert all("forward" not in module.__dict__ or before[name].get("forward") for name, module in
               peer.transformer.named_modules())  # fmt: skip


@pytest.mark.parametrize(
    "function, match",
    [
        ("get_tp_world_size", "tensor parallelism: got 2"),
        ("get_ring_parallel_world_size", "ring parallelism: got 2"),
    ],
)
def test_parallelism_that_is_not_served(peer, monkeypatch, function, match):
    monkeypatch.setattr(theirs, function, lambda: 2)
    refused(peer, match)


@pytest.mark.parametrize("strategy", ["kvgather_replicated", "kvgather_sharded", "ring"])
def test_sharding_that_is_not_served(peer, monkeypatch, strategy):
    monkeypatch.setattr(theirs, "get_ulysses_parallel_world_size", lambda: 2)
    monkeypatch.setenv("SGLANG_LINGBOT_SP_STRATEGY", strategy)
    refused(peer, f"SGLANG_LINGBOT_SP_STRATEGY: got '{strategy}'")


def test_modules_that_are_not_served(peer):
    refused(SimpleNamespace(transformer=torch.nn.Linear(2, 2)), "transformer: got Linear", TypeError)
    handle = peer.transformer.blocks[1].norm_q.register_forward_hook(lambda *_: None)
    refused(peer, r"blocks.1.norm_q: has hooks")
    handle.remove()
    peer.transformer.blocks[2].norm_k.variance_epsilon = 0.1
    refused(peer, r"blocks.2.norm_q, norm_k")
    peer.transformer.blocks[2].norm_k.variance_epsilon = 1e-6
    accelerate(peer.transformer)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(peer.transformer)
    restore(peer.transformer)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(peer.transformer)


def test_what_comes_after_accelerate_is_refused_by_name(peer):
    accelerate(peer.transformer)
    handle = peer.transformer.blocks[0].cam_conditioner.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.0\.cam_conditioner: has hooks"):
        rollout(peer, 1)
    handle.remove()
    ours = peer.transformer.blocks[1].forward
    peer.transformer.blocks[1].forward = lambda *a, **k: ours(*a, **k)
    for call in (lambda: rollout(peer, 1), lambda: restore(peer.transformer)):
        with pytest.raises(ValueError, match=r"blocks\.1: its forward was replaced"):
            call()
    peer.transformer.blocks[1].forward = ours
    restore(peer.transformer)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"allow_growth": True}, "allow_growth: got True"),
        ({"global_sink_tokens": 4}, "global_sink_tokens: got 4"),
        ({"pinned_start": 40, "pinned_len": 12}, "pinned at 40"),
        ({"attention_window_size": 24}, "attention_window_size 24"),
        ({"cache_size": 30}, "cache_size 30"),
    ],
)
def test_caches_that_are_no_rings(peer, change, match):
    accelerate(peer.transformer)
    rollout(peer, 2)
    last = peer.state.kv_cache[-1]
    kept = [(c.k.clone(), c.v.clone(), c.global_end_index_int) for c in peer.state.kv_cache]
    for name, value in change.items():
        setattr(last, name, value)
    if "cache_size" in change:  # of the first, by which the stage would begin anew
        assert peer.state.kv_cache[0] is not last
    with pytest.raises(ValueError, match=match):
        peer.chunk(text=TEXTS[0], **inputs(3)[2])
    for cache, (k, v, end) in zip(peer.state.kv_cache, kept, strict=True):
        assert torch.equal(cache.k, k) and torch.equal(cache.v, v) and cache.global_end_index_int == end


def test_a_packed_cache_is_refused(peer):
    class Packed:
        cache_size, sink_tokens, num_cache_heads = 18 * 12, 3 * 12, 2

    accelerate(peer.transformer)
    rollout(peer, 1)
    peer.state.kv_cache[-1] = Packed()
    with pytest.raises(TypeError, match=r"kv_cache\[2\]: got Packed"):
        peer.chunk(text=TEXTS[0], **inputs(2)[1])


def cache(capacity: int = 10, sink: int = 2) -> CausalSelfAttentionKVCache:
    k, v = torch.zeros(2, 1, capacity, 1, 2)
    zero = torch.zeros(1, dtype=torch.long)
    return CausalSelfAttentionKVCache(
        k, v, zero, zero.clone(), global_end_index_int=0, local_end_index_int=0, sink_tokens=sink
    )


@pytest.mark.parametrize("sink, tokens", [(2, 3), (0, 3), (2, 4), (3, 7), (0, 1), (5, 5)])
def test_a_ring_holds_the_same_tokens_in_another_order(sink, tokens):
    """Chunks that wrap around and chunks that begin in the sink, against sglang's rolling."""
    rolled, ring = cache(sink=sink), cache(sink=sink)
    sglang_ring.enter(ring)
    for start in range(0, 10 * tokens, tokens):
        new = torch.arange(start, start + tokens).view(1, -1, 1, 1) + torch.ones(1, 1, 1, 2)
        for _ in range(2):  # each step of a chunk writes it again
            view = rolled.update_and_get_attention_kv(key=new, value=-new, current_chunk_start=start)
            where = sglang_ring.place("ring", ring, start, tokens)
            sglang_ring.write(ring, where, new, -new)
            sglang_ring.commit(ring, where)
        assert sorted(view.k[0, :, 0, 0].tolist()) == sorted(ring.k[0, : where.num_visible, 0, 0].tolist())
    copied = copy.deepcopy(ring)
    sglang_ring.leave(copied)
    assert torch.equal(copied.k, rolled.k) and torch.equal(copied.v, rolled.v)
    sglang_ring.enter(copied)
    assert torch.equal(copied.k, ring.k)
    # sglang's own method on a ring: the order of time, and as if it had been so all along
    start = 10 * tokens
    new = torch.full((1, tokens, 1, 2), 77.0)
    for each in (rolled, ring):
        each.update_and_get_attention_kv(key=new, value=new, current_chunk_start=start)
    assert type(ring) is CausalSelfAttentionKVCache and torch.equal(ring.k, rolled.k)


@pytest.mark.parametrize(
    "start, tokens, match", [(12, 3, "from 0 to 11"), (0, 3, "has left the window"), (11, 9, "a chunk of 9 tokens")]
)
def test_places_that_are_none(start, tokens, match):
    ring = cache()
    ring._write_indices(global_end_index=11, local_end_index=10)
    with pytest.raises(ValueError, match=match):
        sglang_ring.place("kv_cache[0]", ring, start, tokens)


def test_timesteps_of_each_frame(peer):
    """sglang's forward takes a timestep per frame: the modulation then goes by frame."""

    def forward() -> Tensor:
        from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

        rollout(peer, 1)
        given = inputs(2)[1]
        latents = torch.cat([given["noise"], given["condition"]], dim=1)
        text = torch.zeros(1, 16, 64)
        batch = SimpleNamespace(session=None, extra={}, enable_sequence_shard=False)
        with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=None, forward_batch=batch):
            return peer.transformer(
                latents, text, torch.tensor([[900.0, 500.0, 100.0]]), kv_cache=peer.state.kv_cache,
                crossattn_cache=peer.state.crossattn_cache, current_start=TOKENS, start_frame=3,
                c2ws_plucker_emb=given["camera"],
            )  # fmt: skip

    plain = forward()
    accelerate(peer.transformer)
    assert relative(forward(), plain) <= 1e-5
    assert adapter.is_accelerated(peer.transformer)
