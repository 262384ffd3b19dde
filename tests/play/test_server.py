"""Who may connect, what they get, and what is left of them afterwards: a real server and aiohttp's client."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import socket
import threading
import weakref
from functools import partial

import aiohttp
import pytest
import torch
from viewers import PROMPT, SIZE, eventually, player, run, served

from lingbot_kernels.play import server as server_module
from lingbot_kernels.play import viewer as viewer_module
from lingbot_kernels.play import worker as worker_module
from lingbot_kernels.play.server import Settings, is_loopback
from lingbot_kernels.play.wire import write_frame


def by_hand(pipeline, player, seed=None):
    """The pictures that the player must have got, made by the pipeline with the seed and keys that it was told."""
    (world,) = player.notices["world"]
    session = pipeline.session(PROMPT, seed=int(world["seed"]), **SIZE)
    numbers, expected = {}, {}
    for chunk in player.notices["chunk"]:
        while session.chunks <= chunk["chunk"]:
            made = session.step(chunk["keys"]).numpy()
        first = 0 if chunk["chunk"] == 0 else 12 * chunk["chunk"] - 3
        numbers[chunk["chunk"]] = range(first, first + len(made))
        expected |= dict(zip(numbers[chunk["chunk"]], made, strict=True))
    for frame in player.frames:
        assert frame.number in numbers[frame.chunk]
        message = write_frame(
            expected[frame.number], "jpeg", 85, frame=frame.number, chunk=frame.chunk, sequence=frame.sequence,
            interval=frame.interval / 1e3,
        )  # fmt: skip
        assert message.endswith(frame.picture) and len(frame.picture) > 300
    return numbers


def test_interleaved_sessions_show_the_pipeline_s_frames_bit_for_bit(pipeline):
    walks = {0: ("w", "w+l"), 1: ("s", "s+j+i")}

    async def walk(server, which, gathered):
        async with player(server) as viewer:
            await viewer.read_until(lambda: len(viewer.frames) >= 9)
            await viewer.hold(walks[which][0], 5)
            await viewer.read_until(lambda: viewer.frames[-1].sequence == 5)
            await viewer.hold(walks[which][1], 6)
            await viewer.read_until(lambda: viewer.frames[-1].sequence == 6)
            gathered.append(viewer)

    async def test():
        gathered = []
        async with served(pipeline, max_sessions=2) as server:
            await asyncio.gather(*(walk(server, which, gathered) for which in walks))
        for viewer in gathered:
            assert by_hand(pipeline, viewer)
            keys = [chunk["keys"] for chunk in viewer.notices["chunk"]]
            assert {*keys} >= {"", *("+".join(sorted(k.split("+"))) for k in walks[keys[-1] != "l+w"])}
            assert [frame.number for frame in viewer.frames] == list(range(len(viewer.frames)))
            figures = viewer.notices["chunk"][-1]
            assert figures["milliseconds"] > 0 and figures["dropped"] == 0
            assert figures["session_bytes"] > 100_000 and figures["memory_bytes"] > 10 * figures["session_bytes"]
        assert gathered[0].notices["world"][0]["seed"] != gathered[1].notices["world"][0]["seed"]

    run(test)


def test_a_key_that_is_tapped_between_two_chunks_counts_once(pipeline):
    async def test():
        async with served(pipeline, fps=20) as server, player(server) as viewer:
            await viewer.read_until(lambda: len(viewer.frames) >= 9)
            await viewer.hold("w", 1)
            await viewer.hold("", 2)
            await viewer.read_until(lambda: viewer.notices["chunk"][-1]["chunk"] >= 3)
            keys = [(chunk["keys"], chunk["sequence"]) for chunk in viewer.notices["chunk"]]
            assert [key for key, _ in keys].count("w") == 1 and ("w", 2) in keys, keys

    run(test)


def test_a_closed_tab_gives_its_session_back(pipeline):
    async def test():
        async with served(pipeline) as server:
            async with player(server) as viewer:
                await viewer.read_until(lambda: len(viewer.frames) >= 21)
                (session,) = server.worker.sessions()
                state, decoder, gone = session._state, session._decoder, weakref.ref(session)
                assert session.nbytes() > 100_000
                del session
            await eventually(lambda: not server.worker.sessions() and gone() is None)
            assert state.nbytes() == 0 and state.kv_cache is None and decoder.nbytes() == 0
            async with player(server) as viewer:  # and its place
                await viewer.read_until(lambda: viewer.frames)
        assert not server.worker.sessions()

    run(test)


def test_a_viewer_that_vanishes_without_a_word_is_noticed(pipeline):
    async def test():
        async with served(pipeline, heartbeat=0.5) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HANDSHAKE % server.port)
            assert b"101 Switching" in await reader.readuntil(b"\r\n\r\n")
            await eventually(lambda: server.worker.sessions())
            # It never reads, answers no ping and doesn't close: as a machine that was unplugged.
            writer.transport.pause_reading()
            await eventually(lambda: not server.worker.sessions())
            assert not server._viewers
            writer.close()

    run(test)


HANDSHAKE = (
    b"GET /session HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def test_what_a_viewer_does_not_take_is_dropped_and_then_the_world_waits(pipeline, monkeypatch):
    monkeypatch.setattr(worker_module, "PATIENCE", 100.0)
    kept = []
    init = viewer_module.Viewer.__init__
    monkeypatch.setattr(
        viewer_module.Viewer, "__init__", lambda self, *a, **k: (init(self, *a, **k), kept.append(self))[0]
    )

    async def test():
        async with served(pipeline) as server, player(server) as viewer:
            await viewer.read_until(lambda: len(viewer.frames) == 16, take=False)  # what may be under way
            (session,) = server.worker.sessions()
            (own,) = kept
            await eventually(lambda: own._dropped > 40)
            monkeypatch.setattr(worker_module, "PATIENCE", 0.0)
            before = session.chunks
            await asyncio.sleep(0.5)
            assert session.chunks <= before + 1  # the one that was being made: nothing is made for nobody
            await eventually(lambda: own._count == 12 * session.chunks - 3)
            assert len(own._waiting) == 24 and len(own._under_way) == 16
            assert [frame.number for frame in own._waiting] == list(range(own._count - 24, own._count))  # the newest
            await viewer.socket.send_json({"taken": viewer.frames[-1].number})
            await viewer.read_until(lambda: viewer.notices["chunk"][-1]["chunk"] > before)
            numbers = [frame.number for frame in viewer.frames]
            assert numbers[:17] != list(range(17)) and numbers[:16] == list(range(16))
            assert numbers == sorted(set(numbers)) and viewer.notices["chunk"][-1]["dropped"] >= 40
            by_hand(pipeline, viewer)

    run(test)


def test_a_slow_viewer_does_not_slow_another(pipeline):
    async def test():
        async with served(pipeline, max_sessions=2) as server, player(server) as slow, player(server) as quick:
            await slow.read_until(lambda: slow.frames, take=False)
            await quick.read_until(lambda: len(quick.frames) > 60)
            assert [frame.number for frame in quick.frames] == list(range(61))
            assert len(slow.frames) == 1

    run(test)


def test_the_origin_and_the_host_are_checked(pipeline):
    async def test():
        async with served(pipeline) as server, aiohttp.ClientSession() as client:
            for path in ("", "session"):
                for headers, word in (
                    ({"Origin": "http://elsewhere.example"}, "Origin: got http://elsewhere.example, must be"),
                    ({"Origin": f"http://127.0.0.1:{server.port + 1}"}, "Origin: got"),
                    ({"Origin": "null"}, "Origin: got null"),
                    ({"Origin": "http://["}, "Origin: got"),
                    # A name of elsewhere that leads here brings its own Host, with its own Origin.
                    ({"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}, "Host: got elsewhere"),
                    ({"Host": "[", "Origin": "http://["}, "Host: got ["),
                ):
                    async with client.get(server.url + path, headers=headers) as answer:
                        assert answer.status == 403 and word in await answer.text()
                        assert answer.headers["Cache-Control"] == "no-store"
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with player(server, headers={"Origin": "http://elsewhere.example"}):
                    pass
            assert error.value.status == 403 and not server.worker.sessions()
            async with player(server, headers={"Origin": server.url[:-1]}) as viewer:
                await viewer.read_until(lambda: viewer.frames)
            for path, status in (("", 200), ("session", 426), ("nothing", 404)):
                async with client.get(server.url + path) as answer:
                    assert answer.status == status

    run(test)


def test_a_token_is_asked_for_beyond_loopback(pipeline, monkeypatch):
    compared = []
    compare = server_module.hmac.compare_digest
    monkeypatch.setattr(server_module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))

    async def test():
        async with served(pipeline, host="0.0.0.0") as server, aiohttp.ClientSession() as client:
            here = f"http://127.0.0.1:{server.port}/"
            assert server.url.endswith(f":{server.port}/?token={server.token}") and len(server.token) >= 32
            for query in ("", "?token=", "?token=wrong", f"?token={server.token}x", "?token=%ff%00", "?token=\u00e9"):
                for path in ("", "session"):
                    async with client.get(here + path + query) as answer:
                        assert answer.status == 403 and "token: must be that of the address" in await answer.text()
                        assert server.token not in await answer.text()
            assert len(compared) == 12  # in constant time
            async with client.get(f"{here}?token={server.token}") as answer:
                assert answer.status == 200 and "WebSocket" in await answer.text()
            address = f"ws://127.0.0.1:{server.port}/session?token={server.token}"
            async with client.ws_connect(address) as ws:
                assert (await ws.receive_json())["type"] == "world"
            async with client.get(f"{here}session?token={server.token}", headers={"Origin": "http://x.y"}) as answer:
                assert answer.status == 403

        async with served(pipeline, host="0.0.0.0") as second:
            assert second.token != server.token
        async with served(pipeline) as local:
            assert not local.token and local.url == f"http://127.0.0.1:{local.port}/"

    run(test)
    assert [is_loopback(host) for host in ("localhost", "127.3.2.1", "::1", "0.0.0.0", "::", "localhost.x")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_more_viewers_than_sessions_are_told_to_wait(pipeline):
    async def test():
        async with (
            served(pipeline, max_sessions=2) as server, aiohttp.ClientSession() as client,
            player(server) as one, player(server) as two,
        ):  # fmt: skip
            await asyncio.gather(*(each.read_until(lambda each=each: each.frames) for each in (one, two)))
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with player(server):
                    pass
            assert error.value.status == 503 and len(server.worker.sessions()) == 2
            async with client.get(server.url + "session") as answer:
                assert answer.status == 503 and answer.headers["Retry-After"]
                assert "all sessions are taken (2)" in await answer.text()
            await two.socket.close()
            await eventually(lambda: len(server._viewers) == 1)
            async with player(server) as three:
                await three.read_until(lambda: three.frames)
                assert len(server.worker.sessions()) == 2

    run(test)


def test_a_thousand_connections_are_bounded(pipeline, monkeypatch):
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 1.5)

    async def test():
        async with served(pipeline) as server, player(server) as viewer:
            await viewer.read_until(lambda: viewer.frames)
            connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(300)]
            for _, writer in connections[:150]:
                writer.write(HANDSHAKE % server.port)
            await eventually(lambda: len(server._runner.server.connections) <= 65)
            answers = await asyncio.gather(*(reader.read(12) for reader, _ in connections))
            assert {*answers} <= {b"HTTP/1.1 503", b""} and len([a for a in answers if a]) > 200
            assert len(server.worker.sessions()) == 1 and threading.active_count() < 20
            for _, writer in connections:
                writer.close()
            # Those that asked for nothing were ended, and the viewer's world goes on.
            await eventually(lambda: len(server._runner.server.connections) == 1)
            assert not server._hurries
            count = len(viewer.frames)
            await viewer.read_until(lambda: len(viewer.frames) > count + 24)

    run(test)


def test_a_message_without_sense_is_answered_and_changes_nothing(pipeline):
    async def test():
        async with served(pipeline) as server, player(server) as viewer:
            await viewer.read_until(lambda: viewer.frames)
            await viewer.hold("w", 1)
            await viewer.hold("w+q", 2)
            await viewer.socket.send_str("{")
            await viewer.socket.send_bytes(b"\x00")
            await viewer.socket.send_json({"taken": 2**31})
            await viewer.read_until(lambda: len(viewer.notices.get("refused", ())) == 4)
            messages = [notice["message"] for notice in viewer.notices["refused"]]
            for message, word in zip(messages, ("'w+q'", "JSON", "got bytes", "a frame that was sent"), strict=True):
                assert word in message and "must be" in message
            newest = viewer.notices["chunk"][-1]["chunk"]
            await viewer.read_until(lambda: viewer.notices["chunk"][-1]["chunk"] > newest + 1)
            assert (viewer.notices["chunk"][-1]["keys"], viewer.notices["chunk"][-1]["sequence"]) == ("w", 1)

    run(test)


def test_a_long_message_ends_the_connection(pipeline):
    async def test():
        async with served(pipeline) as server:
            async with player(server) as viewer:
                await viewer.read_until(lambda: viewer.frames)
                await viewer.socket.send_str('{"keys": "' + "w+" * 1000 + '", "sequence": 1}')
                await viewer.read_to_the_end()
                assert viewer.code in (1009, 1006)  # 1006 where what the viewer had sent is unread: TCP then resets
            await eventually(lambda: not server.worker.sessions())

    run(test)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["begin", "step", "settle"])
def test_an_error_in_one_session_is_told_and_disturbs_no_other(pipeline, where, monkeypatch):
    made, log = [], io.StringIO()
    # pytest's own handlers keep the traceback, and with it the session.
    monkeypatch.setattr(worker_module._log, "propagate", False)
    monkeypatch.setattr(worker_module._log, "handlers", [logging.StreamHandler(log)])

    def begin():
        if where == "begin" and made:
            raise Broken("no memory\nfor a second one")
        session = pipeline.session(PROMPT, **SIZE)
        if made and where != "begin":
            broken = partial(fail_third, [], getattr(session, where))
            setattr(session, where, broken)
        made.append(weakref.ref(session))
        return session

    def fail_third(calls, method, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Broken("no memory\nfor a second one")
        return method(*arguments)

    async def test():
        async with served(pipeline, begin, max_sessions=2) as server, player(server) as good:
            await good.read_until(lambda: good.frames)
            async with player(server) as bad:
                reading = asyncio.create_task(good.read_until(lambda: len(good.frames) >= 45))
                await bad.read_to_the_end()
                assert bad.code == 1011
                assert bad.notices["error"] == [{"type": "error", "message": "no memory for a second one"}]
                await reading
            await eventually(lambda: len(server.worker.sessions()) == 1 and len(server._viewers) == 1)
            if where == "step":
                by_hand(pipeline, good)
            async with aiohttp.ClientSession() as client, client.get(server.url + "session") as answer:
                assert answer.status == 426  # the place is free
        assert "a session ended by an error" in log.getvalue() and "Broken" in log.getvalue()
        gc.collect()
        assert [ref() for ref in made] == [None] * len(made)

    run(test)


def test_the_event_loop_goes_on_while_a_chunk_is_made(pipeline):
    begun, go = threading.Event(), threading.Event()

    def begin():
        session = pipeline.session(PROMPT, **SIZE)
        step = session.step

        def slow(keys):
            begun.set()
            assert go.wait(30)
            return step(keys)

        session.step = slow
        return session

    async def test():
        async with served(pipeline, begin) as server, aiohttp.ClientSession() as client, player(server) as viewer:
            await asyncio.to_thread(begun.wait)
            for _ in range(20):
                async with client.get(server.url) as answer:
                    assert answer.status == 200
            await viewer.socket.send_str("no sense")
            await viewer.read_until(lambda: "refused" in viewer.notices)
            assert not viewer.frames
            go.set()
            await viewer.read_until(lambda: viewer.frames)

    run(test)


def test_the_end_is_told_to_every_viewer(pipeline):
    async def test():
        server = await served(pipeline, max_sessions=2).__aenter__()
        async with player(server) as one, player(server) as two:
            viewers = (one, two)
            for viewer in viewers:
                await viewer.read_until(lambda viewer=viewer: viewer.frames)
            reading = [asyncio.create_task(viewer.read_to_the_end()) for viewer in viewers]
            await server.__aexit__()
            await asyncio.gather(*reading)
            assert [viewer.code for viewer in viewers] == [1001, 1001]
            assert not server.worker.sessions() and not server.worker._thread.is_alive()
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", server.port)
            with pytest.raises(RuntimeError, match="the worker has stopped"):
                server.worker.add(None)

    run(test)


def test_an_address_that_is_taken_is_an_error(pipeline):
    async def test():
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            with pytest.raises(OSError, match=r"address already in use|in use"):
                await served(pipeline, port=other.getsockname()[1]).__aenter__()
        assert not [thread for thread in threading.enumerate() if thread.name == "sessions"]

    run(test)


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70000), ("max_sessions", 0), ("fps", 0), ("quality", 101), ("picture", "gif")]
)
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: got .*, must be"):
        Settings(**{name: value})


def test_memory_is_told():
    assert worker_module.memory_bytes(torch.device("cpu")) > 50e6
