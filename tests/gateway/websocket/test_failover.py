"""WebSocket sessions and their turns that fail over to another upstream."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.utils import accept_key

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway, wait_until
from tests.helpers.turns import code, steer, steered
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Socket,
    Talk,
    Upstream,
    json_answer,
    silent,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import Client, client

pytestmark = [pytest.mark.promise_3, pytest.mark.promise_9]

PAID = 10_000
CANARY = "canary-of-the-upstream"
LIMITED, REJECTED = (429, "rate_limit_exceeded"), (401, "invalid_api_key")


@pytest.fixture
def two() -> Iterator[Upstream]:
    with Upstream() as upstream:
        upstream.talk = ws_like_openai
        yield upstream


@pytest.fixture
def one(upstream: Upstream) -> Upstream:
    return upstream


def members(*urls: str, **more: Any) -> list[dict[str, Any]]:
    """Return the tables of upstreams at these addresses, the first with the first priority."""
    names = ("one", "two", "three")
    key = "TEST_UPSTREAM_KEY"
    return [
        {"name": name, "base_url": url, "api_key_env": key, "priority": n, **more}
        for n, (name, url) in enumerate(zip(names, urls, strict=False))
    ]


def settings(*urls: str, failover: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    billing = {"default_credit_limit": "0"}
    tables = {"server": {}, "billing": billing, "upstreams": members(*urls, **more)}
    return {**tables, "failover": failover} if failover else tables


class PaidGateway:
    """A gateway with two upstreams, and an account that has paid PAID."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway.start()
        gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
        self.key = gateway.new_key()
        gateway.cli("payment", "add", "test", str(PAID))

    def turn(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of one turn in a session of its own."""
        with client(self.gateway, self.key) as ws:
            return events_of(ws, **fields)

    def row(self) -> dict[str, Any]:
        """Return the one row there is, after making sure that nothing is held or in flight, and
        that it is what the account has paid."""
        wait_until(lambda: self.gateway.metrics()["redbtc_in_flight"] == 0)
        row = self.gateway.row()
        left = PAID - float(row["cost"] or 0)
        account = self.gateway.api("GET", "/accounts/test")
        assert float(account["balance"]) == pytest.approx(left)
        return row

    def served_by(self, name: str) -> None:
        """Check that the one row is that of a turn which one member failed and `name` served."""
        row = self.row()
        assert (row["upstream"], row["outcome"], row["attempts"]) == (name, "completed", 2)
        assert (row["status"], row["upstream_status"], row["output_tokens"]) == (200, 200, 9)
        assert row["upstream_error_code"] is None


@pytest.fixture
def pair(make_gateway: MakeGateway, one: Upstream, two: Upstream) -> PaidGateway:
    return PaidGateway(make_gateway(settings(one.url, two.url)))


def events_of(ws: Client, **fields: Any) -> list[dict[str, Any]]:
    """Send a request; return the events up to its end."""
    ws.send(**fields)
    found = [ws.recv()]
    while found[-1]["type"] not in ("response.completed", "error"):
        found.append(ws.recv())
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


COMPLETED = ["created", "output_text.delta", "completed"]


def error(
    status: int | None, error_code: str | None, headers: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """Return an error event as upstreams send it."""
    found: dict[str, Any] = {"type": "error", **more}
    found["error"] = {"code": error_code, "type": error_code, "message": f"Bad key {CANARY}"}
    if status is not None:
        found["status"] = status
    if headers is not None:
        found["headers"] = headers
    return found


def shown(event: dict[str, Any]) -> dict[str, Any]:
    """Return an error event as the client is shown it: with the gateway's own text for a limit."""
    if event["status"] != 429:
        return event
    message = "The upstream has reached a rate limit. Please try again later."
    return {**event, "error": {**event["error"], "message": message}}


def failing(*events: dict[str, Any], close: bool = False) -> Talk:
    """Answer each request with these events, in its lane, and then close the connection if that is
    said."""

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            lane = {"stream_id": frame["stream_id"]} if "stream_id" in frame else {}
            await sock.send(*[{**event, **lane} for event in events])
            if close:
                await sock.close(1011, CANARY)

    return talk


def refusing(status: int, headers: dict[str, str] | None = None) -> Script:
    content = {"error": {"code": "some_code", "message": CANARY}}
    return json_answer(content, status, headers or {})


async def garbage(_: Received, reply: Reply) -> None:
    await reply.raw(b"220 this is no HTTP\r\n\r\n")
    reply.close()


async def closing_at_once(request: Received, reply: Reply) -> None:
    """Open a WebSocket and close it in the same packet."""
    accept = accept_key(request.header("sec-websocket-key") or "")
    head = "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    await reply.raw(head.encode() + b"\x88\x02\x03\xf5")
    await reply.wait(request.closed)


# Handshakes

REFUSALS: dict[str, Script] = {
    **{str(status): refusing(status) for status in (401, 403, 404, 426, 500, 503, 529)},
    "429": refusing(429, {"retry-after": "7"}),
    "302": refusing(302, {"location": "http://127.0.0.1:9/v1/responses"}),
    "garbage": garbage,
    "silent": silent,
    "closing at once": closing_at_once,
}


@pytest.mark.parametrize("how", [*REFUSALS, "refused", "black hole"])
def test_a_session_is_opened_at_the_next_member(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, how: str
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as hole:
        url = one.url
        if how in REFUSALS:
            one.talk, one.script = None, REFUSALS[how]
        elif how == "refused":
            url = "http://127.0.0.1:9/v1"
        else:
            url = f"http://127.0.0.1:{hole.getsockname()[1]}/v1"
        pair = PaidGateway(make_gateway(settings(url, two.url, connect_timeout_seconds=0.5)))
        assert kinds(pair.turn()) == COMPLETED
    row = pair.row()
    assert (row["upstream"], row["outcome"]) == ("two", "completed")
    assert CANARY not in pair.gateway.flushed_log()


@pytest.mark.parametrize(
    ("first", "second", "status", "error_code", "wait"),
    [
        ("429", "429", 429, "rate_limit_exceeded", "7"),
        ("401", "401", 502, "upstream_credentials_rejected", None),
        ("403", "403", 502, "upstream_credentials_rejected", None),
        ("404", "426", 426, "upgrade_required", None),
        ("503", "503", 502, "upstream_unreachable", None),
        ("garbage", "garbage", 502, "upstream_protocol_error", None),
        ("429", "401", 429, "rate_limit_exceeded", "7"),
        ("401", "503", 502, "upstream_unreachable", None),
        ("503", "401", 502, "upstream_unreachable", None),
    ],
)
def test_a_handshake_that_all_refuse(
    make_gateway: MakeGateway,
    one: Upstream,
    two: Upstream,
    first: str,
    second: str,
    status: int,
    error_code: str,
    wait: str | None,
) -> None:
    one.talk = two.talk = None
    one.script, two.script = REFUSALS[first], REFUSALS[second]
    gateway = make_gateway(settings(one.url, two.url)).start()
    with pytest.raises(InvalidStatus) as refused, client(gateway, gateway.new_key()):
        pass
    response = refused.value.response
    assert response.status_code == status
    body = bytes(response.body or b"")
    assert json.loads(body)["error"]["code"] == error_code
    assert CANARY.encode() not in body
    if wait:
        assert response.headers["retry-after"] == wait
    assert gateway.rows() == []
    assert CANARY not in gateway.flushed_log()


def test_of_two_limits_the_client_is_told_the_shorter_one(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    one.talk = two.talk = None
    one.script = refusing(429, {"retry-after": "7"})
    two.script = refusing(429, {"retry-after": "300"})
    gateway = make_gateway(settings(one.url, two.url)).start()
    with pytest.raises(InvalidStatus) as refused, client(gateway, gateway.new_key()):
        pass
    assert int(refused.value.response.headers["retry-after"]) <= 7


@pytest.mark.parametrize("header", ["session-id", "thread-id"])
def test_a_session_goes_where_its_name_says(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, header: str
) -> None:
    pair = PaidGateway(make_gateway(settings(one.url, two.url, priority=1)))
    gateway, key = pair.gateway, pair.key

    def homes() -> list[int]:
        found = []
        for number in range(12):
            before = len(one.sockets)
            with client(gateway, key, **{header: f"session {number}"}) as ws:
                assert kinds(events_of(ws)) == COMPLETED
            found.append(len(one.sockets) - before)
        return found

    first = homes()
    assert set(first) == {0, 1}
    gateway.restart()
    assert homes() == first


# Turns

FAILURES = {
    **{
        f"{status}": error(status, error_code)
        for status, error_code in (
            (429, "rate_limit_exceeded"),
            (429, "insufficient_quota"),
            (500, "server_error"),
            (502, None),
            (503, "server_is_overloaded"),
            (504, None),
            (529, "overloaded"),
            (401, "invalid_api_key"),
            (403, "country_not_supported"),
        )
    },
    "429, with headers": error(429, "rate_limit_exceeded", {"retry-after": "2"}),
    "503, with headers": error(503, None, {"x-request-id": "r"}),
    "429, odd headers": error(429, "rate_limit_exceeded", {"retry-after": "soon"}),
    **{
        error_code: error(None, error_code)
        for error_code in ("rate_limit_exceeded", "insufficient_quota", "server_error", "slow_down")
    },
    "only a code": {"type": "error", "code": "server_error", "message": CANARY},
    "only the code of a rejected key": error(None, "invalid_api_key"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_turn_is_sent_again_to_the_next_member(
    pair: PaidGateway, one: Upstream, two: Upstream, failure: str
) -> None:
    one.talk = failing(FAILURES[failure])
    events = pair.turn(input="Hällo\u2028", metadata={"a": "b"}, prompt_cache_key="k")
    assert kinds(events) == COMPLETED
    assert one.sockets[0].texts == two.sockets[0].texts
    assert len(one.sockets[0].texts) == 1
    pair.served_by("two")
    assert CANARY not in pair.gateway.flushed_log()


@pytest.mark.parametrize(
    "event",
    [
        error(400, "invalid_request_error"),
        error(400, "previous_response_not_found"),
        error(None, "invalid_prompt"),
        error(None, "previous_response_not_found"),
        error(404, "model_not_found"),
        error(409, "server_error"),
        error(422, "rate_limit_exceeded"),
    ],
    ids=lambda event: f"{event.get('status')} {event['error']['code']}",
)
def test_an_error_about_the_request_is_the_clients(
    pair: PaidGateway, one: Upstream, two: Upstream, event: dict[str, Any]
) -> None:
    one.talk = failing(event)
    assert pair.turn() == [event]
    row = pair.row()
    assert (row["upstream"], row["attempts"], row["outcome"]) == ("one", 1, "upstream_error")
    assert not two.sockets


def test_nothing_is_sent_again_after_an_event_of_the_response(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        created, *_ = ws_events(1, await sock.recv())
        await sock.send(created, error(*LIMITED))
        await sock.recv()

    one.talk = talk
    assert kinds(pair.turn()) == ["created", "error"]
    row = pair.row()
    assert (row["upstream"], row["attempts"], row["outcome"]) == ("one", 1, "upstream_error")
    assert not two.sockets


def test_nothing_is_sent_again_after_the_connection_was_lost(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.recv()
        sock.tear()

    one.talk = talk
    (event,) = pair.turn()
    assert code(event) == "upstream_unreachable"
    row = pair.row()
    assert (row["upstream"], row["attempts"], row["outcome"]) == ("one", 1, "upstream_failed")
    assert row["upstream_error_code"] == "reset"
    assert not two.sockets


def test_nothing_is_sent_again_after_a_timeout(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.recv()

    one.talk = talk
    pair = PaidGateway(make_gateway(settings(one.url, two.url, first_byte_timeout_seconds=0.6)))
    (event,) = pair.turn()
    assert code(event) == "upstream_timeout"
    row = pair.row()
    assert (row["upstream"], row["attempts"], row["outcome"]) == ("one", 1, "upstream_failed")
    assert row["upstream_error_code"] == "first_byte_timeout"
    assert not two.sockets


@pytest.mark.parametrize("store", [True, False])
def test_a_turn_stays_with_what_it_builds_on(
    pair: PaidGateway, one: Upstream, two: Upstream, store: bool
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv()))
        await failing(error(*LIMITED, {"retry-after": "1"}))(sock)

    one.talk = talk
    with client(pair.gateway, pair.key) as ws:
        assert kinds(events_of(ws, store=store)) == COMPLETED
        (event,) = events_of(ws, previous_response_id="resp_ws_1", store=store)
        assert code(event) == "rate_limit_exceeded"
        assert kinds(events_of(ws)) == COMPLETED, "the session goes on at the other one"
    assert [row["upstream"] for row in pair.gateway.rows()] == ["one", "one", "two"]
    assert [row["attempts"] for row in pair.gateway.rows()][:2] == [1, 1]


@pytest.mark.parametrize(
    ("failover", "asked"), [({"attempts": 1}, [1, 0, 0]), ({"attempts": 2}, [1, 1, 0])]
)
def test_there_are_not_more_attempts_than_the_settings_say(
    make_gateway: MakeGateway,
    one: Upstream,
    two: Upstream,
    failover: dict[str, int],
    asked: list[int],
) -> None:
    one.talk = two.talk = failing(error(500, "server_error"))
    with Upstream() as three:
        three.talk = ws_like_openai
        pair = PaidGateway(make_gateway(settings(one.url, two.url, three.url, failover=failover)))
        (event,) = pair.turn()
        assert (event["status"], code(event)) == (500, "server_error")
        assert [sum(len(s.frames) for s in up.sockets) for up in (one, two, three)] == asked
        assert pair.row()["attempts"] == sum(asked)


def test_no_member_is_tried_after_the_budget(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.recv()
        await asyncio.sleep(2)
        await sock.send(error(500, "server_error"))
        await sock.recv()

    one.talk = talk
    pair = PaidGateway(make_gateway(settings(one.url, two.url, failover={"budget_seconds": 1})))
    (event,) = pair.turn()
    assert code(event) == "server_error"
    assert pair.row()["attempts"] == 1
    assert not two.sockets


# What the client gets if all fail


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("number", [1, 2])
def test_a_rejected_key_is_not_the_clients_business(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, status: int, number: int
) -> None:
    one.talk = two.talk = failing(error(status, "invalid_api_key", {"x-secret": CANARY}))
    pair = PaidGateway(make_gateway(settings(*[one.url, two.url][:number])))
    with client(pair.gateway, pair.key) as ws:
        (event,) = events_of(ws, stream_id="a")
        assert (event["status"], code(event)) == (502, "upstream_credentials_rejected")
        assert event["stream_id"] == "a"
        assert CANARY not in json.dumps(event)
        row = pair.row()
        assert (row["status"], row["outcome"]) == (502, "upstream_error")
        assert (row["upstream_status"], row["upstream_error_code"]) == (status, "invalid_api_key")
        assert row["attempts"] == number
        (event,) = events_of(ws)  # the session goes on
        assert code(event) == "upstream_credentials_rejected"
    assert CANARY not in pair.gateway.flushed_log()
    assert CANARY not in json.dumps(pair.gateway.rows())


@pytest.mark.parametrize("after_error", [False, True])
def test_the_reason_of_the_upstreams_close_is_not_passed_on(
    pair: PaidGateway, one: Upstream, after_error: bool
) -> None:
    """It can quote the operator's key, as the text of an error can."""

    async def talk(sock: Socket) -> None:
        await sock.recv()
        if after_error:
            await sock.send(error(400, "invalid_request_error"))
        await sock.close(3000, f"Incorrect API key provided: {CANARY}")

    one.talk = talk
    headers = {"authorization": f"Bearer {pair.key}"}
    url = f"ws://127.0.0.1:{pair.gateway.port}/v1/responses"
    with connect(url, additional_headers=headers, proxy=None) as connection:
        Client(connection).send()
        with pytest.raises(ConnectionClosed) as closed:
            list(connection)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 3000
    assert CANARY not in closed.value.rcvd.reason


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (error(500, "server_error"), error(503, "slow_down"), "two"),
        (error(*LIMITED), error(503, "slow_down"), "two"),
        (error(503, "slow_down"), error(*REJECTED), "one"),
        (error(*LIMITED, {"retry-after": "3"}), error(*REJECTED), "one"),
        (error(*REJECTED), error(*LIMITED), "two"),
        (error(*LIMITED, {"retry-after": "3"}), error(*LIMITED, {"retry-after": "90"}), "one"),
        (error(*LIMITED, {"retry-after": "90"}), error(*LIMITED, {"retry-after": "3"}), "two"),
    ],
)
def test_the_client_gets_the_best_error_if_all_fail(
    pair: PaidGateway,
    one: Upstream,
    two: Upstream,
    first: dict[str, Any],
    second: dict[str, Any],
    name: str,
) -> None:
    one.talk, two.talk = failing(first), failing(second)
    best = first if name == "one" else second
    with client(pair.gateway, pair.key) as ws:
        assert events_of(ws, stream_id="a") == [{**shown(best), "stream_id": "a"}]
        row = pair.row()
        assert (row["upstream"], row["outcome"], row["attempts"]) == (name, "upstream_error", 2)
        assert (row["status"], row["upstream_status"]) == (best["status"], best["status"])
        assert row["upstream_error_code"] == best["error"]["code"]
        assert ws.ping()


@pytest.mark.parametrize("how", ["refused", "426", "401"])
def test_the_client_gets_the_first_error_if_the_next_member_cannot_be_reached(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, how: str
) -> None:
    url = "http://127.0.0.1:9/v1" if how == "refused" else two.url
    two.talk, two.script = None, refusing(int(how) if how != "refused" else 500)
    one.talk = failing(error(500, "server_error"))
    pair = PaidGateway(make_gateway(settings(one.url, url)))
    assert pair.turn() == [error(500, "server_error")]
    row = pair.row()
    assert (row["upstream"], row["outcome"], row["attempts"]) == ("one", "upstream_error", 2)
    assert (row["status"], row["upstream_status"]) == (500, 500)
    assert row["upstream_error_code"] == "server_error"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_single_upstream_answers_for_itself(
    make_gateway: MakeGateway, one: Upstream, status: int
) -> None:
    event = error(status, "some_code", {"retry-after": "1"})
    one.talk = failing(event)
    pair = PaidGateway(make_gateway(settings(one.url)))
    with client(pair.gateway, pair.key) as ws:
        assert events_of(ws) == [shown(event)]
        row = pair.row()
        assert (row["outcome"], row["status"], row["attempts"]) == ("upstream_error", status, 1)
        assert row["upstream_error_code"] == "some_code"
        assert events_of(ws) == [shown(event)]


# The first member's connection


def test_a_second_error_of_the_first_member_is_not_the_clients(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    """It says the same of one request twice, before and after the other member's answer."""
    over = threading.Event()

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        lane = {"stream_id": frame["stream_id"]} if "stream_id" in frame else {}
        failed = {**error(500, "server_error"), **lane}
        await sock.send(failed, failed)
        while not over.is_set():
            await asyncio.sleep(0.01)
        response = {"id": "resp_late", "status": "failed", "error": failed["error"]}
        await sock.send(failed, {"type": "response.failed", "response": response, **lane})
        await sock.send({"type": "error", "error": failed["error"]})  # without its lane
        await sock.recv()

    one.talk = talk
    for lane in ({}, {"stream_id": "a"}):
        over.clear()
        with client(pair.gateway, pair.key) as ws:
            assert kinds(events_of(ws, **lane)) == COMPLETED
            over.set()
            with pytest.raises(TimeoutError):
                ws.recv(0.5)
    rows = pair.gateway.rows()
    assert [(row["upstream"], row["outcome"]) for row in rows] == [("two", "completed")] * 2


@pytest.mark.parametrize("size", [1, 3_000_000])
@pytest.mark.parametrize("lane", ["", "a"])
def test_a_session_survives_that_the_first_member_closes(
    pair: PaidGateway, one: Upstream, two: Upstream, size: int, lane: str
) -> None:
    """It closes right after its error, in the same packet, or while the request is still sent."""

    def served_by_two() -> int:
        return sum(len(each.frames) for each in two.sockets)

    async def talk(sock: Socket) -> None:
        before = served_by_two()
        frame = await sock.recv() if size == 1 else {}
        if size > 1:
            await sock.begin()
        failed = error(503, "slow_down") | ({"stream_id": lane} if lane else {})
        text = json.dumps(failed).encode()
        assert len(text) < 1 << 16
        head = b"\x81\x7e" + len(text).to_bytes(2, "big")
        sock._writer.write(head + text + b"\x88\x02\x03\xf3")
        await sock._writer.drain()
        assert frame or size > 1
        # Closing TCP while bytes are unread resets it, and the error can be lost with that.
        async with asyncio.timeout(PATIENCE_SECONDS):
            while served_by_two() == before:
                await asyncio.sleep(0.002)

    one.talk = talk
    with client(pair.gateway, pair.key) as ws:
        for _ in range(2):
            fields = {"stream_id": lane} if lane else {}
            assert kinds(events_of(ws, metadata={"long": "x" * size}, **fields)) == COMPLETED
        assert ws.ping()
    wait_until(lambda: pair.gateway.metrics()["redbtc_in_flight"] == 0)
    rows = pair.gateway.rows()
    assert [(row["upstream"], row["outcome"]) for row in rows] == [("two", "completed")] * 2


def test_a_session_survives_that_the_first_member_closes_during_the_failover(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    two.handshake_seconds = 1
    one.talk = failing(error(503, "slow_down"), close=True)
    with client(pair.gateway, pair.key) as ws:
        assert kinds(events_of(ws)) == COMPLETED
        assert ws.ping()
    pair.served_by("two")


def test_a_session_survives_that_the_first_member_closes_after_the_failover(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    answered = threading.Event()

    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.send(error(503, "slow_down"))
        while not answered.is_set():
            await asyncio.sleep(0.01)
        await sock.close(1011)

    one.talk = talk
    with client(pair.gateway, pair.key) as ws:
        assert kinds(events_of(ws)) == COMPLETED
        answered.set()
        wait_until(lambda: one.sockets[0].received.closed.is_set())
        assert ws.ping()
        assert kinds(events_of(ws)) == COMPLETED
    wait_until(lambda: not two.connections)


def test_a_connection_that_ends_before_anything_is_sent_costs_nothing(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    """The request is sent over a connection to the next member."""
    one.talk, one.script = None, closing_at_once
    assert kinds(pair.turn()) == COMPLETED
    row = pair.row()
    assert (row["upstream"], row["outcome"], row["attempts"]) == ("two", "completed", 2)


# Lanes


def test_one_lane_fails_over_and_the_other_one_stays(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    release = threading.Event()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        frame = await sock.recv()
        await sock.send({**error(500, "server_error"), "stream_id": frame["stream_id"]})
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send({**delta, "delta": "late"}, completed)
        await sock.recv()

    one.talk = talk
    with client(pair.gateway, pair.key) as ws:
        ws.send(stream_id="a")
        ws.until("response.output_text.delta")
        events = events_of(ws, stream_id="b")
        assert kinds(events) == COMPLETED
        assert {event["stream_id"] for event in events} == {"b"}
        release.set()
        rest = [ws.recv(), ws.recv()]
        assert kinds(rest) == COMPLETED[1:]
        assert {event["stream_id"] for event in rest} == {"a"}
    rows = pair.gateway.rows()
    found = [(row["upstream"], row["outcome"], row["attempts"]) for row in rows]
    assert found == [("one", "completed", 1), ("two", "completed", 2)]


def test_many_lanes_fail_over_at_once(pair: PaidGateway, one: Upstream, two: Upstream) -> None:
    one.talk = failing(error(500, "server_error"))
    two.handshake_seconds = 0.3
    lanes = [f"{number}" for number in range(8)]
    with client(pair.gateway, pair.key) as ws:
        for lane in lanes:
            ws.send(stream_id=lane, max_output_tokens=16)
        ended: dict[str, str] = {}
        while len(ended) < len(lanes):
            event = ws.until("response.completed", "error")
            ended[event["stream_id"]] = event["type"]
    assert set(ended.values()) == {"response.completed"}
    assert len(two.sockets) == 1, "they share the new connection"
    rows = pair.gateway.rows()
    assert {(row["upstream"], row["outcome"]) for row in rows} == {("two", "completed")}
    assert len(rows) == len(lanes)


def test_a_turn_that_has_failed_over_can_be_steered(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        await sock.recv()
        await sock.send(steered(1), *ws_events(2, {"model": "gpt-up"}))
        await sock.recv()

    one.talk, two.talk = failing(error(500, "server_error")), talk
    with client(pair.gateway, pair.key) as ws:
        ws.send(max_output_tokens=100)
        ws.until("response.output_text.delta")
        ws.raw(steer(1))
        ws.completed()
    rows = pair.gateway.rows()
    found = [(row["upstream"], row["outcome"], row["response_id"]) for row in rows]
    assert found == [("two", "completed", "resp_ws_1"), ("two", "completed", "resp_ws_2")]


def test_a_response_that_is_lost_after_a_failover_is_no_error_of_the_first_member(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:2])
        sock.tear()

    one.talk, two.talk = failing(error(*LIMITED)), talk
    with client(pair.gateway, pair.key) as ws:
        events = events_of(ws, max_output_tokens=100)
    assert kinds(events) == ["created", "output_text.delta", "error"]
    row = pair.row()
    assert (row["upstream"], row["outcome"], row["status"]) == ("two", "upstream_failed", None)
    assert (row["upstream_error_code"], row["usage_source"]) == ("reset", "estimated")


def test_a_client_that_leaves_during_a_failover_leaves_nothing(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    two.handshake_seconds = 1
    one.talk = failing(error(500, "server_error"))
    with client(pair.gateway, pair.key) as ws:
        ws.send()
        wait_until(lambda: two.requests)
        ws.tear()
    wait_until(lambda: pair.gateway.metrics()["redbtc_in_flight"] == 0)
    wait_until(lambda: not one.connections and not two.connections)
    assert [sock.frames for sock in two.sockets] in ([], [[]])
    assert pair.gateway.rows() == []
    assert float(pair.gateway.api("GET", "/accounts/test")["balance"]) == PAID


# Places and health


def held(release: threading.Event) -> Talk:
    """Return a talk whose first response begins at once and ends after `release`."""

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created)
        while not release.is_set():
            await asyncio.sleep(0.01)
        await sock.send(delta, completed)
        await ws_like_openai(sock)

    return talk


def test_a_full_member_is_passed_over(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    release = threading.Event()

    one.talk = held(release)
    pair = PaidGateway(make_gateway(settings(one.url, two.url, max_concurrency=1)))
    with client(pair.gateway, pair.key) as ws:
        ws.send(stream_id="a")
        ws.until("response.created")
        assert kinds(events_of(ws, stream_id="b")) == COMPLETED
        release.set()
        ws.completed()
        assert kinds(events_of(ws, stream_id="b")) == COMPLETED
    assert [row["upstream"] for row in pair.gateway.rows()] == ["one", "two", "one"]
    assert [row["attempts"] for row in pair.gateway.rows()] == [1, 1, 1]


@pytest.mark.parametrize("queue_seconds", [60, 0])
def test_a_turn_waits_for_a_place_at_the_member_that_is_left(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, queue_seconds: int
) -> None:
    release = threading.Event()

    one.talk, two.talk = failing(error(500, "server_error")), held(release)
    tables = settings(one.url, two.url, max_concurrency=1)
    pair = PaidGateway(make_gateway({**tables, "limits": {"queue_seconds": queue_seconds}}))
    with client(pair.gateway, pair.key) as first, client(pair.gateway, pair.key) as second:
        first.send(max_output_tokens=16)
        first.until("response.created")
        second.send(max_output_tokens=16)
        wait_until(lambda: len(one.sockets) > 1 and len(one.sockets[1].frames) == 1)
        if queue_seconds:
            wait_until(lambda: len(two.sockets) > 1 or pair.gateway.metrics()["redbtc_in_flight"])
        else:
            assert second.recv()["status"] == 500
        release.set()
        first.completed()
        if queue_seconds:
            second.completed()
    attempts = [(row["upstream"], row["attempts"]) for row in pair.gateway.rows()]
    assert attempts == [("two", 2), ("two", 2) if queue_seconds else ("one", 1)]


def upstream_states(gateway: Gateway) -> list[tuple[str, str]]:
    changes = gateway.api("GET", "/upstreams/changes")["changes"]
    return [(change["upstream"], change["state"]) for change in changes]


@pytest.mark.parametrize("how", ["error", "lost", "timeout", "torn"])
def test_failures_of_turns_take_a_member_out(
    make_gateway: MakeGateway, one: Upstream, two: Upstream, how: str
) -> None:
    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        if how == "error":
            await sock.send(error(500, "server_error"))
        elif how == "torn":
            await sock.send(events[0])
        if how in ("lost", "torn"):
            sock.tear()
        await sock.recv()

    one.talk = talk
    pair = PaidGateway(make_gateway(settings(one.url, two.url, first_byte_timeout_seconds=0.5)))
    for _ in range(5):
        pair.turn(max_output_tokens=16)
    assert upstream_states(pair.gateway) == [("one", "out")]
    asked = len(one.sockets)
    assert kinds(pair.turn()) == COMPLETED
    assert len(one.sockets) == asked


def test_a_client_that_leaves_is_not_its_members_failure(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(ws_events(1, await sock.recv())[0])
        await sock.recv()

    pair.gateway.configure(
        settings(one.url, two.url) | {"metering": {"on_disconnect": "cancel"}},
    )
    pair.gateway.restart()
    one.talk = talk
    for number in range(6):
        with client(pair.gateway, pair.key) as ws:
            ws.send(max_output_tokens=16)
            ws.until("response.created")
            ws.tear()
        pair.gateway.wait_for_rows(number + 1)
        wait_until(lambda: pair.gateway.metrics()["redbtc_in_flight"] == 0)
    assert upstream_states(pair.gateway) == []


@pytest.mark.parametrize("events", ["an answer", "only its end", "an error about the request"])
def test_an_answer_ends_a_row_of_failures(
    pair: PaidGateway, one: Upstream, two: Upstream, events: str
) -> None:
    """Four failures, an answer, and four failures again are no five in a row."""
    asked = 0

    async def talk(sock: Socket) -> None:
        nonlocal asked
        while True:
            frame = await sock.recv()
            asked += 1
            if asked != 5:
                await sock.send(error(500, "server_error"))
            elif events == "an error about the request":
                await sock.send(error(400, "invalid_prompt"))
            else:
                await sock.send(*ws_events(100, frame)[2 if events == "only its end" else 0 :])

    one.talk = talk
    with client(pair.gateway, pair.key) as ws:
        for _ in range(9):
            events_of(ws, max_output_tokens=16)
    assert asked == 9
    assert upstream_states(pair.gateway) == []


@pytest.mark.parametrize("kind", ["response.failed", "error", "error with a status"])
def test_responses_that_fail_take_a_member_out(
    pair: PaidGateway, one: Upstream, two: Upstream, kind: str
) -> None:
    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        end = error(500 if kind == "error with a status" else None, "server_error")
        if kind == "response.failed":
            response = {**events[-1]["response"], "status": "failed", "error": end["error"]}
            end = {"type": kind, "response": response}
        await sock.send(events[0], end)
        await sock.recv()

    one.talk = talk
    for number in range(5):
        assert upstream_states(pair.gateway) == [], number
        with client(pair.gateway, pair.key) as ws:
            ws.send(max_output_tokens=16)
            ws.until(kind.partition(" ")[0])
        pair.gateway.wait_for_rows(number + 1)
        wait_until(lambda: pair.gateway.metrics()["redbtc_in_flight"] == 0)
    assert upstream_states(pair.gateway) == [("one", "out")]


def test_a_limit_rests_the_member(pair: PaidGateway, one: Upstream, two: Upstream) -> None:
    one.talk = failing(error(*LIMITED, {"retry-after": "300"}))
    with client(pair.gateway, pair.key) as ws:
        for _ in range(3):
            assert kinds(events_of(ws, max_output_tokens=16)) == COMPLETED
    assert len(one.sockets[0].frames) == 1
    assert upstream_states(pair.gateway) == [("one", "resting")]


def test_a_request_that_is_too_large_rests_nobody(
    pair: PaidGateway, one: Upstream, two: Upstream
) -> None:
    event = error(*LIMITED)
    event["error"]["message"] = "Request too large for gpt-up in organization org-x"
    one.talk = failing(event)
    with client(pair.gateway, pair.key) as ws:
        for _ in range(3):
            assert kinds(events_of(ws, max_output_tokens=16)) == COMPLETED
    assert len(one.sockets[0].frames) == 3
    assert upstream_states(pair.gateway) == []


def test_a_session_without_a_name_stays_with_one_organization(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    """It has connections to both members, and replays what one of them has encrypted."""
    limited = threading.Event()

    def sealing(name: str) -> Talk:
        async def talk(sock: Socket) -> None:
            while True:
                frame = await sock.recv()
                if name in frame.get("metadata", {}).get("fail", ""):
                    await sock.send(error(*LIMITED, {"retry-after-ms": "1"}))
                    limited.set()
                    continue
                content = {"id": "rs_1", "type": "reasoning", "encrypted_content": name}
                await sock.send(*ws_events(len(sock.frames), frame, output=[content]))

        return talk

    one.talk, two.talk = sealing("one"), sealing("two")
    pair = PaidGateway(make_gateway(settings(one.url, two.url, priority=1)))
    for _ in range(4):
        with client(pair.gateway, pair.key) as ws:
            home = events_of(ws, max_output_tokens=16)[-1]["response"]["output"]
            # The member that it began with fails it once.
            fail = home[0]["encrypted_content"]
            moved = events_of(ws, metadata={"fail": fail}, max_output_tokens=16)[-1]
            items = moved["response"]["output"]
            assert items[0]["encrypted_content"] != fail
            for _ in range(8):
                done = events_of(ws, input=items, max_output_tokens=16)[-1]
                assert done["response"]["output"] == items


@pytest.mark.parametrize("organization", ["", "ours"])
def test_an_organization_that_cannot_read_a_request_does_not_answer_it(
    pair: PaidGateway, one: Upstream, two: Upstream, organization: str
) -> None:
    """The client gets the limit that the first one has reached, and can go on there later."""
    sealed = {"id": "rs_1", "type": "reasoning", "encrypted_content": "x", "summary": []}
    limit = error(*LIMITED, {"retry-after-ms": "1"})

    async def talk(sock: Socket) -> None:
        await sock.send(limit if await sock.recv() else {})
        await ws_like_openai(sock)

    one.talk, two.talk = talk, failing(error(400, "invalid_encrypted_content"))
    pair.gateway.configure(settings(one.url, two.url, organization=organization))
    pair.gateway.restart()
    with client(pair.gateway, pair.key) as ws:
        (event,) = events_of(ws, input=[sealed])
        if organization:  # the second one should have been able to read it
            assert code(event) == "invalid_encrypted_content"
            assert pair.row()["upstream"] == "two"
            return
        assert event == shown(limit)
        row = pair.row()
        assert (row["upstream"], row["attempts"], row["upstream_status"]) == ("one", 2, 429)
        assert kinds(events_of(ws, input=[sealed])) == COMPLETED
        assert [row["upstream"] for row in pair.gateway.rows()] == ["one", "one"]


def test_turns_that_fail_over_leave_nothing(
    make_gateway: MakeGateway, one: Upstream, two: Upstream
) -> None:
    """500 turns in sessions of as many lanes as each member has places."""
    one.talk = failing(error(*LIMITED, {"retry-after-ms": "1"}))
    pair = PaidGateway(make_gateway(settings(one.url, two.url, max_concurrency=4)))
    gateway = pair.gateway

    def serve(turns: int) -> None:
        with client(gateway, pair.key) as ws:
            for number in range(turns):
                ws.send(stream_id=f"{number % 4}", max_output_tokens=16)
            for _ in range(turns):
                ws.completed()

    def settled() -> bool:
        return not (one.connections or two.connections or gateway.metrics()["redbtc_in_flight"])

    serve(20)
    wait_until(settled)
    files, before = gateway.open_files(), gateway.rss()
    for _ in range(20):
        serve(25)
    wait_until(settled)
    wait_until(lambda: gateway.open_files() <= files)
    assert gateway.rss() - before < 20 << 20
    rows = gateway.rows(limit=1000)
    assert len(rows) == 520
    assert {(row["upstream"], row["outcome"]) for row in rows} == {("two", "completed")}
    cost = sum(float(row["cost"]) for row in rows)
    assert float(gateway.api("GET", "/accounts/test")["balance"]) == pytest.approx(PAID - cost)
