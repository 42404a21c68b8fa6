"""WebSocket /v1/responses: each response.create is a request like any other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway, wait_until
from tests.helpers.turns import code
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Socket,
    Upstream,
    response_object,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import CREATE, client

pytestmark = pytest.mark.promise_3


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
        told = ("websocket_connection_limit_reached", "b")  # which Codex takes as "connect anew"
        assert (code(refused), refused["stream_id"]) == told
        release.set()
        ws.completed()
        assert code(ws.until("error")) == told[0]
        assert ws.closed() == 1008
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
