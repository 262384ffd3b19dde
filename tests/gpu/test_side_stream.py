"""The context update on a stream of its own: the bits of the plain order, and nothing read or written too early or too
late, whatever the caller does meanwhile.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState

SIZE, CHUNKS = (16, 24), 12  # the window of 6 chunks wraps; graphs replay from chunk 6 on
SHORT, LONG = 10**7, 2 * 10**9  # cycles: some 6 ms, and over a second


@pytest.fixture(scope="module")
def model() -> CausalLingBotTransformer:
    torch.manual_seed(1)
    config = LingBotConfig.preset("tiny", dim=256, num_heads=4, num_layers=2)
    return CausalLingBotTransformer(config, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["graphs", "eager"])
def stage(request: pytest.FixtureRequest, model: CausalLingBotTransformer) -> Iterator[CausalDenoisingStage]:
    model.cuda_graphs = request.param
    yield CausalDenoisingStage(model)
    model.cuda_graphs = True


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def noise(i: int) -> Tensor:
    return draw(100 + i, 1, 16, 3, *SIZE)


def chunk_inputs(model: CausalLingBotTransformer, i: int) -> dict[str, Tensor]:
    return {
        "text": draw(0 if i < 9 else 1, 1, 9, model.config.text_dim),  # another tensor each time, another prompt once
        "camera": draw(200 + i, 1, 384, 3, *SIZE),
        "condition": draw(300 + i, 1, 20, 3, *SIZE),
    }


def renoise(i: int) -> Tensor:
    return draw(400 + i, 3, 1, 16, 3, *SIZE)


def delay(stream: torch.cuda.Stream, cycles: int) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def poison() -> list[Tensor]:
    """NaN in blocks of many sizes: what the allocator would hand out of memory that is given back too early."""
    return [torch.full((2**n * k,), math.nan, device="cuda") for n in range(6, 24) for k in (1, 3) for _ in range(2)]


def decode(chunk: Tensor) -> Tensor:
    """A stand-in for the video decoder: products of the current stream that depend on the chunk."""
    x = chunk.flatten()[: 96 * 128].view(96, 128).repeat(8, 6)
    for _ in range(40):
        x = torch.tanh(x @ x.mT @ x / 512)
    return x


def ring(state: RealtimeCausalDiTState) -> list[Tensor]:
    assert state.kv_cache is not None
    return [x.clone() for layer in state.kv_cache.layers for x in layer]


def plain(stage: CausalDenoisingStage) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(Chunks, decoded chunks, the ring at the end) of the plain order on one stream."""
    state, chunks = RealtimeCausalDiTState(), []
    for i in range(CHUNKS):
        chunks.append(stage.denoise_chunk(state, noise(i), **chunk_inputs(stage.model, i), renoise=renoise(i)))
    return chunks, [decode(chunk) for chunk in chunks], ring(state)


def test_bits_are_those_of_the_plain_order(stage: CausalDenoisingStage) -> None:
    """Late side stream, arguments dropped and overwritten at once, memory poisoned, a decoder on the main stream."""
    chunks, decoded, held = plain(stage)
    state, side = RealtimeCausalDiTState(), torch.cuda.Stream()
    for i in range(CHUNKS):
        given = chunk_inputs(stage.model, i)
        chunk = stage.denoise_chunk(state, noise(i), **given, renoise=renoise(i), update_context=False)
        delay(side, SHORT)
        stage.update_context(state, chunk, **given, stream=side)
        shown = chunk.clone()
        chunk.fill_(math.nan)
        del chunk, given
        junk = poison()
        del junk
        picture = decode(shown)
        assert torch.equal(shown, chunks[i]), f"chunk {i}"
        assert torch.equal(picture, decoded[i]), f"decoded chunk {i}"
    assert (state.graphs.replays > 0) == stage.model.cuda_graphs
    state.wait_for_context()
    assert all(torch.equal(a, b) for a, b in zip(ring(state), held, strict=True))


