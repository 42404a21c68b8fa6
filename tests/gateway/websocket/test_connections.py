"""The connections of WebSocket sessions: to upstreams, from clients, and what is odd on them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    Gateway,
    MakeGateway,
    wait_for_length,
    wait_until,
)
from tests.helpers.turns import PRICED, brief, code, done, steer, steered
from tests.helpers.upstream import Socket, Upstream, json_answer, ws_events, ws_like_openai
from tests.helpers.websocket_client import CREATE, client

pytestmark = pytest.mark.promise_3


# Lines


def test_one_lane_that_times_out_costs_the_others_nothing(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """They have the same fate: nothing stops a single response. But it is the upstream's fault."""
    gateway = make_gateway("", "idle_timeout_seconds = 0.6").start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        created, delta, _ = ws_events(2, await sock.recv())
        await sock.send(created)
        with contextlib.suppress(ConnectionError):
            while True:
                await sock.send(delta)
                await asyncio.sleep(0.05)

    upstream.talk = talk
    with client(gateway, gateway.new_key()) as ws:
        ws.send(stream_id="a")
        ws.send(stream_id="b")
        assert {ws.until("error")["stream_id"] for _ in range(2)} == {"a", "b"}
        assert ws.closed() == 1011
    assert {row["outcome"] for row in gateway.rows()} == {"upstream_failed"}
    assert {row["usage_source"] for row in gateway.rows()} == {"estimated"}
    assert all(0.01 < float(row["cost"]) < 128 for row in gateway.rows())


