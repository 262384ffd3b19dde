"""A session against its pieces called by hand, and what sessions owe each other and their callers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parts import tiny_transformer

from lingbot_kernels import CausalDenoisingStage, RealtimeCausalDiTState
from lingbot_kernels.models.camera import ActionStream, CameraStream
from lingbot_kernels.pipeline import LingBotWorldPipeline

SIZE = {"height": 32, "width": 48}
PROMPT = "a harbour at dawn"
WALK = ("w", "w+l", "", "a+i")


def walked(session, keys=WALK) -> list[torch.Tensor]:
    return [session.step(each) for each in keys]


def test_frames_equal_the_pieces_called_by_hand(pipeline, picture):
    with pipeline.session(PROMPT, picture, seed=5, **SIZE) as session:
        frames = walked(session)

    model, vae = pipeline.transformer, pipeline.vae
    tokens = pipeline.text_encoder.tokenizer(PROMPT, return_tensors="pt")
    text = pipeline.text_encoder.model(
        tokens.input_ids, attention_mask=tokens.attention_mask
    ).last_hidden_state.detach()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    video = torch.zeros(1, 3, 4 * 3 * len(WALK) - 3, 32, 48)
    video[:, :, 0] = torch.nn.functional.interpolate(image, size=(32, 48), mode="bicubic")
    latents = (vae.encode(video).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, 4, 3 * len(WALK), 4, 6)
    mask[:, :, 0] = 1
    condition = torch.cat([mask, latents], 1)

    stage, state, generator = CausalDenoisingStage(model), RealtimeCausalDiTState(), torch.Generator().manual_seed(5)
    walk, lens = ActionStream(), CameraStream(32, 48, scale=ActionStream().speed, fit="stretch")
    clean = []
    for chunk, keys in enumerate(WALK):
        noise = torch.randn(1, 16, 3, 4, 6, generator=generator)
        clean.append(
            stage.denoise_chunk(
                state, noise, text=text, condition=condition[:, :, 3 * chunk : 3 * chunk + 3],
                camera=lens.advance(walk.advance([keys] * 3)), generator=generator,
            )
        )  # fmt: skip
    pixels = vae.decode(torch.cat(clean, 2) * std + mean).sample[0].permute(1, 2, 3, 0)
    expected = (pixels * 127.5 + 128).floor().clamp(0, 255)
    assert [len(each) for each in frames] == [9, 12, 12, 12]
    difference = (torch.cat(frames).float() - expected).abs()
    assert difference.max() <= 1  # where float32 pixels stand on the edge between two bytes
    assert (difference > 0).float().mean() < 1e-3
    assert torch.cat(frames).float().std() > 20  # a picture, and not one colour


def test_both_layouts_give_the_same_frames(pipeline, official_layout, picture):
    official = LingBotWorldPipeline.from_pretrained(official_layout, device="cpu")
    one, two = (each.session(PROMPT, picture, seed=1, encode_ahead=False, **SIZE) for each in (pipeline, official))
    for a, b in zip(walked(one), walked(two), strict=True):
        assert torch.equal(a, b)


def test_sessions_interleaved_give_what_each_gives_alone(pipeline, picture):
    settings = [(PROMPT, picture, 1), ("gulls and the rain", None, 2), (PROMPT, picture[::-1].copy(), 1)]
    alone = [
        walked(pipeline.session(prompt, image, seed=seed, encode_ahead=False, **SIZE))
        for prompt, image, seed in settings
    ]
    sessions = [
        pipeline.session(prompt, image, seed=seed, encode_ahead=False, **SIZE) for prompt, image, seed in settings
    ]
    for chunk, keys in enumerate(WALK):
        for expected, session in zip(alone, sessions, strict=True):
            assert torch.equal(session.step(keys), expected[chunk])
    assert not torch.equal(alone[0][0], alone[2][0])


def test_lazy_encoding_changes_nothing(pipeline, picture):
    eager = pipeline.session(PROMPT, picture, seed=1, **SIZE)
    lazy = pipeline.session(PROMPT, picture, seed=1, encode_ahead=False, **SIZE)
    assert lazy._condition.encoded == 0 < eager._condition.encoded
    for a, b in zip(walked(eager), walked(lazy), strict=True):
        assert torch.equal(a, b)
    assert lazy._condition.encoded == 3 * len(WALK)


def test_a_new_prompt_keeps_the_history(pipeline):
    def run(second: str, history: bool) -> torch.Tensor:
        session = pipeline.session(PROMPT, seed=4, **SIZE)
        if history:
            session.step("w")
        session.set_prompt(second)
        return session.step("w")

    assert not torch.equal(run("gulls and the rain", True), run(PROMPT, True))
    session = pipeline.session(PROMPT, seed=4, **SIZE)
    first = session.step("w")
    assert torch.equal(first, pipeline.session(PROMPT, seed=4, **SIZE).step("w"))
    # With the same second prompt the chunk still depends on what came before.
    other = pipeline.session("a forest", seed=4, **SIZE)
    other.step("w")
    other.set_prompt("gulls and the rain")
    assert not torch.equal(run("gulls and the rain", True), other.step("w"))


def test_frames_come_before_the_context_update(pipeline, monkeypatch):
    order = []
    stage = pipeline.stage
    update, decode = stage.update_context, None
    session = pipeline.session(PROMPT, seed=1, **SIZE)
    decode = session._decoder.decode
    monkeypatch.setattr(session._decoder, "decode", lambda z: order.append("frames") or decode(z))
    monkeypatch.setattr(stage, "update_context", lambda *a, **k: order.append("context") or update(*a, **k))
    session.step("w")
    assert order == ["frames"]
    session.settle()
    session.settle()
    assert order == ["frames", "context"]
    session.step("w")
    session.step("w")
    assert order == ["frames", "context", "frames", "context", "frames"]


def test_settling_early_changes_nothing(pipeline):
    plain, settled = (pipeline.session(PROMPT, seed=1, **SIZE) for _ in range(2))
    for keys in WALK:
        a, b = plain.step(keys), settled.step(keys)
        settled.settle()
        assert torch.equal(a, b)


def test_keys_for_a_chunk_or_for_each_latent_frame(pipeline):
    one, three = (pipeline.session(PROMPT, seed=1, **SIZE) for _ in range(2))
    assert torch.equal(one.step("w+l"), three.step(["w+l", "w+l", "w+l"]))
    assert torch.equal(one.step(), three.step(""))
    assert not torch.equal(one.step("w"), three.step(["w", "", "l"]))


def test_poses_equal_the_embedding_that_they_make(pipeline):
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 6)
    lens = CameraStream(32, 48, fit="stretch")
    one, two = (pipeline.session(PROMPT, seed=1, **SIZE) for _ in range(2))
    for chunk in (poses[:3], poses[3:]):
        assert torch.equal(one.step(camera=chunk), two.step(camera=lens.advance(chunk)))
    with pytest.raises(ValueError, match="camera: got None, must be the chunk's poses"):
        one.step()
    with pytest.raises(ValueError, match="steered by poses"):
        one.step("w")
    with pytest.raises(ValueError, match="camera: got 2 poses, must be 3"):
        one.step(camera=poses[:2])


BAD_STEPS = (
    ({"keys": "x"}, "unknown key 'x'"),
    ({"keys": ["w", "w"]}, "keys: got 2 latent frames, must be one entry for the chunk or 3"),
    ({"keys": "w", "camera": np.tile(np.eye(4), (3, 1, 1))}, "keys, camera: got both"),
    ({"camera": np.tile(np.eye(4), (3, 1, 1))}, "steered by keys"),
    ({"camera": torch.zeros(1, 384, 3, 4, 5)}, "camera"),
)


@pytest.mark.parametrize(("arguments", "message"), BAD_STEPS, ids=range(len(BAD_STEPS)))
def test_a_refused_step_leaves_the_session_as_it_was(pipeline, picture, arguments, message):
    bad, good = (pipeline.session(PROMPT, picture, seed=1, encode_ahead=False, **SIZE) for _ in range(2))
    assert torch.equal(bad.step("w"), good.step("w"))
    with pytest.raises((ValueError, TypeError), match=message):
        bad.step(**arguments)
    assert torch.equal(bad.step("w+l"), good.step("w+l"))


@pytest.mark.parametrize("step", (0, 2))
def test_a_step_that_fails_in_a_forward_can_be_tried_again(pipeline, monkeypatch, step):
    failing, good = (pipeline.session(PROMPT, seed=1, **SIZE) for _ in range(2))
    assert torch.equal(failing.step("w"), good.step("w"))
    forward, calls = pipeline.transformer.forward, []

    def interrupted(*args, **kwargs):
        if kwargs["step_index"] == step and not calls:
            calls.append(step)
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        failing.step("w+l")
    assert calls
    monkeypatch.undo()
    for keys in ("w+l", ""):
        assert torch.equal(failing.step(keys), good.step(keys))


def test_a_failed_decoder_ends_the_session(pipeline, monkeypatch):
    session = pipeline.session(PROMPT, seed=1, **SIZE)

    def fail(latents):
        raise MemoryError("no room")

    monkeypatch.setattr(session._decoder, "decode", fail)
    with pytest.raises(MemoryError):
        session.step("w")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="begin another session"):
        session.step("w")
    session.close()


BAD_SESSIONS = (
    ({"prompt": ""}, ValueError, "prompt: got '', must say something"),
    ({"prompt": " \n&nbsp;"}, ValueError, "must say something"),
    ({"prompt": 3}, TypeError, "prompt: got int, must be a string"),
    ({"prompt": "rain " * 40}, ValueError, "prompt: got 41 tokens, must have at most 16"),
    ({"prompt": "rain " * 40_000}, ValueError, "prompt: got 200000 characters, must have at most 100000"),
    ({"height": 32}, ValueError, "height, width: got 32 and None"),
    ({"height": 24, "width": 48}, ValueError, "height: got 24, must be a positive multiple of 16"),
    ({"intrinsics": (1, 2, 3)}, ValueError, "intrinsics"),
    ({"camera_scale": -1.0}, ValueError, "scale"),
    ({"image": "/nowhere/picture.png"}, ValueError, "image: /nowhere/picture.png: No such file"),
    ({"image": np.zeros((4, 4), np.uint8)}, ValueError, r"image: got uint8 \[4, 4\], must be uint8 \[H, W, 3\]"),
    ({"image": np.zeros((4, 4, 3))}, ValueError, "image: got float64"),
    ({"image": 7}, TypeError, "image: got int"),
    ({"image": np.zeros((2, 3000, 3), np.uint8)}, ValueError, "image: got 3000x2 pixels"),
)


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_SESSIONS, ids=range(len(BAD_SESSIONS)))
def test_bad_arguments_of_a_session(pipeline, arguments, kind, message):
    with pytest.raises(kind, match=message):
        pipeline.session(**{"prompt": PROMPT, **arguments})


def test_a_closed_session_says_so_and_frees_its_memory(pipeline, picture):
    session = pipeline.session(PROMPT, picture, seed=1, **SIZE)
    session.step("w")
    assert session.nbytes() > 1_000_000
    session.close()
    session.close()
    assert session.nbytes() == 0
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.step("w")


def test_a_network_without_camera_takes_no_keys(pipeline):
    plain = LingBotWorldPipeline(tiny_transformer(camera=False), pipeline.vae, pipeline.text_encoder)
    session = plain.session(PROMPT, seed=1, **SIZE)
    assert session.step("").shape == (9, 32, 48, 3)
    with pytest.raises(ValueError, match="the network has no camera layers"):
        session.step("w")


def test_parts_that_do_not_belong_together(pipeline):
    with pytest.raises(ValueError, match="text_encoder: got 32 channels, must have the transformer's 24"):
        LingBotWorldPipeline(tiny_transformer(text_dim=24), pipeline.vae, pipeline.text_encoder)
    with pytest.raises(ValueError, match="vae: got 16 latent channels, must have the transformer's 8"):
        LingBotWorldPipeline(tiny_transformer(out_channels=8), pipeline.vae, pipeline.text_encoder)
    with pytest.raises(ValueError, match="context: got 'before'"):
        LingBotWorldPipeline(pipeline.transformer, pipeline.vae, pipeline.text_encoder, context="before")


def test_the_default_size_follows_the_image(pipeline, picture):
    session = pipeline.session(PROMPT, picture, seed=1, encode_ahead=False)
    assert (session.height, session.width) == (480, 800)
    session = pipeline.session(PROMPT, seed=1)
    assert (session.height, session.width) == (480, 832)


def test_eight_bits_are_passed_on(diffusers_layout, pipeline):
    quantised = LingBotWorldPipeline.from_pretrained(diffusers_layout, device="cpu", precision="int8")
    assert quantised.transformer.precision == "int8"
    one, two = (each.session(PROMPT, seed=1, **SIZE).step("w").float() for each in (pipeline, quantised))
    assert 0 < (one - two).abs().mean() < 8


def test_a_random_world_reacts_to_keys_and_prompts():
    def frames(prompt: str, keys: str) -> torch.Tensor:
        session = world.session(prompt, height=32, width=48, seed=1)
        session.step("w")
        return session.step(keys)

    world = LingBotWorldPipeline.random(device="cpu", num_layers=1)
    first = frames("a", "w")
    assert torch.equal(first, frames("a", "w"))
    assert not torch.equal(first, frames("a", "l")) and not torch.equal(first, frames("b", "w"))
    again = LingBotWorldPipeline.random(device="cpu", num_layers=1).session("a", height=32, width=48, seed=1)
    again.step("w")
    assert torch.equal(first, again.step("w"))
    assert first.float().std() > 20
