"""Camera input against a direct computation, one pixel at a time; streaming, interpolation, keyboard, refusals."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lingbot_kernels.models.camera import (
    DEFAULT_INTRINSICS,
    CameraStream,
    CameraTrajectory,
    example_trajectory,
    fit_intrinsics,
    pluecker_embedding,
)
from lingbot_kernels.models.poses import ActionStream, parse_actions, relative_poses


def rotation(axis, degrees):
    """Rodrigues' formula: I + sin(a) K + (1 - cos(a)) K^2, K the cross-product matrix of the unit axis."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    a = math.radians(degrees)
    return np.eye(3) + math.sin(a) * k + (1 - math.cos(a)) * k @ k


def pose(turn=None, at=(0, 0, 0)):
    result = np.eye(4)
    if turn is not None:
        result[:3, :3] = turn
    result[:3, 3] = at
    return result


def random_walk(count, seed=0, step=1.0):
    generator = np.random.default_rng(seed)
    poses = [pose(rotation(generator.normal(size=3), 50), generator.normal(size=3) * 20)]
    while len(poses) < count:
        turn = rotation(generator.normal(size=3), generator.uniform(0, 8))
        poses.append(poses[-1] @ pose(turn, step * generator.normal(size=3)))
    return np.stack(poses)


def direct_pixel(poses, intrinsics, scale, frame, x, y):
    """Six values of one pixel, from 4x4 inverses and plain float arithmetic."""
    if frame == 0:
        relative = np.eye(4)
    else:
        relative = np.linalg.inv(poses[frame - 1].astype(np.float64)) @ poses[frame].astype(np.float64)
    fx, fy, cx, cy = (float(value) for value in intrinsics)
    ray = [(x + 0.5 - cx) / fx, (y + 0.5 - cy) / fy, 1.0]
    length = math.sqrt(sum(value * value for value in ray))
    turned = [sum(relative[i, j] * ray[j] for j in range(3)) / length for i in range(3)]
    return [relative[i, 3] / scale for i in range(3)] + turned


def direct_scale(poses):
    norms = [
        np.linalg.norm((np.linalg.inv(a.astype(np.float64)) @ b.astype(np.float64))[:3, 3])
        for a, b in itertools.pairwise(poses)
    ]
    return max(norms)