def test_a_turn_that_times_out_is_billed_once(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Its response ends while the line is being closed."""
    gateway = make_gateway(PRICED, "idle_timeout_seconds = 1.5").start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "10")

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        await sock.end_late(completed)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send(max_output_tokens=10)
        assert code(ws.until("error", "response.completed")) == "upstream_timeout"
        assert ws.closed() == 1011
    assert brief(gateway) == [("resp_ws_1", "upstream_failed", 10)]
    left = 10 - float(gateway.row()["cost"])
    assert float(gateway.api("GET", "/accounts/test")["balance"]) == pytest.approx(left)


def test_an_upstream_that_is_down_ends_its_own_request_only(make_gateway: MakeGateway) -> None:
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send(completed)
        await sock.recv()

    with Upstream() as one:
        one.talk = talk
        upstreams = [
            {
                "name": name,
                "base_url": url,
                "api_key_env": "",
                "models": [f"{name}-*"],
                "priority": n,
            }
            for n, (name, url) in enumerate([("one", one.url), ("two", "http://127.0.0.1:9/v1")])
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send(model="one-a", stream_id="a")
            ws.until("response.output_text.delta")
            ws.send(model="two-a", stream_id="b")
            assert code(ws.until("error")) == "upstream_unreachable"
            release.set()
            ws.completed()
        assert [row["outcome"] for row in gateway.rows()] == ["completed", "upstream_failed"]


def test_the_next_upstream_is_tried_where_one_never_answers(make_gateway: MakeGateway) -> None:
    with Upstream() as good, socket.create_server(("127.0.0.1", 0)) as hole:
        good.talk = ws_like_openai
        silent = f"http://127.0.0.1:{hole.getsockname()[1]}/v1"
        upstreams = [
            {"name": "first", "base_url": good.url, "models": ["first"], "priority": 1},
            {"name": "silent", "base_url": silent, "priority": 2, "connect_timeout_seconds": 0.5},
            {"name": "good", "base_url": good.url, "priority": 3},
        ]
        for each in upstreams:
            each["api_key_env"] = ""
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            for lane in "abc":
                ws.send(stream_id=lane)
            for _ in range(3):
                ws.completed()
        assert {row["upstream"] for row in gateway.rows()} == {"good"}


def test_new_settings_hold_for_the_next_request(make_gateway: MakeGateway) -> None:
    def settings(url: str) -> dict[str, Any]:
        return {"server": {}, "upstreams": [{"name": "u", "base_url": url, "api_key_env": ""}]}

    with Upstream() as old, Upstream() as new:
        old.talk = new.talk = ws_like_openai
        gateway = make_gateway(settings(old.url)).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send()
            ws.completed()
            gateway.configure(settings(new.url))
            gateway.signal(signal.SIGHUP)
            wait_until(lambda: '"reloaded"' in gateway.log())
            ws.send()
            ws.completed()
        assert [len(each.sockets[0].frames) for each in (old, new)] == [1, 1]


# Clients


HANDSHAKE = (
    "GET /v1/responses HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def by_hand(gateway: Gateway, key: str) -> socket.socket:
    """A client that has asked for a WebSocket, and reads nothing."""
    sock = gateway.connect()
    sock.sendall(f"{HANDSHAKE}Authorization: Bearer {key}\r\n\r\n".encode())
    return sock


def test_who_leaves_during_the_handshake_leaves_nothing(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    upstream.handshake_seconds = 2
    files = gateway.open_files()
    for number in range(1, 21):
        with by_hand(gateway, key):
            wait_for_length(upstream.requests, number)
    wait_until(lambda: gateway.log().count('"client_disconnected"') == 20)
    wait_until(lambda: not upstream.connections and gateway.open_files() <= files + 1)


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"])
@pytest.mark.parametrize(
    ("early", "end"),
    {
        "a ping": (b"\x89\x82\0\0\0\0hi", b"\x8a\x02hi"),
        "a close": (b"\x88\x82\0\0\0\0\x03\xe8", b"\x88\x02\x03\xe8"),
        "no frame": (b"GET / HTTP/1.1\r\n\r\n", b"invalid opcode"),
    }.values(),
)
def test_frames_before_the_handshake_is_answered_wait(
    gateway: Gateway, upstream: Upstream, key: str, first: bytes, early: bytes, end: bytes
) -> None:
    upstream.talk = ws_like_openai
    upstream.handshake_seconds = 0.1
    handshake = f"{HANDSHAKE}Authorization: Bearer {key}\r\n\r\n".encode()
    with gateway.connect() as sock:
        sock.sendall(first + handshake + early)
        answer = b""
        while not answer.endswith(end):
            answer += sock.recv(65536) or b"<the end>"
            assert not answer.endswith(b"<the end>"), answer
    assert answer.removeprefix(b"HTTP/1.1 200 OK").count(b"HTTP/1.1 101 ") == 1
    assert answer.startswith(b"HTTP/1.1 200 " if first else b"HTTP/1.1 101 ")


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_frames_before_the_handshake_is_answered_take_little_memory(
    gateway: Gateway, upstream: Upstream, key: str, first: bytes
) -> None:
    """After a request of a pipeline, reading was switched on for good."""
    upstream.handshake_seconds = PATIENCE_SECONDS
    before = gateway.rss()
    frame = b"\x81\xfe\xea\x60\0\0\0\0" + b"x" * 60_000
    with gateway.connect() as sock:
        handshake = f"{HANDSHAKE}Authorization: Bearer {key}\r\n\r\n".encode()
        sock.sendall(first + handshake + frame * 2)
        wait_until(lambda: upstream.requests)
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(1000):
                sock.sendall(frame)
        assert gateway.rss() - before < 20 << 20


def test_who_leaves_while_the_upstream_is_dialled_pays_nothing(make_gateway: MakeGateway) -> None:
    with Upstream() as one, Upstream() as two:
        one.talk = two.talk = ws_like_openai
        two.handshake_seconds = 2
        upstreams = [
            {
                "name": name,
                "base_url": up.url,
                "api_key_env": "",
                "models": [f"{name}-*"],
                "priority": n,
            }
            for n, (name, up) in enumerate([("one", one), ("two", two)])
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send(model="two-a")
            wait_until(lambda: two.requests)
            ws.tear()
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        wait_until(lambda: not two.connections)
        assert [sock.frames for sock in two.sockets] in ([], [[]])
        assert gateway.rows() == []


def test_who_never_reads_is_let_go_of(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("", "idle_timeout_seconds = 1.5").start()

    async def talk(sock: Socket) -> None:
        created, delta, _ = ws_events(1, await sock.recv())
        with contextlib.suppress(ConnectionError):
            await sock.send(created)
            for _ in range(300):
                await sock.send({**delta, "delta": "x" * 100_000})

    upstream.talk = talk
    with by_hand(gateway, gateway.new_key()) as sock:
        frame = Frame(Opcode.TEXT, json.dumps(CREATE).encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 101 ")
        sock.sendall(frame.serialize(mask=True))
        wait_until(lambda: upstream.sockets and upstream.sockets[0].frames)
        wait_until(lambda: gateway.connections() == 0)
    assert [outcome for _, outcome, _ in brief(gateway)] == ["client_disconnected"]


def test_waiting_requests_are_bounded_over_all_lanes(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(concurrency=1)

    async def talk(sock: Socket) -> None:
        await sock.recv()
        await asyncio.Event().wait()

    upstream.talk = talk
    before = gateway.rss()
    with client(gateway, key) as ws:
        for number in range(1200):
            ws.send(stream_id=f"{number}", input="x" * 20_000)
        refused = ws.until("error")
        assert code(refused) == "concurrency_limit_exceeded"
        assert gateway.metrics()["redbtc_in_flight"] <= 1001
        assert gateway.rss() - before < 60 << 20
        ws.tear()


def test_who_stops_reading_pays_for_all_lanes(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("", "idle_timeout_seconds = 3").start()

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(2, await sock.recv())[:2])
        created, delta, _ = ws_events(1, await sock.recv())
        with contextlib.suppress(ConnectionError):
            await sock.send(created)
            await asyncio.sleep(0.4)
            for _ in range(300):
                await sock.send({**delta, "delta": "x" * 100_000})

    upstream.talk = talk
    with by_hand(gateway, gateway.new_key()) as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 101 ")
        for number, lane in enumerate("ba"):
            text = json.dumps({**CREATE, "stream_id": lane}).encode()
            sock.sendall(Frame(Opcode.TEXT, text).serialize(mask=True))
            gateway.wait_for_rows(number + 1)
        assert {outcome for _, outcome, _ in brief(gateway)} == {"client_disconnected"}


def test_a_slow_reader_is_not_to_blame_for_another_line(make_gateway: MakeGateway) -> None:
    over = threading.Event()

    async def much(sock: Socket) -> None:
        created, delta, _ = ws_events(1, await sock.recv())
        with contextlib.suppress(ConnectionError):
            await sock.send(created)
            while not over.is_set():
                await sock.send({**delta, "delta": "x" * 100_000})

    async def stalls(sock: Socket) -> None:
        await sock.send(*ws_events(2, await sock.recv())[:2])
        await sock.recv()

    with Upstream() as one, Upstream() as two:
        one.talk, two.talk = much, stalls
        upstreams: list[dict[str, Any]] = [
            {"name": "one", "base_url": one.url, "models": ["one"]},
            {"name": "two", "base_url": two.url, "models": ["two"], "idle_timeout_seconds": 2},
        ]
        for each in upstreams:
            each["api_key_env"] = ""
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send(model="two", stream_id="b")
            ws.until("response.output_text.delta")
            ws.send(model="one", stream_id="a")
            while (event := ws.recv())["type"] != "error":
                time.sleep(0.02)
            assert (code(event), event["stream_id"]) == ("upstream_timeout", "b")
            over.set()
            ws.tear()
        outcomes = {row["upstream"]: row["outcome"] for row in gateway.rows()}
        assert outcomes["two"] == "upstream_failed"


def test_an_upstream_that_stops_reading_keeps_no_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("", "first_byte_timeout_seconds = 0.6").start()

    async def talk(sock: Socket) -> None:
        await sock.stop_reading()

    upstream.talk = talk
    key, files = gateway.new_key(concurrency=1), gateway.open_files()
    with client(gateway, key) as ws:
        ws.send(input="x" * 30_000_000)
        assert code(ws.recv()) == "upstream_timeout"
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        assert ws.closed() == 1011
    wait_until(lambda: gateway.open_files() <= files)
    assert brief(gateway) == [(None, "upstream_failed", None)]


def test_a_message_that_is_answered_before_it_is_read_keeps_no_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(
        "", "idle_timeout_seconds = 600\nfirst_byte_timeout_seconds = 600"
    ).start()
    key = gateway.new_key(concurrency=1)

    async def talk(sock: Socket) -> None:
        if len(upstream.sockets) > 1:
            await ws_like_openai(sock)
        await sock.begin()
        await sock.send(*ws_events(1, {"model": "gpt-up"}))
        await sock.stop_reading()

    upstream.talk = talk
    with client(gateway, key) as ws:
        for _ in range(2):
            ws.send(metadata={"long": "x" * 20_000_000})
        for _ in range(2):
            ws.completed()
        ws.send()
        ws.completed()
    assert len(upstream.sockets) == 2
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 3


def test_an_idle_connection_stays_when_a_message_was_answered_unread(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        if len(upstream.sockets) > 1:
            await ws_like_openai(sock)
        await sock.begin()
        await sock.send(*ws_events(1, {"model": "gpt-up"}))
        await sock.stop_reading()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send(metadata={"long": "x" * 20_000_000})
        ws.completed()
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        time.sleep(0.1)  # the line is closed now
        ws.send()
        ws.completed()


def test_steering_that_an_upstream_does_not_read_ends(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Even where the response has ended meanwhile, so that nothing else has a timeout."""
    gateway = make_gateway("", "idle_timeout_seconds = 2").start()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        await asyncio.sleep(0.4)
        await sock.send(completed)
        await sock.stop_reading()

    upstream.talk = talk
    with client(gateway, gateway.new_key()) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1, input="x" * 12_000_000))
        ws.completed()
        assert ws.closed() == 1011
    assert brief(gateway) == [done(1)]


