"""Messages of viewers, pictures, and the clock of a session."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lingbot_kernels.play import wire
from lingbot_kernels.play.pace import Pace

BAD = (
    ("{", "message: got '{', must be JSON"),
    ("[" * 900, "must be JSON"),
    ("[]", "message: got [], must have keys and sequence, or taken"),
    ('{"keys": "w"}', "must have keys and sequence"),
    ('{"keys": "w", "sequence": 1, "taken": 1}', "must have keys and sequence"),
    ('{"keys": ["w"], "sequence": 1}', "keys: got ['w'], must be text"),
    ('{"keys": "w+x", "sequence": 1}', "keys: got 'w+x', must be of w a s d i j k l"),
    ('{"keys": "wa", "sequence": 1}', "keys: got 'wa', must be of"),
    ('{"keys": "w*3", "sequence": 1}', "keys: got 'w*3', must be held in one moment"),
    ('{"keys": "w*1", "sequence": 1}', "without a *"),
    ('{"keys": "w", "sequence": -1}', "sequence: got -1, must be an integer from 0"),
    ('{"keys": "w", "sequence": true}', "sequence: got True"),
    ('{"keys": "w", "sequence": 1e3}', "sequence: got 1000.0"),
    ('{"keys": "w", "sequence": 4294967296}', "sequence: got 4294967296"),
    ('{"taken": null}', "taken: got None, must be an integer"),
)


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:24] for text, _ in BAD])
def test_a_message_without_sense_is_refused(text, message):
    with pytest.raises(ValueError) as error:
        wire.read_message(text)
    assert message in str(error.value) and len(str(error.value)) < 250


@given(st.one_of(st.text(max_size=40), st.none(), st.integers(), st.lists(st.text(max_size=3), max_size=3)))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read_or_refused(value):
    text = value if isinstance(value, str) else json.dumps({"keys": value, "sequence": 0})
    try:
        assert isinstance(wire.read_message(text), (wire.Held, wire.Taken))
    except ValueError as error:
        assert "must" in str(error)


def test_messages_are_read():
    assert wire.read_message('{"keys": "W+l", "sequence": 3}') == wire.Held(frozenset("wl"), 3)
    assert wire.read_message('{"sequence": 0, "keys": ""}') == wire.Held(frozenset(), 0)
    assert wire.read_message('{"taken": 41}') == wire.Taken(41)


@pytest.mark.parametrize("picture", wire.FORMATS)
def test_a_frame_is_a_header_and_a_picture(picture):
    y, x = np.mgrid[0:32, 0:48]
    pixels = np.stack((4 * x, 6 * y, 120 + 0 * x), -1).astype(np.uint8)
    message = wire.write_frame(pixels, picture, 90, frame=2**32 + 5, chunk=3, sequence=7, interval=0.0625)
    assert wire.HEADER.unpack_from(message) == (5, 3, 7, 62.5)
    with Image.open(io.BytesIO(message[wire.HEADER.size :])) as found:
        assert found.format == picture.upper()
        assert np.abs(np.asarray(found.convert("RGB"), float) - pixels).mean() < 4


def test_a_fast_chunk_begins_as_late_as_its_frames_allow():
    pace, now = Pace(16, 100.0), 100.0
    ends = []
    for _ in range(8):
        now = max(now, pace.due) + 0.2  # a chunk takes 0.2 s; 12 frames last 0.75 s
        assert not ends or now <= ends[-1]  # the frames before it still last
        assert pace.delivered(now, 12) == 1 / 16
        ends.append(max([now, *ends[-1:]]) + 12 / 16)
    assert pace.due == pytest.approx(ends[-1] - 0.2 - 1 / 16)


def test_a_slow_chunk_is_due_at_once_and_its_frames_last_until_the_next():
    pace, now = Pace(16, 0.0), 0.0
    for _ in range(6):
        now = pace.due + 1.5
        interval = pace.delivered(now, 12)
    assert interval == pytest.approx(1.5 / 12)
    assert pace.due == now


def test_waiting_for_the_viewer_is_no_time_of_a_chunk():
    pace = Pace(16, 0.0)
    pace.delivered(0.2, 12)
    pace.hold(50.0)
    assert pace.due == 50.0
    assert pace.delivered(50.2, 12) == 1 / 16
    pace.hold(0.0)
    assert pace.due > 50.2


def test_one_slow_chunk_does_not_set_the_pace():
    pace = Pace(16, 0.0)
    for takes in (0.2, 0.2, 9.0, 0.2, 0.2):
        interval = pace.delivered(pace.due + takes, 12)
    assert interval == 1 / 16
