"""One forward of a session's chunk, from the caller's arguments to the committed position: what surrounds the network.

Agree with the other ranks, check, plan the chunk's place in the ring, allocate where the session begins, fill the
session's caches, run the network eagerly or by a CUDA graph, commit. Nothing of it counts before everything has
succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingbot_kernels import nvtx, ops
from lingbot_kernels.models._inputs import check_chunk
from lingbot_kernels.ops._dispatch import requested_backend
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.realtime import memory
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState, check_session
from lingbot_kernels.realtime.chunk_inputs import ChunkInputs, PerBlock, TimeEmbeddings
from lingbot_kernels.realtime.graphs import SessionGraphs
from lingbot_kernels.realtime.kv_cache import CacheLayout, CrossAttentionCache, KeyValue, RingLayer, RingMemory
from lingbot_kernels.realtime.runtime_cache import TensorIdentity
from lingbot_kernels.ring import ChunkPlan, ChunkPosition
from lingbot_kernels.scalars import as_count

if TYPE_CHECKING:
    from lingbot_kernels.models.realtime_model import RealtimeModel


def forward(
    model: RealtimeModel,
    latents: Tensor,
    text: Tensor,
    timestep: float,
    *,
    state: RealtimeCausalDiTState,
    start_frame: int,
    camera: Tensor | None,
    step_index: int,
    update_cache_only: bool,
) -> Tensor | None:
    """`RealtimeModel.forward`, which documents it. Where it raises, the session is as it was."""
    device = model.device.type
    # Every dtype here is chosen; what a session keeps must not depend on autocast. The meta device has none.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return forward(
                model, latents, text, timestep, state=state, start_frame=start_frame, camera=camera,
                step_index=step_index, update_cache_only=update_cache_only,
            )  # fmt: skip
    check_session(state)
    with state.attempt():
        weights = model._weights.token(model)
        model.shard_group.agree_on_forward(
            model, weights, state, latents=latents, text=text, timestep=timestep, start_frame=start_frame,
            camera=camera, step_index=step_index, update_cache_only=update_cache_only,
        )  # fmt: skip
        check_chunk(model.config, model.device, latents, text, timestep, camera)
        start_frame, step_index = as_count("start_frame", start_frame, 0), as_count("step_index", step_index, -1)
        batch, _, frames, height, width = latents.shape
        _, ph, pw = model.config.patch_size
        layout = model.cache_layout(batch, (height // ph, width // pw))
        plan = state.plan(model._owner, layout, start_frame, frames)
        model.shard_group.shard(plan.tokens)  # refuses ranks without a token before the session begins
        if state.kv_cache is None:
            rings = ring_memory(model, state, layout, frames, camera is not None)
            state.begin(layout, rings, owner=model._owner)
        assert state.kv_cache is not None
        state.use_weights(weights)
        state.wait_for_context()
        shard = model.shard_group.shard(plan.tokens, state.kv_cache)
        with nvtx.range("embeddings"):
            inputs = ChunkInputs(
                latents.to(model.dtype),
                model._prepare_cached_rope_for_sequence_shard(state, shard.num_tokens, plan.first_token + shard.start),
                model._prepare_cached_time_embeddings(state, float(timestep), step_index),
                text_kv(model, state, text),
                None if camera is None else camera_modulation(model, state, camera, shard),
            )
        state.write(plan)
        out = _run(model, state, inputs, plan, update_cache_only, shard)
        state.commit(plan)
        return out


def _run(
    model: RealtimeModel,
    state: RealtimeCausalDiTState,
    inputs: ChunkInputs,
    plan: ChunkPlan,
    update_cache_only: bool,
    shard: SequenceShard,
) -> Tensor | None:
    """The network over the session's ring, by a graph of this backend choice where there can be one."""
    assert state.kv_cache is not None
    kv_cache = state.kv_cache

    def network(
        inputs: ChunkInputs, layers: Sequence[RingLayer], position: ChunkPosition, update_cache_only: bool
    ) -> Tensor | None:
        if shard.ranks > 1 and kv_cache.layout.k_dtype is not None and kv_cache.memory is None:  # copied by slots
            position = kv_cache.with_slots(position, plan.tokens)
        return model._run(inputs, layers, position, update_cache_only, shard)

    backend = requested_backend()
    graphs = _graphs(model, state)
    if graphs is not None and graphs.ready(inputs, kv_cache, plan, update_cache_only, backend):
        return graphs.run(network, inputs, kv_cache, plan, update_cache_only, backend)
    # A warm-up sees the ring as the capture will: compiled blocks then have nothing new to compile.
    warming = graphs is not None and graphs.warming
    position = kv_cache.device_position(plan) if warming else kv_cache.position(plan)
    return network(inputs, kv_cache.layers, position, update_cache_only)


