"""The tiny world: its scene, its walks and latents against the library's own, the training network against
chunk-by-chunk inference, and a training that stops and goes on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lingbot_kernels import CausalLingBotTransformer, RealtimeCausalDiTState
from lingbot_kernels.models.camera import ActionStream, CameraStream
from lingbot_kernels.models.poses import DEFAULT_SPEED
from lingbot_kernels.reference.lingbot_world import PlainLingBotWorld

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_world import evaluate, journeys, latents, muon, network, pictures, scene, train, walks  # noqa: E402

SMALL = {"dim": 48, "layers": 2, "heads": 2, "ffn": 64, "side": 2, "height": 8, "width": 16, "clips": 2, "chunks": 3}


@pytest.fixture(scope="module")
def courtyard() -> scene.Scene:
    return scene.Scene.make()


@pytest.fixture(scope="module")
def some_walks(courtyard) -> walks.Walks:
    return walks.random_walks(courtyard, 40, 15, torch.Generator().manual_seed(3))


def looking(x: float, z: float, degrees: float) -> torch.Tensor:
    """A camera at (x, 0, z) turned to the right from +z."""
    angle = math.radians(degrees)
    pose = torch.eye(4)
    pose[0, 0] = pose[2, 2] = math.cos(angle)
    pose[0, 2], pose[2, 0] = math.sin(angle), -math.sin(angle)
    pose[0, 3], pose[2, 3] = x, z
    return pose[None]


def test_a_seed_is_a_scene(courtyard):
    again, other = scene.Scene.make(), scene.Scene.make(20)
    assert torch.equal(courtyard.pillars, again.pillars) and courtyard.sun == again.sun
    pose = looking(0, 0, 0)
    assert torch.equal(courtyard.render(pose, 8, 16), again.render(pose, 8, 16))
    assert not torch.equal(courtyard.render(pose, 8, 16), other.render(pose, 8, 16))


def test_every_wall_has_its_colour_and_depth(courtyard):
    for number, degrees in enumerate((0, 90, 180, 270)):
        toward = math.radians(degrees)
        x, z = 4.5 * math.sin(toward), 4.5 * math.cos(toward)
        centre = courtyard.render(looking(x, z, degrees), 9, 15, samples=1)[0, :, 4, 7]
        light, dark = (torch.tensor(colour) for colour in scene._WALLS[number])
        assert min((centre[:3] - colour).abs().max() for colour in (light, dark)) < 0.16
        assert centre[3].item() == pytest.approx(1 / (1 + scene.HALF - 4.5), rel=1e-5)


def test_a_pillar_stands_where_the_scene_says(courtyard):
    bare = scene.Scene(courtyard.pillars.clone(), courtyard.sun, courtyard.ridges)
    bare.pillars[:, 1] = 1e3
    for number, (x, z, radius, _) in enumerate(courtyard.pillars.tolist()):
        away = 1.2 + radius
        degrees = math.degrees(math.atan2(-x, -z))  # seen from further out, towards the middle
        distance = math.hypot(x, z)
        pose = looking(x * (1 + away / distance), z * (1 + away / distance), degrees)
        seen = courtyard.render(pose, 9, 15, samples=1)[0, :, 4, 7]
        assert seen[3].item() == pytest.approx(1 / (1 + 1.2), rel=1e-4), number
        assert bare.render(pose, 9, 15, samples=1)[0, 3, 4, 7] < seen[3]


def test_walks_are_those_of_the_keyboard(courtyard, some_walks):
    keys, poses = some_walks.keys, some_walks.poses
    assert courtyard.free(poses[..., 0, 3], poses[..., 2, 3]).all()
    assert [set(keys[..., axis].unique().tolist()) for axis in range(4)] == [{-1, 0, 1}] * 4
    assert len({tuple(row.flatten().tolist()) for row in keys}) > 35
    for number in range(len(keys)):
        stream = ActionStream(start=poses[number, 0].numpy())
        np.testing.assert_allclose(stream.advance(some_walks.actions(number)), poses[number].numpy(), atol=1e-12)


def test_keys_that_lead_into_a_wall_or_past_the_highest_look_are_let_go(courtyard):
    keys = torch.tensor([[[0, 1, 0, 1]] * 20])
    across = torch.linspace(-4, 4, 81, dtype=torch.float64)
    clear = torch.stack([courtyard.free(across, torch.full_like(across, scene.FREE - d)) for d in (0.5, 0.3, 0.1)])
    x = across[clear.all(0)][0].item()
    walked = walks.walk(courtyard, keys, torch.tensor([[x, scene.FREE - 0.5]]).double(), torch.tensor([0]))
    assert walked.keys[0, :, 1].sum() == 2 and walked.keys[0, :, 3].sum() == walks.MOST_LOOK
    assert walked.poses[0, -1, 2, 3] == pytest.approx(scene.FREE - 0.5 + 2 * DEFAULT_SPEED)


def test_embeddings_are_those_of_the_camera_stream(some_walks):
    got = walks.Rays(4, 6).embed(some_walks.poses[:5])
    for number in range(5):
        want = CameraStream(32, 48, scale=DEFAULT_SPEED).advance(some_walks.poses[number].numpy())
        torch.testing.assert_close(got[number : number + 1], want, atol=1e-6, rtol=0)


def test_pictures_come_back_from_latents_bit_for_bit(courtyard, some_walks):
    values = torch.arange(256, dtype=torch.float32).view(1, 1, 1, 16, 16).expand(1, 4, 2, 16, 16) / 255
    encoded = latents.encode(values)
    assert encoded.shape == (1, latents.CHANNELS, 2, 8, 8)
    assert torch.equal((latents.decode(encoded) * 255).round(), (values * 255).round())
    shown = journeys.Journeys.make(courtyard, some_walks, walks.Rays(6, 9))
    assert abs(shown.latents.mean()) < 0.15 and 0.8 < shown.latents.std() < 1.25
    with pytest.raises(ValueError, match=r"pixels: got shape \[1, 4, 1, 3, 4\]"):
        latents.encode(torch.zeros(1, 4, 1, 3, 4))


def test_a_clip_at_once_is_what_inference_does_chunk_by_chunk():
    cfg = network.world_config(
        dim=48, num_heads=2, num_layers=2, ffn_dim=64, patch_size=(1, 2, 2), frames_per_chunk=2, window_frames=7,
        sink_frames=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CausalLingBotTransformer(cfg, dtype=torch.float32)
    clips, chunks, frames = 2, 6, 12
    noisy, past = torch.randn(2, clips, 16, frames, 4, 6)
    condition, camera = torch.randn(clips, 20, frames, 4, 6), torch.randn(clips, 384, frames, 4, 6)
    times = (torch.rand(1, chunks) * 1000).expand(clips, -1)
    flow = network.ClipFlow(cfg, torch.float32)
    got = flow(model.state_dict(), noisy, past, condition, times, camera)
    state, text = RealtimeCausalDiTState(), network.constant_text(cfg, clips)
    for chunk, part in enumerate(journeys.chunks_of(frames, 2)):
        given = {"state": state, "start_frame": part.start, "camera": camera[:, :, part]}
        x, clean = (torch.cat([y[:, :, part], condition[:, :, part]], 1) for y in (noisy, past))
        want = model(x, text, times[0, chunk].item(), **given)
        assert (got[:, :, part] - want).norm() <= 1e-5 * want.norm()
        model(clean, text, 0.0, step_index=-1, update_cache_only=True, **given)

    # Times of each clip its own, and a first chunk that lies far back: against the plain network, which allows a gap.
    times = torch.rand(clips, chunks) * 1000
    got = flow(model.state_dict(), noisy, past, condition, times, camera, gap=10)
    plain = PlainLingBotWorld(cfg, model.state_dict())
    for clip in range(clips):
        context = None
        for chunk, part in enumerate(journeys.chunks_of(frames, 2)):
            one, start = slice(clip, clip + 1), part.start + (10 if chunk else 0)
            x, clean = (torch.cat([y[one, :, part], condition[one, :, part]], 1) for y in (noisy, past))
            rest = (start, camera[one, :, part], context)
            want, _ = plain.forward(x, text[one], times[clip, chunk].item(), *rest)
            assert (got[one, :, part] - want).norm() <= 1e-5 * want.norm()
            context = plain.forward(clean, text[one], 0.0, *rest)[1]


def test_training_begins_with_the_noise_passing():
    cfg = train.Settings(**{**SMALL, "dim": 96}).config()
    trainer = train.Trainer(train.Settings(**{**SMALL, "dim": 96}), torch.device("cpu"))
    x = torch.randn(1, 16, 6, 4, 8)
    with torch.no_grad():
        flow = trainer.flow(
            trainer.weights, x, x, torch.zeros(1, 20, 6, 4, 8), torch.full((1, 2), 1000.0), torch.zeros(1, 384, 6, 4, 8)
        )
    assert (flow - x).std() < 0.25 and cfg.num_parameters() == sum(w.numel() for w in trainer.weights.values())


def test_the_world_is_small_enough_to_ship():
    assert train.Settings().config() == network.world_config()
    assert 2 * network.world_config().num_parameters() <= 16_000_000


def test_training_learns_and_goes_on_with_the_same_bits(monkeypatch, tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    options += ["--steps=24", "--muon=1", "--own-past=0.4", "--repeats=2", "--rate=0.003", "--device=cpu"]
    monkeypatch.setattr(train.Trainer, "WALKS_AT_ONCE", 4)

    def call(*more: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *options, *map(str, more)])
        train.main()

    ended = train.Trainer.run
    monkeypatch.setattr(train.Trainer, "run", lambda self, *rest: ended(self, *rest, log_every=6))
    call("--out", tmp_path / "whole")
    call("--out", tmp_path / "parts", "--pause-after", 1e-9)
    assert "step 0," in capsys.readouterr().out
    rounds = train.Trainer.round
    for until in (7, 13):  # interrupted, in the first part and among predicted pasts

        def limited(self: train.Trainer, until: int = until) -> None:
            if self.step >= until:
                raise KeyboardInterrupt
            rounds(self)

        monkeypatch.setattr(train.Trainer, "round", limited)
        with pytest.raises(KeyboardInterrupt):
            call("--out", tmp_path / "parts")
    monkeypatch.setattr(train.Trainer, "round", rounds)
    call("--out", tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 24
    for kept in ("weights", "mean"):
        assert all(torch.equal(value, parts[kept][name]) for name, value in whole[kept].items())
    losses = [entry["loss"] for entry in json.loads((tmp_path / "whole" / "loss.json").read_text())]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    for name in ("loss.png", "sheet.png", "sheet.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 500

    with pytest.raises(SystemExit):
        call("--out", tmp_path / "whole", "--clips", 1)
    assert "clips: got 1, must be 2" in capsys.readouterr().err

    monkeypatch.setattr(
        sys, "argv",
        ["evaluate", str(tmp_path / "whole/weights"), "--walks=1", "--chunks=5", "--device=cpu", f"--out={tmp_path}"],
    )  # fmt: skip
    evaluate.main()
    report = json.loads((tmp_path / "report.json").read_text())
    values = report["psnr_per_chunk"]
    assert all(len(row) == 5 and np.isfinite(row).all() for row in values.values()) and len(values) == 5
    assert report["training"]["settings"]["seed"] == scene.DEFAULT_SEED and (tmp_path / "sheet.png").exists()
    same = [values[name][:4] == values["plain"][:4] for name in ("without sink", "without context update")]
    assert same == [True, False]  # the sink is needed no earlier than the window is full
    assert values["without sink"][4] != values["plain"][4]


def test_a_loss_that_is_no_number_ends_training_and_leaves_the_last_state(monkeypatch, tmp_path):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", ["train", *options, "--steps=300", "--device=cpu", f"--out={tmp_path}"])

    def diverged(self: train.Trainer) -> None:
        self.step += 1
        self._losses.append(torch.tensor(math.nan))

    monkeypatch.setattr(train.Trainer, "round", diverged)
    train.save_state(train.Trainer(train.Settings(**SMALL, steps=300), torch.device("cpu")), tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(RuntimeError, match="loss: got nan after step 100, must be finite"):
        train.main()
    assert (tmp_path / "state.pt").read_bytes() == before and not (tmp_path / "weights").exists()


def test_muon_takes_steps_of_equal_singular_values():
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 24, 24), (2, 40, 16), (2, 16, 40)):
        values = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape, generator=generator)))
        assert values.min() > 0.3 and values.max() < 1.3  # of random ones the smallest is 100 times below the largest
    weight = torch.nn.Parameter(torch.eye(8))
    weight.grad = torch.randn(8, 8, generator=generator)
    muon.Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert (weight - torch.eye(8)).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match=r"params: got a tensor of shape \[3\], must be matrices"):
        muon.Muon([torch.zeros(3)], lr=0.1)


def test_the_library_rolls_out_what_the_plain_network_does(courtyard):
    trainer = train.Trainer(train.Settings(**SMALL), torch.device("cpu"))
    model = CausalLingBotTransformer(trainer.cfg, dtype=torch.float32)
    model.load_state_dict(trainer.mean)
    walked = walks.random_walks(courtyard, 2, 15, torch.Generator().manual_seed(5))
    way = journeys.Journeys.make(courtyard, walked, trainer.rays)
    noise = journeys.Noise.draw(way.latents, 1)
    plain = journeys.roll_plain(PlainLingBotWorld(trainer.cfg, trainer.mean), way, noise)
    torch.testing.assert_close(journeys.roll_out(model, way, noise), plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="frames: got 4, must be a positive multiple of 3"):
        journeys.chunks_of(4, 3)


def test_keys_of_a_person_are_walked_from_where_one_may_stand(tmp_path):
    trainer = train.Trainer(train.Settings(**SMALL), torch.device("cpu"))
    trainer.save_model(tmp_path, {})
    world = evaluate.TrainedWorld.open(tmp_path, dtype="float32")
    position, heading = world.start()
    way = world.by_keys("wwwwww", position, heading)
    poses = ActionStream().advance("wwwwww")
    torch.testing.assert_close(way.camera, CameraStream(32, 64, scale=DEFAULT_SPEED).advance(poses))
    still = world.by_keys("......", position, heading).pixels
    assert pictures.psnr(still[:, :, -1], still[:, :, 0]) == math.inf
    assert pictures.psnr(way.pixels[:, :, -1], still[:, :, 0]) < 30
    with pytest.raises(ValueError, match="position: got"):
        world.by_keys("w", tuple(world.scene.pillars[0, :2].tolist()), 0)
    with pytest.raises(ValueError, match="folder: got"):
        evaluate.TrainedWorld.open(tmp_path / "nothing")