def value_at(embedding, frame, x, y):
    """The six values of a pixel, looked up by the fold's definition: channel (c * 8 + row) * 8 + column."""
    channel = (y % 8) * 8 + x % 8
    return [float(embedding[0, c * 64 + channel, frame, y // 8, x // 8]) for c in range(6)]


def shared_example():
    roots = [Path(os.environ["LINGBOT_KERNELS_SHARED"])] if "LINGBOT_KERNELS_SHARED" in os.environ else []
    roots += [parent / "shared" for parent in Path(__file__).resolve().parents]
    for root in roots:
        if (root / "data" / "lingbot_example_00" / "poses.npy").is_file():
            return root / "data" / "lingbot_example_00"
    pytest.skip("no shared/data/lingbot_example_00 above this checkout, nor under LINGBOT_KERNELS_SHARED")


# The embedding


@pytest.mark.parametrize(("height", "width"), [(480, 832), (464, 832), (240, 416)])
def test_real_trajectory_equals_the_direct_computation(height, width):
    folder = shared_example()
    trajectory = CameraTrajectory.from_files(folder / "poses.npy", folder / "intrinsics.npy")
    assert len(trajectory) == 241
    kept = [np.load(folder / "poses.npy")[index] for index in range(0, 961, 4)]
    scale = direct_scale(kept)
    assert trajectory.scale == pytest.approx(scale, rel=1e-5)

    fx, fy, cx, cy = np.load(folder / "intrinsics.npy").astype(np.float64)[0]
    factor = max(width / 832, height / 480)
    camera = (
        fx * factor,
        fy * factor,
        cx * factor - (832 * factor - width) / 2,
        cy * factor - (480 * factor - height) / 2,
    )
    embedding = CameraTrajectory(trajectory.poses[:40], trajectory.intrinsics[:40]).embedding(
        height, width, scale=scale
    )
    assert embedding.shape == (1, 384, 40, height // 8, width // 8)
    assert embedding.dtype == torch.float32
    generator = np.random.default_rng(1)
    pixels = [(0, 0, 0), (39, width - 1, height - 1), (1, 0, height - 1), (20, width - 1, 0)]
    pixels += [tuple(generator.integers(0, (40, width, height)).tolist()) for _ in range(2000)]
    worst = 0.0
    for frame, x, y in pixels:
        expected = direct_pixel(kept, camera, scale, frame, x, y)
        worst = max(worst, *(abs(a - b) for a, b in zip(value_at(embedding, frame, x, y), expected, strict=True)))
    # Rotations in the file are float32: a transpose is its inverse to 1e-6.
    assert worst < 2e-6


@pytest.mark.parametrize("moving", [True, False])
def test_every_pixel_of_a_small_clip(moving):
    poses = random_walk(3, step=1.0 if moving else 0.0)
    intrinsics = np.array([[20.0, 24.0, 11.0, 9.5], [21.0, 22.0, 12.0, 8.0], [30.0, 30.0, 12.0, 8.0]])
    scale = direct_scale(poses) if moving else 1.0
    relative = relative_poses(poses)
    relative[:, :3, 3] /= scale
    embedding = pluecker_embedding(relative, intrinsics, 16, 24, dtype=torch.float64)
    for frame in range(3):
        for y in range(16):
            for x in range(24):
                expected = direct_pixel(poses, intrinsics[frame], scale, frame, x, y)
                assert value_at(embedding, frame, x, y) == pytest.approx(expected, abs=2e-14)


def test_fold_order_by_hand():
    """fx = fy = 1, c = 0, identity: the ray of pixel (x, y) is (x + .5, y + .5, 1), so channels tell their pixel."""
    embedding = pluecker_embedding(np.eye(4)[None], (1.0, 1.0, 0.0, 0.0), 16, 24, dtype=torch.float64)
    assert embedding.shape == (1, 384, 1, 2, 3)
    components = embedding.view(6, 8, 8, 2, 3)  # c, row in cell, column in cell, row, column
    assert (components[:3] == 0).all()
    direction = components[3:] / components[5]
    for row, column, cell_row, cell_column in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (7, 5, 1, 2)]:
        ray = direction[:, row, column, cell_row, cell_column]
        expected = [8 * cell_column + column + 0.5, 8 * cell_row + row + 0.5, 1.0]
        assert ray.tolist() == pytest.approx(expected, rel=1e-14)


def test_embedding_is_one_rounding_of_float64():
    poses = relative_poses(random_walk(2))
    exact = pluecker_embedding(poses, (20.0, 20.0, 12.0, 8.0), 16, 24, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(pluecker_embedding(poses, (20.0, 20.0, 12.0, 8.0), 16, 24, dtype=dtype), exact.to(dtype))
    both = pluecker_embedding(poses, (20.0, 20.0, 12.0, 8.0), 16, 24, batch=2)
    assert both.shape[0] == 2
    assert both.is_contiguous()
    assert torch.equal(both[0], both[1])


def test_rays_have_unit_length_and_translation_fills_the_frame():
    embedding = example_trajectory(5).embedding(48, 80).view(6, 64, 5, 6, 10)
    assert torch.allclose(embedding[3:].norm(dim=0), torch.ones(()), atol=1e-6)
    norms = embedding[:3].norm(dim=0)
    assert (norms[:, 0] == 0).all()
    assert norms.max() == pytest.approx(1.0, abs=1e-6)
    assert (norms == norms[:1, :, :1, :1]).all()


# Relative poses


def test_relative_poses_compose_back():
    poses = random_walk(7)
    relative = relative_poses(poses)
    assert np.array_equal(relative[0], np.eye(4))
    here = poses[0]
    for step, expected in zip(relative[1:], poses[1:], strict=True):
        here = here @ step
        assert np.allclose(here, expected, atol=1e-11)
    assert np.allclose(relative_poses(poses[3:], previous=poses[2]), relative[3:], atol=1e-13)


def test_a_world_transform_changes_nothing():
    poses = random_walk(4)
    moved = pose(rotation((1, 2, 3), 77), (5, -6, 7)) @ poses
    assert np.allclose(relative_poses(moved), relative_poses(poses), atol=1e-12)


def test_a_camera_that_stands_still_has_no_translation():
    turned = np.stack([pose(rotation((0, 1, 0), angle), (145.0, -81.3, 0.949)) for angle in (3, 8, 20)])
    trajectory = CameraTrajectory(turned, DEFAULT_INTRINSICS)
    assert trajectory.scale == 1.0
    assert (trajectory.embedding(16, 24)[:, :192] == 0).all()


# Intrinsics


def test_intrinsics_are_scaled_and_crop_centred():
    source = (500.0, 510.0, 416.0, 240.0)
    assert fit_intrinsics(source, 480, 832).tolist() == [list(source)]
    assert fit_intrinsics(source, 240, 416).tolist() == [[250.0, 255.0, 208.0, 120.0]]
    # 464 rows of 480 are kept: 8 are cut off above and 8 below.
    assert fit_intrinsics(source, 464, 832).tolist() == [[500.0, 510.0, 416.0, 232.0]]
    # A square of 480: 176 columns go on each side.
    assert fit_intrinsics(source, 480, 480).tolist() == [[500.0, 510.0, 240.0, 240.0]]
    assert fit_intrinsics(source, 464, 832, fit="stretch")[0] == pytest.approx([500.0, 493.0, 416.0, 232.0])
    with pytest.raises(ValueError, match="fit is 'crop'"):
        fit_intrinsics(source, 464, 832, fit="crop")


@pytest.mark.parametrize("size", [0, -8, 64.0, True, None], ids=str)
def test_intrinsics_are_not_fitted_to_no_image(size):
    for name, sizes in (("height", (size, 64)), ("width", (64, size))):
        with pytest.raises(ValueError, match=f"^{name} is {size}, must be an integer >= 1"):
            fit_intrinsics((500.0, 500.0, 416.0, 240.0), *sizes)


@pytest.mark.parametrize("image_size", [(0, 480), (832, -1), (832,), 832, None, (832, math.nan), "ab"], ids=str)
def test_intrinsics_are_not_of_no_image(image_size):
    with pytest.raises((ValueError, TypeError), match=r"^image_size is "):
        fit_intrinsics((500.0, 500.0, 416.0, 240.0), 64, 64, image_size=image_size)


def test_every_fourth_pixel_frame_is_kept():
    poses = random_walk(10)
    intrinsics = np.array(DEFAULT_INTRINSICS) + np.arange(10)[:, None]
    trajectory = CameraTrajectory.from_pixel_frames(poses, intrinsics)
    assert np.array_equal(trajectory.poses, poses[[0, 4, 8]])
    assert (trajectory.intrinsics == DEFAULT_INTRINSICS).all()
    varying = CameraTrajectory.from_pixel_frames(poses, intrinsics, varying_intrinsics=True)
    assert np.array_equal(varying.intrinsics, intrinsics[[0, 4, 8]])
    one_row = CameraTrajectory.from_pixel_frames(poses, DEFAULT_INTRINSICS, varying_intrinsics=True)
    assert (one_row.intrinsics == DEFAULT_INTRINSICS).all()


# Streaming


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 4])
def test_stream_equals_the_clip_when_the_scale_is_given(frames_per_chunk):
    trajectory = example_trajectory(12)
    clip = trajectory.embedding(48, 80, scale=trajectory.scale)
    assert torch.equal(clip, trajectory.embedding(48, 80))
    chunks = list(trajectory.chunks(48, 80, frames_per_chunk, scale=trajectory.scale))
    assert [chunk.shape[2] for chunk in chunks] == [frames_per_chunk] * (12 // frames_per_chunk)
    assert torch.equal(torch.cat(chunks, 2), clip)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_no_look_at_the_future(scale):
    poses = random_walk(12)
    changed = poses.copy()
    changed[6:] = random_walk(6, seed=9, step=30.0)
    first, second = (
        list(CameraTrajectory(p, DEFAULT_INTRINSICS).chunks(16, 24, 3, scale=scale)) for p in (poses, changed)
    )
    assert len(first) == 4
    for a, b in zip(first[:2], second[:2], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[2], second[2])


def test_running_maximum():
    """Steps of 1, 1 | 4, 2 | 1, 1: chunks are divided by 1, 4, 4."""
    poses = np.stack([pose(at=(0, 0, z)) for z in (0, 1, 2, 6, 8, 9)])
    stream = CameraStream(8, 8)
    assert stream.scale == 1.0
    seen = []
    for chunk in (poses[:2], poses[2:4], poses[4:]):
        embedding = stream.advance(chunk)
        seen.append([stream.scale, *embedding[0, 128, :, 0, 0].tolist()])
    assert seen == [[1.0, 0.0, 1.0], [4.0, 0.25, 1.0], [4.0, 0.5, 0.25]]
    stream.reset()
    assert torch.equal(stream.advance(poses[:2]), CameraStream(8, 8).advance(poses[:2]))


def test_a_refused_chunk_leaves_the_stream_as_it_was():
    poses = random_walk(6)
    stream, undisturbed = CameraStream(16, 24), CameraStream(16, 24)
    stream.advance(poses[:3])
    undisturbed.advance(poses[:3])
    bad = poses[3:] * 40
    with pytest.raises(ValueError, match="poses"):
        stream.advance(bad)
    with pytest.raises(ValueError, match="intrinsics"):
        stream.advance(random_walk(3, seed=5, step=50.0), np.ones((2, 4)))
    assert torch.equal(stream.advance(poses[3:]), undisturbed.advance(poses[3:]))


def test_stream_takes_torch_tensors_and_options():
    poses = random_walk(3).astype(np.float32)
    options = {"batch": 2, "dtype": torch.bfloat16, "intrinsics": (400.0, 400.0, 416.0, 240.0)}
    out = CameraStream(16, 32, **options).advance(torch.from_numpy(poses))
    assert out.shape == (2, 384, 3, 2, 4)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, CameraStream(16, 32, **options).advance(poses))


# Keyboard


def test_parse_actions():
    w, wl, none = frozenset("w"), frozenset("wl"), frozenset()
    assert parse_actions("ww.l") == [w, w, none, frozenset("l")]
    assert parse_actions("w*2, W + l*2,.") == [w, w, wl, wl, none]
    assert parse_actions("w+l") == [wl]
    assert parse_actions(["w", "w+l", ""]) == [w, wl, none]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("wxw", r"actions\[1\] is 'x': unknown key 'x'"),
        ("", "actions is empty"),
        ([], "actions is empty"),
        ("w*0", r"actions\[0\] is 'w\*0'"),
        ("w*", "positive integer after"),
        ("w,wl", "unknown key 'wl'"),
        ([3], r"actions\[0\] is 3"),
    ],
)
def test_bad_actions(actions, message):
    with pytest.raises(ValueError, match=message):
        parse_actions(actions)


