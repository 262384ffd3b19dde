"""The streaming decoder against diffusers' own decoding of the whole latent video."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKLWan

from lingbot_kernels.decoding import Columns, StreamingDecoder, split

LATENT_FRAMES, HEIGHT, WIDTH = 5, 3, 4
CUTS = [
    [b - a for a, b in itertools.pairwise((0, *cut, LATENT_FRAMES))]
    for count in range(LATENT_FRAMES)
    for cut in itertools.combinations(range(1, LATENT_FRAMES), count)
]


def make_vae(**config) -> AutoencoderKLWan:
    """A decoder with norms that differ between channels and pixels of about unit size."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{"base_dim": 16, **config}).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    probe = vae.decode(torch.randn(1, vae.config.z_dim, 2, 4, 4)).sample
    vae.decoder.conv_out.weight.mul_(0.4 / probe.std())
    return vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return make_vae()


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 16, LATENT_FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents).sample[0].permute(1, 2, 3, 0)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def decibel(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Peak signal to noise of the worst frame, for pixels of -1 to 1."""
    errors = (got.double() - exact.double()).square().mean((1, 2, 3))
    return 10 * math.log10(4 / float(errors.max()))


@pytest.mark.parametrize("form", (None, "stacked", "frames"))
def test_every_cut_gives_the_same_bits_and_diffusers_video(vae, latents, form):
    decoder = StreamingDecoder.from_vae(vae, form=form)
    expected = whole(vae, latents)
    first = None
    for cut in CUTS:
        stream = decoder.open(HEIGHT, WIDTH, pixels=torch.float32)
        parts = [stream.decode(part) for part in latents.split(cut, 2)]
        assert [len(part) for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(cut)]
        frames = torch.cat(parts)
        assert first is None or torch.equal(frames, first), cut
        first = frames
    assert relative_error(first, expected) < 1e-5
    assert (expected.abs() >= 1).any()  # clamping is part of it


def test_float64_is_nearer_than_float32(latents):
    vae = make_vae().double()
    exact = whole(vae, latents.double())  # but for diffusers' upsampling, which rounds to float32
    decoder = StreamingDecoder.from_vae(vae, dtype=torch.float64)
    assert relative_error(decoder.open(HEIGHT, WIDTH, pixels=torch.float64).decode(latents), exact) < 2e-7


# float16 keeps 11 bits of a convolution's operands and bfloat16 8: three bits are 18 dB. So it isn't the default.
@pytest.mark.parametrize(("dtype", "least"), ((torch.float16, 60), (torch.bfloat16, 43)))
def test_sixteen_bits_against_float32(vae, latents, dtype, least):
    stream = StreamingDecoder.from_vae(vae, dtype=dtype).open(HEIGHT, WIDTH, pixels=torch.float32)
    frames = stream.decode(latents[:, :, :3])
    found = decibel(frames, whole(vae, latents[:, :, :3]))
    plain = whole(make_vae().to(dtype), latents[:, :, :3].to(dtype)) if dtype == torch.bfloat16 else None
    assert found >= least
    assert plain is None or found > decibel(plain, whole(vae, latents[:, :, :3])) + 1


def test_bytes_are_the_rounded_pixels(vae, latents):
    decoder = StreamingDecoder.from_vae(vae)
    floats = decoder.open(HEIGHT, WIDTH, pixels=torch.float32).decode(latents)
    frames = decoder.open(HEIGHT, WIDTH).decode(latents)
    assert frames.dtype == torch.uint8
    assert (frames.float() - (floats + 1) * 127.5).abs().max() <= 0.5 + 1e-4
    assert frames.min() == 0 and frames.max() == 255


@pytest.mark.parametrize(
    "config",
    (
        {"dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1},
        {"dim_mult": [1, 1, 2], "temperal_downsample": [False, True], "num_res_blocks": 1},
        {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "num_res_blocks": 1},
    ),
    ids=("one doubling", "two", "four channels"),
)
def test_other_shapes_of_decoder(config):
    vae = make_vae(base_dim=8, **config)
    z = torch.randn(1, vae.config.z_dim, 4, 5, 3)
    frames = StreamingDecoder.from_vae(vae).open(5, 3, pixels=torch.float32).decode(z)
    assert relative_error(frames, whole(vae, z)) < 1e-5


@pytest.mark.parametrize("ranks", (2, 3))
def test_columns_of_each_rank_are_those_of_the_whole_frame(ranks):
    vae = make_vae(base_dim=8, dim_mult=[1, 1, 2], temperal_downsample=[False, True], num_res_blocks=1)
    z = torch.randn(1, 16, 4, 2, 60)
    decoder = StreamingDecoder.from_vae(vae)
    frames = decoder.open(2, 60, pixels=torch.float32).decode(z)
    for columns in (*split(240, ranks), Columns(101, 104)):
        stream = decoder.open(2, 60, columns=columns, pixels=torch.float32)
        assert all(stage.width < 60 * 2**i for i, stage in enumerate(stream._rings.columns[:3]))
        part = stream.decode(z)
        assert part.shape[2] == columns.width
        assert relative_error(part, frames[:, :, columns.low : columns.high]) < 1e-5


def test_streams_do_not_touch_each_other(vae, latents):
    decoder = StreamingDecoder.from_vae(vae)
    a, b = (decoder.open(HEIGHT, WIDTH) for _ in range(2))
    others = latents.flip(2)
    one, two = ([], [])
    for n in range(LATENT_FRAMES):
        one.append(a.decode(latents[:, :, n : n + 1]))
        two.append(b.decode(others[:, :, n : n + 1]))
    assert torch.equal(torch.cat(one), decoder.open(HEIGHT, WIDTH).decode(latents))
    assert torch.equal(torch.cat(two), decoder.open(HEIGHT, WIDTH).decode(others))


def test_reset_begins_anew(vae, latents):
    stream = StreamingDecoder.from_vae(vae).open(HEIGHT, WIDTH)
    first = stream.decode(latents)
    stream.reset()
    assert stream.latent_frames == 0
    assert torch.equal(stream.decode(latents), first)


def test_later_calls_leave_earlier_frames_alone(vae, latents):
    stream = StreamingDecoder.from_vae(vae).open(HEIGHT, WIDTH)
    first = stream.decode(latents[:, :, :2])
    kept = first.clone()
    stream.decode(latents[:, :, 2:])
    assert torch.equal(first, kept)


BAD_LATENTS = (
    (torch.zeros(1, 16, 2, 3, 5), ValueError, r"latents: got torch.float32 \[1, 16, 2, 3, 5\]"),
    (torch.zeros(2, 16, 2, 3, 4), ValueError, "latents: got"),
    (torch.zeros(1, 15, 2, 3, 4), ValueError, "latents: got"),
    (torch.zeros(1, 16, 2, 3, 4, dtype=torch.int32), TypeError, "latents: got torch.int32"),
    ([1], TypeError, "latents: got list"),
)


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_LATENTS, ids=range(len(BAD_LATENTS)))
def test_bad_latents_leave_the_stream_as_it_was(vae, latents, bad, kind, message):
    decoder = StreamingDecoder.from_vae(vae)
    stream, good = decoder.open(HEIGHT, WIDTH), decoder.open(HEIGHT, WIDTH)
    stream.decode(latents[:, :, :2])
    good.decode(latents[:, :, :2])
    with pytest.raises(kind, match=message):
        stream.decode(bad)
    assert torch.equal(stream.decode(latents[:, :, 2:]), good.decode(latents[:, :, 2:]))


def test_a_call_that_fails_half_way_is_remembered(vae, latents, monkeypatch):
    decoder = StreamingDecoder.from_vae(vae)
    stream = decoder.open(HEIGHT, WIDTH)
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError("no room")

    monkeypatch.setattr("lingbot_kernels.decoding.stream.frame_pixels", fail)
    with pytest.raises(MemoryError):
        stream.decode(latents)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        stream.decode(latents)
    stream.reset()
    assert torch.equal(stream.decode(latents), decoder.open(HEIGHT, WIDTH).decode(latents))


def test_a_closed_stream_frees_its_memory(vae, latents):
    stream = StreamingDecoder.from_vae(vae).open(HEIGHT, WIDTH)
    # Three input frames of each causal convolution; conv_in's at 16 channels, all else at the stage's.
    sizes = ((64, 1, 9), (64, 4, 5), (32, 16, 6), (16, 64, 6))
    rings = sum(3 * channels * area * count for channels, area, count in sizes) + 3 * 16
    rings += 3 * 32 * 4 + 3 * 64 * 1 + 3 * 64 * 4 + 3 * 64
    assert stream.nbytes() > 0.9 * 4 * HEIGHT * WIDTH * rings
    stream.close()
    stream.close()
    assert stream.nbytes() == 0
    with pytest.raises(RuntimeError, match="the stream is closed"):
        stream.decode(latents)


def test_bad_arguments(vae):
    decoder = StreamingDecoder.from_vae(vae)
    with pytest.raises(ValueError, match="height: got 0, must be 1 or more"):
        decoder.open(0, 4)
    with pytest.raises(ValueError, match="columns: got 3 to 40, must be within 0 to 32"):
        decoder.open(3, 4, columns=Columns(3, 40))
    with pytest.raises(TypeError, match=r"pixels: got torch\.int16"):
        decoder.open(3, 4, pixels=torch.int16)
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8"):
        StreamingDecoder.from_vae(vae, dtype=torch.int8)
    with pytest.raises(ValueError, match="form: got 'folded', must be one of stacked, frames"):
        StreamingDecoder.from_vae(vae, form="folded")
    with pytest.raises(TypeError, match="vae: got Linear, must be diffusers' AutoencoderKLWan"):
        StreamingDecoder.from_vae(torch.nn.Linear(1, 1))
    later = AutoencoderKLWan(base_dim=8, is_residual=True, patch_size=2, in_channels=12, out_channels=12)
    with pytest.raises(ValueError, match="vae: got is_residual True, patch_size 2"):
        StreamingDecoder.from_vae(later)
