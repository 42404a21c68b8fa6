"""WebSocket /v1/responses: each response.create is a request like any other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect
from websockets.utils import accept_key

from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    Gateway,
    MakeGateway,
    wait_for_length,
    wait_until,
)
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Received,
    Reply,
    Socket,
    Upstream,
    json_answer,
    response_object,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import CREATE, client

pytestmark = pytest.mark.promise_3

PRICED = '[billing]\ndefault_credit_limit = "0"'


def code(event: dict[str, Any]) -> str:
    assert event["type"] == "error"
    return str(event["error"]["code"])


@pytest.fixture(autouse=True)
def speaking(upstream: Upstream) -> None:
    upstream.talk = ws_like_openai


@pytest.mark.front_door
def test_frames_pass_unchanged_and_each_response_is_a_row(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    odd = '{ "type":"response.create",\n"model" : "gpt-up", "input":"\\u00e9 \\ud83d\\ude00 é" }'
    sent: list[bytes] = []

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        for each in ws_events(1, frame):
            sent.append(json.dumps(each, indent=1, ensure_ascii=False).encode())
            await sock.send(sent[-1])
        await sock.send(*ws_events(2, await sock.recv()))

    upstream.talk = talk
    upstream.handshake_headers = {"x-codex-turn-state": "here", "set-cookie": "a=b"}
    with connect(
        f"ws://127.0.0.1:{gateway.port}/v1/responses?x=y",
        additional_headers={
            "authorization": f"Bearer {key}",
            "openai-beta": "responses_websockets=2026-02-06",
            "session-id": "s",
            "cookie": "c",
        },
        proxy=None,
    ) as connection:
        assert connection.response is not None
        assert connection.response.headers["x-codex-turn-state"] == "here"
        assert "set-cookie" not in connection.response.headers
        connection.send(odd)
        got = [connection.recv(decode=False) for _ in range(3)]
        assert got == sent
        (row,) = gateway.rows()
        assert (row["outcome"], row["usage_source"], row["status"]) == (
            "completed",
            "upstream",
            200,
        )
        assert row["input_tokens"] == RESPONSE_USAGE["input_tokens"]
        assert row["response_id"] == "resp_ws_1"
        connection.send(json.dumps(CREATE))
        for _ in range(3):
            connection.recv()
    assert len(gateway.rows()) == 2
    (handshake,) = upstream.requests
    assert handshake.path == "/v1/responses"
    assert handshake.header("openai-beta") == "responses_websockets=2026-02-06"
    assert handshake.header("session-id") == "s"
    assert handshake.header("cookie") is None
    assert handshake.header("sec-websocket-extensions") is None
    assert key not in (handshake.header("authorization") or "")
    assert upstream.sockets[0].frames[0] == json.loads(odd)


@pytest.mark.front_door
def test_the_row_is_committed_before_the_last_event(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """While nothing can be committed the last event waits, and only that."""
    locked = threading.Event()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created)
        while not locked.is_set():
            await asyncio.sleep(0.01)
        await sock.send(delta, completed)
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.created")
        with contextlib.closing(sqlite3.connect(gateway.database)) as database:
            database.execute("BEGIN IMMEDIATE")
            locked.set()
            ws.until("response.output_text.delta")
            with pytest.raises(TimeoutError):
                ws.recv(1)
            database.rollback()
        ws.completed()
    assert gateway.row()["outcome"] == "completed"


def test_a_key_revoked_meanwhile_ends_the_connection(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    with client(gateway, key) as ws:
        ws.send()
        ws.completed()
        (row,) = gateway.rows()
        gateway.api("POST", f"/keys/{row['key_id']}/revoke")
        ws.send(stream_id="a")
        refused = ws.recv()
        assert (code(refused), refused["status"]) == ("invalid_api_key", 401)
        assert refused["stream_id"] == "a"
        assert ws.closed() == 1008
    assert len(upstream.sockets[0].frames) == 1
    with pytest.raises(InvalidStatus) as no, client(gateway, key):
        pass
    assert no.value.response.status_code == 401
    assert json.loads(no.value.response.body)["error"]["code"] == "invalid_api_key"


def test_refusals_are_error_events_and_the_connection_stays(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key(requests_per_minute=9)  # what is refused counts
    with client(gateway, key) as ws:
        for body, expected in (
            ("{", "invalid_json"),
            ('{"type":"response.create"}', "invalid_request"),
            ('{"type":"session.update"}', "invalid_request"),
            ('{"type":"response.create","model":"m","background":true}', "invalid_request"),
            ('{"type":"response.create","model":5}', "invalid_request"),
            (json.dumps({**CREATE, "previous_response_id": "resp_x"}), "response_not_found"),
            (json.dumps({**CREATE, "tools": [{"vector_store_ids": ["vs_1"]}]}), "invalid_request"),
            (
                '{"type":"response.steer","previous_response_id":"resp_x","input":"x"}',
                "response_not_found",
            ),
        ):
            ws.raw(body)
            assert code(ws.recv()) == expected, body
        ws.send()
        ws.completed()
        ws.send(stream_id="lane")
        limited = ws.recv()
        assert code(limited) == "rate_limit_exceeded"
        assert limited["status"] == 429
        assert limited["stream_id"] == "lane"
        assert 1 <= int(limited["headers"]["retry-after"]) <= 60
        assert limited["error"]["headers"] == limited["headers"]
        assert limited["headers"]["x-ratelimit-limit-requests"] == "9"
        ws.raw(b"binary")
        assert ws.closed() == 1003
    assert [frame["model"] for frame in upstream.sockets[0].frames] == ["gpt-up"]
    assert len(gateway.rows()) == 1


def test_lanes_run_side_by_side_and_take_turns_within(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(concurrency=3)
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        frames = [await sock.recv() for _ in range(3)]
        assert {frame["stream_id"] for frame in frames} == {"a", "b", "c"}
        while not release.is_set():
            await sock.send({"type": "keepalive"})
            await asyncio.sleep(0.01)
        answers = [ws_events(number, frame) for number, frame in enumerate(frames)]
        for step in range(3):
            await sock.send(*(events[step] for events in answers))
        await ws_like_openai(sock)

    upstream.talk = talk
    with client(gateway, key) as ws:
        for lane in ("a", "a", "b", "c", "d"):
            ws.send(stream_id=lane, input=lane)
        wait_until(lambda: upstream.sockets and len(upstream.sockets[0].frames) == 3)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 4)  # one waits for a place
        assert len(upstream.sockets[0].frames) == 3, "as many as there are places"
        release.set()
        done = [ws.until("response.completed")["stream_id"] for _ in range(5)]
        assert sorted(done) == ["a", "a", "b", "c", "d"]
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 5
    assert gateway.metrics()["redbtc_in_flight"] == 0


def test_what_was_made_on_the_connection_can_be_built_on(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """With store=false nobody else ever reaches it; Codex CLI works so, from a prewarm on."""
    with client(gateway, key) as ws:
        ws.send(generate=False, store=False)
        made = ws.completed()["id"]
        ws.send(previous_response_id=made, store=False)
        ws.completed()
    with client(gateway, key) as other:
        other.send(previous_response_id=made, store=False)
        assert code(other.recv()) == "response_not_found"
    assert len(gateway.rows()) == 2


def test_what_is_built_on_brings_its_models_along(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Codex CLI offers its tools once, with a prewarm."""
    limited = gateway.cli("key", "add", "test", "--models", "gpt-up")["key"]
    tool = {"type": "image_generation", "model": "gpt-image-dear"}
    offered = [{"type": "additional_tools", "tools": [tool]}]
    with client(gateway, key) as ws, client(gateway, limited) as other:
        ws.send(store=False, input=offered)
        made = ws.completed()["id"]
        ws.send(previous_response_id=made)
        made = ws.completed()["id"]
        other.send(previous_response_id=made)
        assert code(other.recv()) == "model_not_allowed"
        other.send()
        other.completed()