@pytest.mark.parametrize(
    ("key", "step"),
    [("w", (0, 0, 0.5)), ("s", (0, 0, -0.5)), ("d", (0.5, 0, 0)), ("a", (-0.5, 0, 0)), (".", (0, 0, 0))],
)
def test_moves(key, step):
    poses = ActionStream(speed=0.5).advance(["", key, key])
    assert np.array_equal(poses[0], np.eye(4))
    assert np.allclose(poses[:, :3, 3], np.outer([0, 1, 2], step))
    assert (poses[:, :3, :3] == np.eye(3)).all()


@pytest.mark.parametrize(("key", "looks_to"), [("l", (1, 0)), ("j", (-1, 0)), ("i", (0, -1)), ("k", (0, 1))])
def test_turns(key, looks_to):
    """The viewing direction's image x grows to the right, its y downwards."""
    forward = ActionStream(turn_rate=10.0).advance(["", key, key])[2, :3, 2]
    side = math.sin(math.radians(20))
    assert np.allclose(forward, [looks_to[0] * side, looks_to[1] * side, math.cos(math.radians(20))])


def test_walking_follows_the_heading_on_the_ground():
    stream = ActionStream(speed=2.0, turn_rate=90.0)
    stream.advance(["", "l"])
    assert np.allclose(stream.advance("w")[0, :3, 3], (2, 0, 0))
    assert np.allclose(stream.advance("d")[0, :3, 3], (2, 0, -2))
    tilted = ActionStream(speed=1.0, turn_rate=30.0)
    tilted.advance(["", "i", "i"])
    assert np.allclose(tilted.advance("w")[0, :3, 3], (0, 0, 1))