def test_who_leaves_while_another_line_is_dialled_leaves_none(make_gateway: MakeGateway) -> None:
    """Not even where leaving ends all at once, and the first line takes its time to close."""
    with Upstream() as one, Upstream() as two:
        two.talk, two.handshake_seconds = ws_like_openai, 2

        async def talk(sock: Socket) -> None:
            await sock.stop_reading()

        one.talk = talk
        upstreams = [
            {"name": n, "base_url": up.url, "api_key_env": "", "models": [n], "priority": i}
            for i, (n, up) in enumerate([("one", one), ("two", two)])
        ]
        settings = {"server": {}, "metering": {"on_disconnect": "cancel"}, "upstreams": upstreams}
        gateway = make_gateway(settings).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send(model="two")
            wait_until(lambda: two.requests)
            ws.tear()
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        wait_until(lambda: not two.connections)
        assert gateway.rows() == []


# What is odd


def test_the_next_upstream_is_asked_where_one_refuses(make_gateway: MakeGateway) -> None:
    with Upstream() as one, Upstream() as two:
        one.script = json_answer({"error": {"message": "busy"}}, 503)
        two.talk = ws_like_openai
        upstreams = [
            {"name": name, "base_url": up.url, "api_key_env": "", "priority": number}
            for number, (name, up) in enumerate([("one", one), ("two", two)])
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            ws.send()
            ws.completed()


def test_what_follows_without_its_first_event_is_written_down(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        await sock.recv()
        await sock.send(steered(1), *ws_events(2, {"model": "gpt-up"})[1:])
        await ws_like_openai(sock)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1))
        ws.completed()
        assert brief(gateway) == [done(1), done(2)]