def _graphs(model: RealtimeModel, state: RealtimeCausalDiTState) -> SessionGraphs | None:
    """Where a graph can serve: a replay would run no hook."""
    return state.graphs if model.cuda_graphs and model.device.type == "cuda" and not model._weights.hooked else None


def ring_memory(
    model: RealtimeModel, state: RealtimeCausalDiTState, layout: CacheLayout, frames: int, camera: bool
) -> RingMemory | None:
    """What the rings of a session that begins lie in, once all of the session is known to fit.

    Raises:
        NotEnoughMemory, ValueError: it can't fit, here or on another rank; every rank raises.
    """
    if not torch.compiler.is_compiling():
        plan = memory.session_memory(
            model.config, layout.grid, model.dtype, batch=layout.batch, frames=frames, ranks=model.shard_group.ranks,
            camera=camera, cuda_graphs=model.cuda_graphs, recipe=model.recipe, **state.switches,
        )  # fmt: skip
        error = memory.shortage("session", plan, model.device, memory.savings(plan, model.config))
        model.shard_group.agree({"memory": "enough" if error is None else str(error)})
        if error is not None:
            raise error
    return model.shard_group.ring_memory(layout)


def rope(model: RealtimeModel, state: RealtimeCausalDiTState, num_tokens: int, token_start: int) -> Tensor:
    """cos‖sin [num_tokens, head_dim] of this rank's tokens, from absolute index `token_start`; once per chunk."""
    assert state.kv_cache is not None
    grid, device, cfg = state.kv_cache.layout.grid, model.device, model.config
    key = (num_tokens, token_start, grid[0] * grid[1], grid[1], cfg.head_dim, cfg.rope_theta)
    return state.runtime_cache["rope"].get_or_compute(
        (*key, device),
        lambda: ops.rope_cos_sin(*key, device),
        lambda table: ops.rope_cos_sin(*key, device, out=table) if table.shape[0] == num_tokens else None,
    )


def time_embeddings(
    model: RealtimeModel, state: RealtimeCausalDiTState, timestep: float, step_index: int
) -> TimeEmbeddings:
    """What `timestep` adds to every block's modulation and the head's; made once a step of the schedule."""
    key = (step_index, timestep, (model.config.num_layers, model.config.dim), model.dtype, model.device)
    return state.runtime_cache["time_embeddings"].get_or_compute(key, lambda: model._embed_time(timestep))


def text_kv(model: RealtimeModel, state: RealtimeCausalDiTState, text: Tensor) -> Sequence[KeyValue] | PerBlock:
    """Every block's text K and V; made once per prompt. Every rank of a shard has all of it, since its tokens attend to
    the whole text with all heads. With `weighted_padding` one key is there for all of the padding.
    """
    store, keys = state.runtime_cache["text"], model.config.text_len
    if model.weighted_padding:
        keys = min(text.shape[1] + 1, keys)

    def compute() -> CrossAttentionCache | PerBlock:
        context = model.text_embedding(text, keys)
        if not store.enabled:
            return PerBlock(lambda i: model.blocks[i].cross_attn.project_text(context))
        return CrossAttentionCache([block.cross_attn.project_text(context) for block in model.blocks])

    def refill(cache: CrossAttentionCache) -> CrossAttentionCache | None:
        if cache.layers[0][0].shape[1] != keys:
            return None
        context = model.text_embedding(text, keys)
        for block, held in zip(model.blocks, cache.layers, strict=True):
            for old, new in zip(held, block.cross_attn.project_text(context), strict=True):
                old.copy_(new)
        return cache

    found = store.get_or_compute((TensorIdentity(text), keys), compute, refill)
    return found.layers if isinstance(found, CrossAttentionCache) else found


def camera_modulation(
    model: RealtimeModel, state: RealtimeCausalDiTState, camera: Tensor, shard: SequenceShard
) -> Sequence[KeyValue] | PerBlock:
    """Every block's camera (scale, shift) of this rank's tokens; made once per chunk and reused by its forwards."""
    store = state.runtime_cache["camera_modulation"]

    def compute(held: list[KeyValue] | None = None) -> list[KeyValue] | PerBlock | None:
        embedding = model._embed_camera(camera, shard)
        if not store.enabled:
            return PerBlock(lambda i: model.blocks[i].camera_modulation(embedding))
        if held is None:
            return [block.camera_modulation(embedding) for block in model.blocks]
        if held[0][0].shape != embedding.shape:
            return None
        return [block.camera_modulation(embedding, out) for block, out in zip(model.blocks, held, strict=True)]

    return store.get_or_compute(TensorIdentity(camera), compute, compute)