def test_opposite_keys_cancel_and_diagonals_keep_the_speed():
    poses = ActionStream(speed=1.0).advance(["", "w+s", "w+d", "w+a+s", "j+l"])
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert np.allclose(steps, [0, 1, 1, 0])
    assert np.allclose(poses[2, :3, 3], np.array([1, 0, 1]) / math.sqrt(2))
    assert (poses[4, :3, :3] == np.eye(3)).all()


def test_pitch_has_a_limit():
    forward = ActionStream(turn_rate=20.0).advance("." + "i" * 20)[-1, :3, 2]
    assert math.degrees(math.asin(-forward[1])) == pytest.approx(85.0)


def test_action_stream_equals_the_whole():
    actions = parse_actions("w*3,w+l*4,i,d+k*3,a+j")
    texts = ["+".join(keys) for keys in actions]
    start = pose(rotation((0, 1, 0), 33), (4, 5, 6))
    whole = ActionStream(start=start).advance(texts)
    stream = ActionStream(start=start)
    parts = np.concatenate([stream.advance(texts[i : i + 3]) for i in range(0, len(texts), 3)])
    assert np.array_equal(whole, parts)
    assert np.array_equal(whole[0], start)
    with pytest.raises(ValueError, match="unknown key"):
        stream.advance("w?")
    clip = CameraTrajectory(whole, DEFAULT_INTRINSICS).embedding(16, 24, scale=0.2)
    same = CameraTrajectory.from_actions(texts).embedding(16, 24, scale=0.2)
    assert torch.allclose(clip, same, atol=1e-6)