def test_an_id_used_twice_is_two_responses(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def talk(sock: Socket) -> None:
        while True:
            await sock.send(*ws_events(1, await sock.recv()))

    upstream.talk = talk
    with client(gateway, key) as ws:
        for _ in range(2):
            ws.send()
            ws.completed()
        assert brief(gateway) == [done(1), done(1)]


def test_text_is_estimated_as_over_http(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway('[metering]\non_disconnect = "cancel"').start()

    async def talk(sock: Socket) -> None:
        created, delta, _ = ws_events(1, await sock.recv())
        await sock.send(created, *[{**delta, "delta": "abcd"}] * 100)
        await sock.recv()

    upstream.talk = talk
    with client(gateway, gateway.new_key()) as ws:
        ws.send()
        for _ in range(101):
            ws.recv()
        ws.tear()
    wait_until(lambda: gateway.row()["outcome"] != "pending")
    assert gateway.row()["output_tokens"] == 100


def test_what_was_made_beside_something_known_can_be_built_on(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        for number in (1, 2, 3):
            frame, more = await sock.recv(), {"conversation": {"id": "conv_1"}, "output": []}
            await sock.send(*ws_events(number, frame, **more))
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        made = None
        for _ in range(3):
            ws.send(store=False, **({"previous_response_id": made} if made else {}))
            made = ws.completed()["id"]


def test_a_bad_frame_is_refused_in_its_lane(gateway: Gateway, upstream: Upstream, key: str) -> None:
    with client(gateway, key) as ws:
        ws.raw('{"type":"response.create","stream_id":"a"}')
        refused = ws.recv()
        assert (code(refused), refused["stream_id"]) == ("invalid_request", "a")


def test_half_a_character_passes_as_it_is(gateway: Gateway, upstream: Upstream, key: str) -> None:
    frames: list[str] = []

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        frames.append(frame["input"])
        created, delta, completed = ws_events(1, frame)
        await sock.send(created, {**delta, "delta": "\ud83d"}, completed)
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send(input="\ud83d")
        assert ws.until("response.output_text.delta")["delta"] == "\ud83d"
        ws.completed()
        assert brief(gateway) == [done(1)]
    assert frames == ["\ud83d"]


def test_a_turn_whose_upstream_falls_silent_before_any_output_is_estimated(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        created, *_ = ws_events(1, await sock.recv())
        await sock.send(created)
        await sock.recv()

    upstream.talk = talk
    gateway = make_gateway("", "idle_timeout_seconds = 1").start()
    gateway.api("POST", "/prices", {"prices": [{"model": "gpt-up", "input": "5", "output": "30"}]})
    with client(gateway, gateway.new_key()) as ws:
        ws.send()
        ws.until("response.created")
        ws.until("error")
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert row["output_tokens"] > 0
