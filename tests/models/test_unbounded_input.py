"""Keys, poses and intrinsics that ask for more than there is: bounded, and cut to what is wanted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_kernels.models import poses as poses_module
from lingbot_kernels.models.camera import CameraStream, CameraTrajectory
from lingbot_kernels.models.poses import MAX_ACTION_FRAMES, ActionStream, load_array, parse_actions


def test_a_repeat_makes_only_the_frames_that_are_wanted():
    assert parse_actions("w*999999999999", limit=3) == [frozenset("w")] * 3
    assert len(CameraTrajectory.from_actions("w*3,l*999999999", limit=5)) == 5
    assert ActionStream().advance("w*999999999", limit=0).shape == (0, 4, 4)


@pytest.mark.parametrize("actions", ["w*1000001", "w*500000,l*500001", ",".join(["w*200000"] * 6)])
def test_without_a_limit_the_frames_are_bounded(actions):
    with pytest.raises(ValueError, match=rf"actions\[\d\] is .* latent frames, must be at most {MAX_ACTION_FRAMES}"):
        parse_actions(actions)


def test_an_endless_sequence_is_refused():
    def forever():
        while True:
            yield "w*1000"

    with pytest.raises(ValueError, match="must be at most"):
        parse_actions(forever())


def test_what_comes_after_the_limit_is_checked_all_the_same():
    with pytest.raises(ValueError, match=r"actions\[1\] is 'x\*3': unknown key 'x'"):
        parse_actions("w*9,x*3", limit=2)


@pytest.mark.parametrize("repeat", ["9" * 19, "9" * 5000, "\u0663", "-1", "1e3", "0x10"])
def test_a_repeat_that_is_no_number_of_frames_is_refused(repeat):
    with pytest.raises(ValueError, match=r"actions\[0\] is 'w\*.*after '\*'") as refused:
        parse_actions(f"w*{repeat}", limit=1)
    assert len(str(refused.value)) < 300


@given(st.text(alphabet="wasdijkl.+*,19 ", max_size=40), st.integers(0, 20))
def test_any_text_is_parsed_or_refused_and_a_limit_only_cuts(actions, limit):
    try:
        cut = parse_actions(actions, limit)
    except ValueError as error:
        assert str(error).startswith("actions")
        return
    try:
        whole = parse_actions(actions)
    except ValueError as error:
        assert "must be at most" in str(error)
    else:
        assert whole[:limit] == cut


def test_an_array_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(poses_module, "MAX_ARRAY_BYTES", 1000)
    np.save(tmp_path / "poses.npy", np.zeros((100, 4, 4)))
    with pytest.raises(ValueError, match=r"poses\.npy: has \d+ bytes, must have at most 1000"):
        load_array(tmp_path / "poses.npy")


def test_a_header_that_claims_a_huge_array_is_refused(tmp_path):
    path = tmp_path / "poses.npy"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 4, 4), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"poses\.npy: not a \.npy file"):
        load_array(path)


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        ((0.6, 1.04, 0.5, 0.5), "must be in pixels"),
        ((500.0, 7.9, 416.0, 240.0), "must be in pixels"),
        ((-500.0, 500.0, 416.0, 240.0), "must have positive focal lengths"),
        ((500.0, 500.0, -1.0, 240.0), "principal point cx, cy of 0 or more"),
        ((500.0, 500.0, 416.0, -240.0), "principal point cx, cy of 0 or more"),
    ],
)
def test_intrinsics_that_are_no_pixels_are_refused_where_they_are_passed(tmp_path, intrinsics, message):
    pose, path = np.eye(4)[None], tmp_path / "lens.npy"
    np.save(path, np.array(intrinsics))
    np.save(tmp_path / "poses.npy", pose)
    with pytest.raises(ValueError, match=r"intrinsics\[0\] is .*" + message):
        CameraTrajectory(pose, np.array(intrinsics))
    with pytest.raises(ValueError, match=r"intrinsics\[0\] is .*" + message):
        CameraStream(64, 64, intrinsics=intrinsics)
    with pytest.raises(ValueError, match=r"lens\.npy\[0\] is .*" + message):
        CameraTrajectory.from_files(tmp_path / "poses.npy", path)