def test_a_rollout_with_a_side_stream(stage: CausalDenoisingStage) -> None:
    """`torch.Stream` serves as well; streams may change from chunk to chunk."""
    chunks, _, held = plain(stage)
    state, sides = RealtimeCausalDiTState(), [torch.cuda.Stream(), torch.Stream(device="cuda"), None]
    for i in range(CHUNKS):
        got = stage.denoise_chunk(
            state, noise(i), **chunk_inputs(stage.model, i), renoise=renoise(i), context_stream=sides[i // 2 % 3]
        )
        decode(got)
        assert torch.equal(got, chunks[i]), f"chunk {i}"
    state.wait_for_context()
    assert all(torch.equal(a, b) for a, b in zip(ring(state), held, strict=True))

    def rollout(stream: torch.cuda.Stream | None) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(5)
        return list(stage.rollout(
            RealtimeCausalDiTState(), 8, text=draw(0, 1, 9, stage.model.config.text_dim), latent_size=SIZE,
            generator=generator, context_stream=stream,
        ))  # fmt: skip

    assert all(torch.equal(a, b) for a, b in zip(rollout(None), rollout(torch.cuda.Stream()), strict=True))


def test_the_caller_s_stream_goes_on_and_the_next_forward_waits(model: CausalLingBotTransformer) -> None:
    model.cuda_graphs = False  # a capture waits for the whole device
    try:
        stage, state, side = CausalDenoisingStage(model), RealtimeCausalDiTState(), torch.cuda.Stream()
        chunks, _, _ = plain(stage)
        for i in range(2):  # what loads or compiles does so now
            stage.denoise_chunk(state, noise(i), **chunk_inputs(model, i), renoise=renoise(i), context_stream=side)
        given = [{**chunk_inputs(model, i), "renoise": renoise(i)} for i in (2, 3)]
        starts = [noise(2), noise(3)]
        torch.cuda.synchronize()

        delay(side, LONG)
        shown = stage.denoise_chunk(state, starts[0], **given[0], context_stream=side)
        there = torch.cuda.Event()
        there.record()
        there.synchronize()
        updated = state.context_update
        assert updated is not None and not updated.query(), "the chunk was there only after its context update"

        following = stage.denoise_chunk(state, starts[1], **given[1])
        done = torch.cuda.Event()
        done.record()
        assert not done.query() and not updated.query(), "the next chunk did not wait for the context update"
        done.synchronize()
        assert updated.query()
        assert torch.equal(shown, chunks[2]) and torch.equal(following, chunks[3])
    finally:
        model.cuda_graphs = True


@pytest.mark.parametrize("how", ["dropped", "disposed"])
def test_memory_is_not_handed_out_while_the_side_stream_works_with_it(stage: CausalDenoisingStage, how: str) -> None:
    """K and V that a late context update writes must not land in tensors that are made after the session is gone."""
    model, side = stage.model, torch.cuda.Stream()
    for _ in range(2):  # the first time warms up
        state = RealtimeCausalDiTState()
        for i in range(8):
            given = chunk_inputs(model, i)
            chunk = stage.denoise_chunk(state, noise(i), **given, renoise=renoise(i), update_context=False)
            if i == 7:
                torch.cuda.synchronize()
                delay(side, LONG // 4)
            stage.update_context(state, chunk, **given, stream=side)
        shapes = [x.shape for layer in state.kv_cache.layers for x in layer] if state.kv_cache is not None else []
        updated = state.context_update
        assert updated is not None and not updated.query()
        if how == "disposed":
            state.dispose()
            assert updated.query(), "dispose waits for the context update"
        del state, chunk, given
        gc.collect()
        made = [torch.full(shape, math.nan, device="cuda", dtype=torch.bfloat16) for shape in shapes] + poison()
        torch.cuda.synchronize()
        assert len(shapes) == 4 and all(bool(x.isnan().all()) for x in made)


def test_errors_leave_the_session(stage: CausalDenoisingStage) -> None:
    model, side, state = stage.model, torch.cuda.Stream(), RealtimeCausalDiTState()
    given = chunk_inputs(model, 0)
    chunk = stage.denoise_chunk(state, noise(0), **given, renoise=renoise(0), update_context=False)
    with pytest.raises(ValueError, match="stream: got one of cpu, must be of the model's device, cuda:0"):
        stage.update_context(state, chunk, **given, stream=torch.Stream(device="cpu"))
    with pytest.raises(TypeError, match="stream: got int, must be a"):
        stage.update_context(state, chunk, **given, stream=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="camera: got"):
        stage.update_context(state, chunk, **{**given, "camera": given["camera"][:, :8]}, stream=side)
    stage.update_context(state, chunk, **given, stream=side)
    state.wait_for_context()
    want = RealtimeCausalDiTState()
    stage.denoise_chunk(want, noise(0), **given, renoise=renoise(0))
    visible = want.stats()["visible_tokens"]
    assert all(torch.equal(a[:, :visible], b[:, :visible]) for a, b in zip(ring(state), ring(want), strict=True))