def test_a_stored_response_is_known_beyond_the_connection(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    with client(gateway, key) as ws:
        ws.send()
        made = ws.completed()["id"]
    with client(gateway, gateway.new_key()) as own:
        own.send(previous_response_id=made)
        own.completed()
    with client(gateway, gateway.new_key("other")) as others:
        others.send(previous_response_id=made)
        assert code(others.recv()) == "response_not_found"


def test_a_client_that_leaves_pays_what_it_used(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    left = threading.Event()

    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        await sock.send(*events[:2])
        while not left.is_set():
            await asyncio.sleep(0.01)
        await sock.send(events[2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.tear()
    wait_until(lambda: gateway.connections() == 0)
    left.set()
    wait_until(lambda: gateway.rows()[0]["outcome"] != "pending")
    (row,) = gateway.rows()
    assert row["outcome"] == "client_disconnected"
    assert (row["usage_source"], row["output_tokens"]) == ("upstream", 9)
    assert upstream.sockets[0].received.closed.wait(PATIENCE_SECONDS), "and the upstream is closed"
    assert gateway.metrics()["redbtc_in_flight"] == 0


@pytest.mark.parametrize("end", ["close", "tear"])
def test_an_upstream_that_is_gone(gateway: Gateway, upstream: Upstream, key: str, end: str) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        if end == "close":
            await sock.close(1008, "enough")
        sock.tear()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        assert ws.closed() == (1008 if end == "close" else 1011)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    (row,) = gateway.rows()
    assert row["outcome"] == "upstream_failed"


def test_an_error_event_ends_its_request(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def talk(sock: Socket) -> None:
        await sock.recv()
        error = {"type": "server_error", "code": "x", "message": "m", "param": None}
        await sock.send({"type": "error", "status": 503, "error": error})
        await ws_like_openai(sock)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        assert ws.recv()["status"] == 503
        ws.send()
        ws.completed()
    first, second = gateway.rows()
    assert (first["outcome"], first["status"]) == ("upstream_error", 503)
    assert second["outcome"] == "completed"


def test_a_steered_response_and_the_one_that_follows_are_two_rows(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key(concurrency=1)

    async def talk(sock: Socket) -> None:
        created, delta, _ = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        steer = await sock.recv()
        assert steer["type"] == "response.steer"
        first = response_object("gpt-up", status="incomplete", id="resp_ws_1")
        first["incomplete_details"] = {"reason": "steered"}
        await sock.send({"type": "response.incomplete", "response": first})
        await sock.send(*ws_events(2, {"model": "gpt-up"}))
        await ws_like_openai(sock)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        steer = {"type": "response.steer", "previous_response_id": "resp_ws_1", "input": "more"}
        ws.raw(json.dumps(steer))
        ws.until("response.incomplete")
        assert ws.completed()["id"] == "resp_ws_2"
        ws.send()
        ws.completed()
    rows = gateway.rows()
    assert [row["response_id"] for row in rows][:2] == ["resp_ws_1", "resp_ws_2"]
    assert [row["outcome"] for row in rows] == ["completed"] * 3
    assert sum(row["input_tokens"] for row in rows) == 3 * RESPONSE_USAGE["input_tokens"]
    assert gateway.metrics()["redbtc_in_flight"] == 0


def test_without_websockets_the_upgrade_is_426(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    off = make_gateway("", "websocket = false").start()
    with pytest.raises(InvalidStatus) as refused, client(off, off.new_key()):
        pass
    assert refused.value.response.status_code == 426
    upstream.talk = None
    gateway = make_gateway().start()
    with pytest.raises(InvalidStatus) as refused, client(gateway, gateway.new_key()):
        pass
    assert refused.value.response.status_code == 426
    assert json.loads(refused.value.response.body)["error"]["code"] == "upgrade_required"


def test_spending_is_held_for_each_frame(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway('[billing]\ndefault_credit_limit = "0"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "1")
    most = {"max_output_tokens": 10}
    with client(gateway, key) as ws:
        ws.send(**most)
        ws.completed()
        for _ in range(40):
            ws.send(**most)
            event = ws.until("response.completed", "error")
            if event["type"] == "error":
                break
        assert code(event) == "insufficient_quota"
        assert event["headers"]["x-should-retry"] == "false"
    balance = gateway.api("GET", "/accounts/test")["balance"]
    assert float(balance) >= 0


def test_two_accounts_hammer_each_others_ids_while_100_lanes_run(
    gateway: Gateway, upstream: Upstream
) -> None:
    keys = {name: gateway.new_key(name, concurrency=0) for name in ("a", "b")}
    made: dict[str, list[str]] = {"a": [], "b": []}
    numbers = iter(range(1, 100_000))

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            await sock.send(*ws_events(next(numbers), frame))

    upstream.talk = talk

    def run(name: str) -> int:
        other = "b" if name == "a" else "a"
        refused = 0
        with client(gateway, keys[name]) as ws, gateway.client(keys[name]) as http:
            for _ in range(6):
                expected = 0
                for lane in range(50):
                    foreign = made[other][-1:] if lane % 2 else []
                    more = {"previous_response_id": foreign[0]} if foreign else {}
                    ws.send(stream_id=f"{name}{lane}", user=name, **more)
                    expected += 1
                for _ in range(expected):
                    event = ws.until("response.completed", "error")
                    if event["type"] == "error":
                        assert code(event) == "response_not_found"
                        refused += 1
                    else:
                        assert event["stream_id"].startswith(name)
                        made[name].append(event["response"]["id"])
                for foreign_id in made[other][-3:]:
                    for method in ("GET", "DELETE"):
                        answer = http.request(method, f"/responses/{foreign_id}")
                        assert answer.json()["error"]["code"] == "response_not_found"
        return refused

    with ThreadPoolExecutor(2) as pool:
        refusals = list(pool.map(run, keys))
    assert sum(refusals) > 100
    assert {request.header("upgrade") for request in upstream.requests} == {"websocket"}
    for sock in upstream.sockets:
        named = [frame.get("previous_response_id") for frame in sock.frames]
        assert named == [None] * len(named), "none of the other's ids went through"
    rows = gateway.rows()
    assert len(rows) == 600 - sum(refusals)
    for name in keys:
        own = {row["response_id"] for row in rows if row["account"] == name}
        assert own == set(made[name])


def test_a_connection_has_its_time(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("", "total_timeout_seconds = 2.5").start()
    with client(gateway, gateway.new_key()) as ws:
        ws.send()
        ws.completed()
        expired = ws.recv()
        assert code(expired) == "websocket_connection_limit_reached"
        assert ws.closed() == 1008
    assert gateway.metrics()["redbtc_in_flight"] == 0


def test_an_upstream_that_says_nothing_more(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("", "idle_timeout_seconds = 0.5").start()

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, gateway.new_key()) as ws:
        ws.send(stream_id="x")
        refused = ws.until("error")
        assert (code(refused), refused["status"]) == ("upstream_timeout", 504)
        assert ws.closed() == 1011
    assert upstream.sockets[0].received.closed.wait(PATIENCE_SECONDS), "and the upstream is closed"
    assert gateway.row()["outcome"] == "upstream_failed"


def test_a_slow_reader_slows_the_upstream_down(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    sent = 0
    padding = "x" * 100_000

    async def talk(sock: Socket) -> None:
        nonlocal sent
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created)
        for _ in range(1000):
            await sock.send({**delta, "delta": padding})
            sent += 1
        await sock.send(completed)
        await sock.recv()

    upstream.talk = talk
    before = gateway.rss()
    with client(gateway, key) as ws:
        ws.send()
        wait_until(lambda: sent > 5)
        time.sleep(1)
        assert sent < 400, "it waits"
        assert gateway.rss() - before < 60 << 20
        assert ws.completed()["id"] == "resp_ws_1"
    assert sent == 1000
    assert gateway.row()["outcome"] == "completed"


def test_while_draining_what_is_in_flight_ends_and_nothing_begins(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        await sock.send(*events[:2])
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send(events[2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send(stream_id="a")
        ws.until("response.output_text.delta")
        gateway.terminate(wait=False)
        wait_until(lambda: '"draining"' in gateway.log())
        ws.send(stream_id="b")
        refused = ws.until("error")
        assert (code(refused), refused["stream_id"]) == ("draining", "b")
        assert refused["headers"]["retry-after"]
        release.set()
        ws.completed()
        assert ws.closed() == 1012
    assert gateway.wait() == 0
    assert gateway.row()["outcome"] == "completed"


def test_what_is_in_flight_at_a_kill_is_interrupted(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv()))
        await sock.send(*ws_events(2, await sock.recv())[:2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.completed()
        ws.send()
        ws.until("response.output_text.delta")
        gateway.kill()
    assert sorted(row["outcome"] for row in gateway.rows()) == ["completed", "interrupted"]


def test_models_go_to_the_upstream_that_serves_them(make_gateway: MakeGateway) -> None:
    with Upstream() as one, Upstream() as two:
        one.talk = two.talk = ws_like_openai
        upstreams = [
            {"name": name, "base_url": up.url, "api_key_env": "", "models": [f"{name}-*"]}
            for name, up in (("one", one), ("two", two))
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        with client(gateway, gateway.new_key()) as ws:
            for model in ("two-a", "one-a", "two-b", "none"):
                ws.send(model=model, stream_id=model)
                event = ws.until("response.completed", "error")
                if event["type"] == "error":
                    assert (model, code(event)) == ("none", "model_not_found")
                else:
                    assert event["response"]["model"] == model
        assert [row["upstream"] for row in gateway.rows()] == ["two", "one", "two"]
        assert len(two.sockets) == 1, "one connection to each"


def test_turns_and_connections_leave_nothing_behind(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(concurrency=16)

    def turns(number: int) -> None:
        for _ in range(10):
            with client(gateway, key) as ws:
                for turn in range(20):
                    ws.send(stream_id=f"{turn % 4}")
                for _ in range(20 if number % 2 else 3):
                    ws.completed()
                ws.tear()

    turns(1)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    files, rss = gateway.open_files(), gateway.rss()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turns, range(8)))
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    wait_until(lambda: gateway.open_files() <= files + 2)
    assert gateway.rss() - rss < 30 << 20
    assert not [row for row in gateway.rows() if row["outcome"] == "pending"]


def test_pings_are_answered_on_both_sides(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        assert await sock.ping(b"there?")
        await sock.send(*ws_events(1, frame))
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        assert ws.ping()
        ws.send()
        ws.completed()
        assert ws.ping()


# Whose event it is


def brief(gateway: Gateway) -> list[tuple[Any, ...]]:
    """The ledger once nothing is in flight, in an order of its own."""
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    rows = gateway.rows()
    found = [(row["response_id"], row["outcome"], row["output_tokens"]) for row in rows]
    return sorted(found, key=str)


def done(number: int) -> tuple[Any, ...]:
    return (f"resp_ws_{number}", "completed", 9)


def steered(number: int) -> dict[str, Any]:
    response = response_object("gpt-up", status="incomplete", id=f"resp_ws_{number}")
    response["incomplete_details"] = {"reason": "steered"}
    return {"type": "response.incomplete", "response": response}


def steer(number: int, **more: Any) -> str:
    frame = {"type": "response.steer", "previous_response_id": f"resp_ws_{number}"}
    return json.dumps({**frame, "input": "more", **more})


def test_events_belong_to_the_response_that_they_name(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """An upstream that leaves out the lanes."""

    async def talk(sock: Socket) -> None:
        frames = [await sock.recv() for _ in range(3)]
        answers = [
            ws_events(number, {"model": frame["model"]}) for number, frame in enumerate(frames)
        ]
        for step in (0, 1):
            await sock.send(*(events[step] for events in answers[:2]))
        error = {"type": "invalid_request_error", "code": "x", "message": "the third"}
        await sock.send({"type": "error", "status": 400, "error": error})
        await sock.send(answers[1][2], answers[0][2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        for lane in "abc":
            ws.send(stream_id=lane)
        assert ws.until("error")["error"]["message"] == "the third"
        assert [ws.completed()["id"] for _ in range(2)] == ["resp_ws_1", "resp_ws_0"]
        assert brief(gateway) == [done(0), done(1), (None, "upstream_error", None)]


def test_an_event_may_come_with_the_upstreams_handshake(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """The client gets it after its own handshake, and the end of the connection as well."""

    async def script(request: Received, reply: Reply) -> None:
        head = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        accept = accept_key(request.header("sec-websocket-key") or "")
        event = Frame(Opcode.TEXT, b'{"type":"error","error":{"code":"early"}}').serialize(
            mask=False
        )
        await reply.raw(f"{head}sec-websocket-accept: {accept}\r\n\r\n".encode() + event)
        await asyncio.sleep(0.1)
        reply.close()

    upstream.talk, upstream.script = None, script
    with client(gateway, key) as connection:
        assert code(connection.recv(seconds=10)) == "early"
        assert connection.closed() == 1011


def test_what_nobody_asked_for_is_written_down(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """A second response behind the first, told twice; one that ends after its own error."""

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        await sock.send(*ws_events(1, frame), *ws_events(2, frame), ws_events(2, frame)[2])
        third = ws_events(3, await sock.recv())
        error = {"type": "server_error", "code": "x", "message": "m"}
        await sock.send(*third[:2], {"type": "error", "status": 500, "error": error})
        fourth = ws_events(4, await sock.recv())
        await sock.send(*fourth[:2], third[2], fourth[2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        assert [ws.completed()["id"] for _ in range(3)] == ["resp_ws_1", "resp_ws_2", "resp_ws_2"]
        ws.send()
        ws.until("error")
        ws.send()
        assert [ws.completed()["id"] for _ in range(2)] == ["resp_ws_3", "resp_ws_4"]
        failed = ("resp_ws_3", "upstream_error", 9)  # first estimated, then corrected
        assert brief(gateway) == [done(1), done(2), failed, done(4)]
    assert [bool(row["corrected_at"]) for row in gateway.rows()] == [False, False, True, False]
    assert {row["requested_model"] for row in gateway.rows()} == {"gpt-up"}


def test_who_leaves_pays_for_what_nobody_asked_for(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """It is estimated, and corrected when its response shows its usage."""

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        await sock.send(*ws_events(1, frame), *ws_events(2, frame)[:2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        for _ in range(2):
            ws.until("response.output_text.delta")
    wait_until(lambda: len(gateway.rows()) == 2)
    row = gateway.rows()[1]
    assert (row["response_id"], row["outcome"]) == ("resp_ws_2", "client_disconnected")
    assert row["usage_source"] == "estimated"
    assert row["output_tokens"] >= 2
    upstream.script = json_answer(response_object(id="resp_ws_2"))
    with gateway.client(key) as http:
        http.get("/responses/resp_ws_2")
    assert gateway.rows()[1]["output_tokens"] == 9


# Steering


def test_the_next_request_of_a_lane_waits_for_what_steering_makes_follow(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        await sock.recv()
        await sock.send(steered(1))
        await asyncio.sleep(0.3)
        await sock.send(*ws_events(2, {"model": "gpt-up"}))
        await sock.send(*ws_events(3, await sock.recv()))
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1))
        ws.until("response.incomplete")
        ws.send()
        assert [ws.completed()["id"] for _ in range(2)] == ["resp_ws_2", "resp_ws_3"]
        assert brief(gateway) == [done(1), done(2), done(3)]


def test_a_response_that_follows_keeps_nothing_of_the_one_before(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """If the client leaves, its row has no status, like that of a first response."""

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        await sock.recv()
        await sock.send(steered(1), *ws_events(2, {"model": "gpt-up"})[:2])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1))
        ws.until("response.incomplete")
        ws.until("response.output_text.delta")
        ws.tear()
    assert [each[:2] for each in brief(gateway)] == [
        ("resp_ws_1", "completed"),
        ("resp_ws_2", "client_disconnected"),
    ]
    assert [row["status"] for row in gateway.rows()] == [200, None]


@pytest.mark.parametrize("end", ["response.steer.failed", "response.steer.pending", "error"])
def test_steering_that_nothing_follows_holds_no_place(
    gateway: Gateway, upstream: Upstream, end: str
) -> None:
    key = gateway.new_key(concurrency=1)

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        await sock.recv()
        await sock.send(completed, {"type": end, "status": 400, "error": {"code": "late"}})
        await ws_like_openai(sock)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1))
        ws.completed()
        ws.until(end)
        assert brief(gateway) == [done(1)]
        ws.send()
        ws.completed()


async def steering(sock: Socket) -> None:
    """Each input ends the response, and another follows."""
    number = 1
    await sock.send(*ws_events(number, await sock.recv())[:2])
    while True:
        await sock.recv()
        await sock.send(steered(number))
        number += 1
        await sock.send(*ws_events(number, {"model": "gpt-up"})[:2])


def test_what_follows_is_held_for(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(f"{PRICED}\n[metering]\ndrain_seconds = 1").start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "0.6")
    upstream.talk = steering
    with client(gateway, key) as ws:
        ws.send(max_output_tokens=10)
        event = ws.until("response.output_text.delta")
        number = 0
        while event["type"] != "error":
            number += 1
            ws.raw(steer(number))
            event = ws.until("response.output_text.delta", "error")
        assert code(event) == "insufficient_quota"
        assert number > 2
        account = gateway.api("GET", "/accounts/test")
        assert float(account["balance"]) >= float(account["held"]) > 0
        ws.tear()
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.api("GET", "/accounts/test")["held"] == "0"
    assert gateway.cli("db", "check")["ok"]


def test_steering_that_failed_is_not_held_for_again(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(PRICED).start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "0.4")

    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        while True:
            await sock.recv()
            await sock.send({"type": "response.steer.failed"})

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send(max_output_tokens=10)
        ws.until("response.output_text.delta")
        for _ in range(5):
            ws.raw(steer(1))
            event = ws.until("response.steer.failed", "error")
            assert event["type"] != "error", event
        ws.raw(steer(1, input="x" * 200))
        assert code(ws.until("error")) == "insufficient_quota"
        ws.tear()


def test_steering_of_a_response_that_ends_meanwhile_holds_no_money(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """It names so many objects that looking them up takes time, in which the response ends."""
    gateway = make_gateway(PRICED).start()
    gateway.cli("price", "add", "gpt-up", "--input", "1", "--output", "1")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "1000")
    items = [{"type": "message", "id": f"msg_{number}"} for number in range(3000)]
    named = [{"type": "item_reference", "id": item["id"]} for item in items * 6]
    sent, pause = threading.Event(), 0.0

    async def talk(sock: Socket) -> None:
        number = 0
        while True:
            if (await sock.recv())["type"] == "response.steer":
                await sock.send({"type": "response.steer.failed"})
                continue
            number += 1
            created, delta, completed = ws_events(number, {"model": "gpt-up"})
            completed["response"]["output"] = items if number == 1 else []
            await sock.send(created, delta)
            if number == 2:  # how long steering takes is measured
                await sock.recv()
                await sock.send({"type": "response.steer.failed"})
            elif number > 2:
                while not sent.is_set():
                    await asyncio.sleep(0.001)
                await asyncio.sleep(pause)
            await sock.send(completed)

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.completed()
        ws.send()
        ws.until("response.output_text.delta")
        started = time.monotonic()
        ws.raw(steer(2, input=named))
        ws.until("response.steer.failed")
        seconds = time.monotonic() - started
        ws.completed()
        outcomes: list[str] = []
        for number in range(
            3, 18
        ):  # nearer and nearer to the pause with which steering is passed on
            sent.clear()
            ws.send()
            ws.until("response.output_text.delta")
            step = seconds / min(number - 1, 12)
            pause = max(
                0.0, pause + (step if outcomes[-1:] != ["response.steer.failed"] else -step)
            )
            ws.raw(steer(number, input=named))
            sent.set()
            ends = ["response.completed", "response.steer.failed", "error"]
            outcomes += {ws.until(*ends)["type"], ws.until(*ends)["type"]} - {"response.completed"}
        assert "error" in outcomes
    steered = [text for text in upstream.sockets[0].texts if b'"response.steer"' in text]
    assert len(steered) == 1 + outcomes.count("response.steer.failed")
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.api("GET", "/accounts/test")["held"] == "0"


def test_steering_is_a_request_in_the_rates(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(requests_per_minute=3)
    upstream.talk = steering
    with client(gateway, key) as ws:
        ws.send()
        for number in (1, 2, 3):
            ws.until("response.output_text.delta")
            ws.raw(steer(number))
        assert code(ws.until("error")) == "rate_limit_exceeded"


def test_steering_has_no_other_members(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.talk = steering
    theirs = [{"role": "user", "content": [{"type": "input_file", "file_id": "file-x"}]}]
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        for more in ({"model": "gpt-dear"}, {"response_id": "resp_ws_1"}, {"input": theirs}):
            ws.raw(steer(1, **more))
            refused = ws.until("error")
            assert (code(refused), refused["error"]["param"]) == (
                "invalid_request",
                "file_id" if "input" in more else next(iter(more)),
            )
        tools = [{"type": "additional_tools", "tools": [{"type": "image_generation"}]}]
        ws.raw(steer(1, input=tools))
        assert code(ws.until("error")) == "invalid_request"
        ws.raw(steer(2))
        assert code(ws.until("error")) == "response_not_found"
        ws.raw(steer(1))
        ws.until("response.incomplete")
    assert len(upstream.sockets[0].frames) == 2


def test_steering_brings_no_tools_by_a_reference(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """What the response that follows can cost is held for the tools of the request; and the key may
    be one that may not use the others' models."""
    gateway = make_gateway().start()
    key = gateway.new_key()
    narrow = gateway.cli("key", "add", "test", "--models", "gpt-up")["key"]
    tool = {"type": "image_generation", "model": "gpt-image-dear"}
    offered = [{"type": "additional_tools", "tools": [tool]}]
    named = {"input": [{"type": "item_reference", "id": "tools_1"}]}
    upstream.talk = steering
    with gateway.client(key) as http:
        assert (
            http.post("/responses", json={"model": "gpt-up", "input": offered}).status_code == 200
        )
        listed = {"object": "list", "data": [{"id": "tools_1", "type": "additional_tools"}]}
        upstream.script = json_answer(listed)
        http.get("/responses/resp_1/input_items")
    with client(gateway, narrow) as ws:
        ws.send()
        ws.until("response.output_text.delta")
        ws.raw(steer(1, **named))
        assert code(ws.until("error")) == "invalid_request"
    with client(gateway, key) as ws:
        ws.send(previous_response_id="resp_1")
        ws.until("response.output_text.delta")
        ws.raw(steer(1, **named))
        ws.until("response.incomplete")


def test_only_what_waits_is_counted_as_waiting(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[server]\nmax_body_bytes = 100000").start()

    async def talk(sock: Socket) -> None:
        for number in range(3):
            await sock.send(ws_events(number, await sock.recv())[0])
        await sock.recv()

    upstream.talk = talk
    with client(gateway, gateway.new_key()) as ws:
        for lane in "abc":
            ws.send(stream_id=lane, input="x" * 90_000)
            assert ws.recv()["type"] == "response.created"
        ws.tear()


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