def test_an_endless_walk_keeps_its_precision():
    stream = ActionStream(turn_rate=7.3)
    stream.advance(".")
    stream.advance("l*20000")
    forward = stream.advance(".")[0, :3, 2]
    angle = math.radians(7.3 * 20000 % 360)
    assert np.allclose(forward, [math.sin(angle), 0, math.cos(angle)], atol=1e-9)


# The made trajectory


def test_example_trajectory_is_smooth_and_extends():
    long, short = example_trajectory(400), example_trajectory(50)
    assert np.allclose(long.poses[:50], short.poses)
    relative = relative_poses(long.poses)
    steps = np.linalg.norm(relative[1:, :3, 3], axis=1)
    assert steps.min() > 0.1
    assert steps.max() < 0.3
    turns = np.degrees(np.arccos(np.clip((relative[:, :3, :3].trace(axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert 0.5 < turns.max() < 5
    yaw, pitch = math.degrees(0.5 * math.sin(0.4 * 12.25)), math.degrees(0.1 * math.sin(0.9 * 12.25))
    expected = rotation((0, 1, 0), yaw) @ rotation((1, 0, 0), pitch)
    assert np.allclose(short.poses[49, :3, :3], expected, atol=1e-12)


# Refusals


def mirrored():
    return pose(np.diag([1.0, 1.0, -1.0]))


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (np.eye(4), r"poses has shape \[4, 4\], must be \[N, 4, 4\]"),
        (np.zeros((0, 4, 4)), r"poses has shape \[0, 4, 4\]"),
        (np.eye(3)[None], r"poses has shape \[1, 3, 3\]"),
        (np.stack([np.eye(4), np.full((4, 4), np.nan)]), r"poses\[1\] is .* must be finite"),
        (np.stack([np.eye(4), 2 * np.eye(4)]), r"poses\[1\] is .* bottom row"),
        (np.stack([np.eye(4), pose(1.001 * np.eye(3))]), r"poses\[1\] is .* orthonormal rotation"),
        (mirrored()[None], r"poses\[0\] is .* mirrors"),
        (np.array([["a"]]), "poses holds <U1"),
    ],
)
def test_bad_poses(poses, message):
    for use in (lambda: relative_poses(poses), lambda: CameraStream(8, 8).advance(poses)):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=message):
        CameraTrajectory(poses, DEFAULT_INTRINSICS)


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        (np.ones((2, 4)), r"intrinsics has shape \[2, 4\], must be \[4\] or \[3, 4\]"),
        (np.ones(3), r"intrinsics has shape \[3\]"),
        ((0.0, 1.0, 0.0, 0.0), r"intrinsics\[0\] is .* positive focal lengths"),
        ((1.0, 1.0, np.inf, 0.0), r"intrinsics\[0\] is .* finite"),
    ],
)
def test_bad_intrinsics(intrinsics, message):
    with pytest.raises(ValueError, match=message):
        CameraTrajectory(random_walk(3), intrinsics)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CameraStream(20, 24), "height is 20, must be a multiple of 8"),
        (lambda: CameraStream(16, 0), "width is 0, must be an integer >= 1"),
        (lambda: CameraStream(16, 24.0), "width is 24.0"),
        (lambda: CameraStream(16, 24, scale=0.0), "scale is 0.0, must be a positive finite number"),
        (lambda: CameraStream(16, 24, scale=math.nan), "scale is nan"),
        (lambda: CameraStream(16, 24, fit="crop"), "fit is 'crop'"),
        (lambda: ActionStream(speed=-1), "speed is -1"),
        (lambda: ActionStream(turn_rate="8"), "turn_rate is '8'"),
        (lambda: ActionStream(start=2 * np.eye(4)), r"start\[0\] is .* bottom row"),
        (lambda: relative_poses(random_walk(2), previous=mirrored()), r"previous\[0\] is .* mirrors"),
        (lambda: pluecker_embedding(random_walk(2), DEFAULT_INTRINSICS, 16, 24, batch=0), "batch is 0"),
        (lambda: example_trajectory(0), "num_frames is 0"),
        (lambda: list(example_trajectory(4).chunks(8, 8, 0)), "frames_per_chunk is 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_files(tmp_path):
    poses, intrinsics = tmp_path / "poses.npy", tmp_path / "intrinsics.npy"
    np.save(poses, random_walk(9).astype(np.float32))
    np.save(intrinsics, np.tile(np.float32(DEFAULT_INTRINSICS), (9, 1)))
    assert len(CameraTrajectory.from_files(poses, intrinsics)) == 3
    assert (CameraTrajectory.from_files(str(poses)).intrinsics == DEFAULT_INTRINSICS).all()

    np.save(intrinsics, np.ones((5, 4)))
    with pytest.raises(ValueError, match=r"intrinsics\.npy has shape \[5, 4\]"):
        CameraTrajectory.from_files(poses, intrinsics)
    np.save(poses, np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"poses\.npy: not a \.npy file of numbers"):
        CameraTrajectory.from_files(poses)
    for content in (b"", b"hello", b"\x93NUMPY\x01\x00"):
        poses.write_bytes(content)
        with pytest.raises(ValueError, match=r"poses\.npy: not a \.npy file of numbers"):
            CameraTrajectory.from_files(poses)
    with open(poses, "wb") as file:
        np.savez(file, a=np.eye(4))
    with pytest.raises(ValueError, match="an archive of arrays"):
        CameraTrajectory.from_files(poses)
    with pytest.raises(FileNotFoundError, match="none"):
        CameraTrajectory.from_files(tmp_path / "none.npy")
