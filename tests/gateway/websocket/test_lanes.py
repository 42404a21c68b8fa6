"""Requests in lanes of a WebSocket session: whose event it is, and steering."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from websockets.frames import Frame, Opcode
from websockets.utils import accept_key

from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.turns import PRICED, brief, code, done, steer, steered, steering
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    json_answer,
    response_object,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import client

pytestmark = pytest.mark.promise_3


# Whose event it is


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
