"""The streaming decoder on a GPU: graphs, every cut, several streams in turns, halves, memory given back."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from lingbot_kernels.components.random_parts import random_vae
from lingbot_kernels.decoding import StreamingDecoder, split
from lingbot_kernels.pipeline import LingBotWorldPipeline

pytestmark = pytest.mark.gpu
SIZE = (10, 18)


@pytest.fixture(scope="module")
def vae():
    return random_vae(32, torch.device("cuda"))


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 16, 9, *SIZE, generator=torch.Generator().manual_seed(0)).cuda()


def decibel(got: torch.Tensor, want: torch.Tensor) -> float:
    errors = (got.double() - want.double()).square().mean((1, 2, 3))
    return 10 * math.log10(4 / float(errors.max()))


@pytest.mark.parametrize(("dtype", "least"), ((torch.float16, 60), (torch.float32, 90)))
@pytest.mark.parametrize("form", ("stacked", "frames"))
def test_every_cut_and_graphs_give_the_same_bits(vae, latents, dtype, least, form):
    decoder = StreamingDecoder.from_vae(vae, dtype=dtype, form=form)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want = vae.decode(latents).sample[0].permute(1, 2, 3, 0)
    outs = []
    for cut in ([9], [1] * 9, [3, 3, 3], [2, 7]):
        stream = decoder.open(*SIZE, pixels=torch.float32)
        outs.append(torch.cat([stream.decode(part) for part in latents.split(cut, 2)]))
        assert len(stream._graphs) == 3
        stream.close()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert decibel(outs[0], want) >= least


def test_streams_in_turns_share_a_pool_and_outlive_each_other(vae, latents):
    decoder = StreamingDecoder.from_vae(vae)
    alone = decoder.open(*SIZE).decode(latents)
    first, second = decoder.open(*SIZE), decoder.open(*SIZE)
    parts = []
    for n in range(9):
        if n == 6:
            second.close()
        parts.append(first.decode(latents[:, :, n : n + 1]))
        if n < 6:
            second.decode(latents[:, :, 8 - n : 9 - n])
    assert torch.equal(torch.cat(parts), alone)
    first.close()
    assert torch.equal(decoder.open(*SIZE).decode(latents), alone)


def test_halves_are_the_whole_frame_within_the_rounding_of_float16(vae, latents):
    decoder = StreamingDecoder.from_vae(vae)
    whole = decoder.open(*SIZE, pixels=torch.float32).decode(latents)
    halves = [decoder.open(*SIZE, columns=each, pixels=torch.float32).decode(latents) for each in split(144, 2)]
    assert decibel(torch.cat(halves, 2), whole) >= 60


def test_closing_gives_memory_back(vae, latents):
    decoder = StreamingDecoder.from_vae(vae)
    decoder.open(*SIZE).decode(latents)  # libraries' workspaces
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stream = decoder.open(*SIZE)
    frames = stream.decode(latents)
    assert torch.cuda.memory_allocated() > before + stream.nbytes() / 2
    stream.close()
    del frames
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("context", ("after", "beside"))
def test_a_world_s_frames_do_not_depend_on_where_its_context_is_updated(context):
    def walk(order: str) -> torch.Tensor:
        world = LingBotWorldPipeline.random("tiny", device="cuda", context=order)
        with world.session("a", height=64, width=96, seed=1) as session:
            return torch.cat([session.step(keys).cpu() for keys in ("w", "l", "", "w+l") * 3])

    frames = walk(context)
    assert torch.equal(frames, walk("after"))
    assert frames.float().std() > 20
