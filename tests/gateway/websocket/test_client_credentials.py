"""Sessions of clients with credentials of their own: each connection to an upstream is made with
the session's credential, or with the operator's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import httpx2
import pytest
from websockets.exceptions import InvalidStatus

from tests.helpers.credentials import (
    API_KEY,
    WORKSPACE,
    login,
    reload,
    settings_of,
    table,
    with_key,
)
from tests.helpers.gateway import UPSTREAM_KEY, USUAL, Gateway, MakeGateway
from tests.helpers.turns import code, steer, steered
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Talk,
    Upstream,
    json_answer,
    ws_events,
)
from tests.helpers.websocket_client import client

pytestmark = pytest.mark.promise_7

OTHER = "Bearer sk-somebody-else"
REJECTED = {"message": "Bad: sk-own-canary", "type": "x", "code": "sk-own-canary", "param": None}


def numbered(first: int) -> Talk:
    """Answer each response.create of all connections with a response of the next number."""
    numbers = itertools.count(first)

    async def talk(sock: Socket) -> None:
        while True:
            await sock.send(*ws_events(next(numbers), await sock.recv()))

    return talk


@pytest.fixture
def own() -> Iterator[Upstream]:
    """The upstream to which clients send credentials of their own."""
    with Upstream() as running:
        running.talk = numbered(500)
        yield running


@pytest.fixture
def gateway(make_gateway: MakeGateway, upstream: Upstream, own: Upstream) -> Gateway:
    upstream.talk = numbered(1)
    return make_gateway(
        settings_of(
            table(upstream, "operators", models=["gpt-*"]),
            table(own, "clients", models=["own-1"], credentials="client"),
        )
    ).start()


def sent_to(upstream: Upstream, name: str = "authorization") -> list[str | None]:
    return [request.header(name) for request in upstream.requests]


@pytest.mark.front_door
def test_a_session_has_connections_of_both_kinds(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    headers = with_key(key, **login("user-1"))
    with client(gateway, "", **headers) as ws:
        ws.send(model="own-1")
        mine = ws.completed()["id"]
        ws.send(model="gpt-up")
        operators = ws.completed()["id"]
        for model, before in (("own-1", mine), ("gpt-up", operators)):
            ws.send(model=model, previous_response_id=before)
            assert ws.completed()
        items = [{"type": "item_reference", "id": each} for each in (mine, operators)]
        ws.send(model="own-1", input=items)
        assert code(ws.until("error")) == "invalid_request"
    assert sent_to(own) == [headers["authorization"]]
    assert sent_to(own, "chatgpt-account-id") == [WORKSPACE]
    assert sent_to(upstream) == [f"Bearer {UPSTREAM_KEY}"]
    assert sent_to(upstream, "chatgpt-account-id") == [None]
    assert sent_to(own, "x-gateway-key") == sent_to(upstream, "x-gateway-key") == [None]
    rows = gateway.rows()
    assert sorted((row["upstream"], row["credentials"]) for row in rows) == [
        *[("clients", "client")] * 2,
        *[("operators", "operator")] * 2,
    ]


def test_connections_are_not_shared_between_sessions(
    gateway: Gateway, own: Upstream, key: str
) -> None:
    with (
        client(gateway, "", **with_key(key)) as one,
        client(gateway, "", **with_key(key, OTHER)) as two,
    ):
        for ws in (one, two, one, two):
            ws.send(model="own-1")
            ws.completed()
    assert sorted(sent_to(own), key=str) == [API_KEY, OTHER]
    assert [len(sock.frames) for sock in own.sockets] == [2, 2]


def test_another_credentials_response_is_not_found(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    with client(gateway, "", **with_key(key)) as ws:
        ws.send(model="own-1")
        made = ws.completed()
    name, item = made["id"], made["output"][0]["id"]
    for headers in (with_key(key, OTHER), with_key(key, None), with_key(gateway.new_key("b"))):
        with client(gateway, "", **headers) as ws:
            for model in ("own-1", "gpt-up"):
                ws.send(model=model, previous_response_id=name)
                assert code(ws.until("error")) == "response_not_found"
                ws.send(model=model, input=[{"type": "item_reference", "id": item}])
                assert code(ws.until("error")) == "invalid_request"
            ws.raw(json.dumps({"type": "response.steer", "previous_response_id": name}))
            assert code(ws.until("error")) in ("response_not_found", "invalid_request")
    assert sum(len(sock.frames) for sock in own.sockets) == 1
    assert not any(sock.frames for sock in upstream.sockets)
    with httpx2.Client(base_url=gateway.base_url, headers=with_key(key), **USUAL) as http:
        own.script = json_answer({"id": name, "object": "response", "status": "completed"})
        assert http.get(f"/responses/{name}").json()["id"] == name


def test_without_a_credential_a_session_sees_the_operators_upstreams(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    with client(gateway, key) as ws:
        ws.send(model="own-1")
        event = ws.until("error")
        assert code(event) == "model_not_found"
        assert "X-Gateway-Key" in event["error"]["message"]
        ws.send(model="gpt-up")
        assert ws.completed()
    assert not own.requests


def test_a_session_is_offered_where_its_upstreams_speak_websocket(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """Codex CLI goes on with POST after a 426."""
    gateway = make_gateway(
        settings_of(
            table(upstream, "operators", models=["gpt-*"]),
            table(own, "clients", credentials="client", websocket=False),
        )
    ).start()
    key = gateway.new_key()
    with client(gateway, key) as ws:
        ws.send(model="gpt-up")
        assert ws.completed()
    with pytest.raises(InvalidStatus) as refused, client(gateway, "", **with_key(key)):
        pass
    assert refused.value.response.status_code == 426
    assert len(upstream.requests) == 1
    assert not own.requests


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_rejected_handshake_passes_to_its_client(
    make_gateway: MakeGateway, own: Upstream, status: int
) -> None:
    async def reject(request: Received, reply: Reply) -> None:
        headers = {"x-codex-primary-used-percent": "100", "retry-after": "7", "set-cookie": "a=b"}
        await json_answer({"error": REJECTED}, status, headers)(request, reply)

    with Upstream() as second:
        second.talk = numbered(600)
        own.script, own.talk = reject, None
        gateway = make_gateway(
            settings_of(
                table(own, "clients", credentials="client"),
                table(second, "clients2", credentials="client", priority=2),
            )
        ).start()
        key = gateway.new_key()
        for _ in range(7):
            with pytest.raises(InvalidStatus) as refused, client(gateway, "", **with_key(key)):
                pass
            answer = refused.value.response
            assert (answer.status_code, json.loads(answer.body or b"")) == (
                status,
                {"error": REJECTED},
            )
            assert answer.headers["x-codex-primary-used-percent"] == "100"
            assert answer.headers["retry-after"] == "7"
            assert "set-cookie" not in answer.headers
        assert not second.requests
        states = [each["state"] for each in gateway.cli("upstream", "list")["upstreams"]]
        assert states == ["up", "up"]
        assert "sk-own-canary" not in gateway.flushed_log()


@pytest.mark.parametrize("status", [401, 429])
def test_an_error_event_about_the_credential_passes(
    make_gateway: MakeGateway, own: Upstream, status: int
) -> None:
    said = {"type": "error", "status": status, "error": REJECTED, "headers": {"retry-after": "9"}}

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            bad = sock.received.header("authorization") == OTHER
            await sock.send(*([said] if bad else ws_events(len(sock.frames), frame)))

    with Upstream() as second:
        second.talk = numbered(600)
        own.talk = talk
        gateway = make_gateway(
            settings_of(
                table(own, "clients", credentials="client"),
                table(second, "clients2", credentials="client", priority=2),
            )
        ).start()
        key = gateway.new_key()
        with client(gateway, "", **with_key(key, OTHER)) as ws:
            for _ in range(7):
                ws.send()
                assert ws.recv() == said
        with client(gateway, "", **with_key(key)) as ws:
            ws.send()
            assert ws.completed()
        assert not second.requests
        rows = [row for row in gateway.rows() if row["status"] == status]
        assert [row["outcome"] for row in rows] == ["upstream_error"] * 7
        if status == 401:
            assert {row["upstream_error_code"] for row in rows} == {"401"}


def test_a_turn_fails_over_among_upstreams_of_one_kind(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    broken = {"type": "error", "status": 503, "error": {**REJECTED, "code": "server_error"}}

    async def fail(sock: Socket) -> None:
        while True:
            await sock.recv()
            await sock.send(broken)

    with Upstream() as second:
        second.talk = numbered(600)
        own.talk = fail
        gateway = make_gateway(
            settings_of(
                table(own, "clients", credentials="client"),
                table(second, "clients2", credentials="client", priority=2),
                table(upstream, "operators", priority=3),
            )
        ).start()
        with client(gateway, "", **with_key(gateway.new_key())) as ws:
            ws.send()
            assert ws.completed()["id"] == "resp_ws_600"
            second.talk = fail
        with client(gateway, "", **with_key(gateway.new_key())) as ws:
            ws.send()
            assert ws.recv() == broken
        assert set(sent_to(second)) == {API_KEY}
        assert not upstream.requests


def test_a_connection_that_is_refused_in_a_session_is_an_error_event(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """The session is connected to one upstream of its client's; a turn needs another one."""

    async def reject(request: Received, reply: Reply) -> None:
        await json_answer({"error": REJECTED}, 401)(request, reply)

    with Upstream() as second:
        second.script = reject
        gateway = make_gateway(
            settings_of(
                table(own, "clients", models=["own-1"], credentials="client"),
                table(second, "clients2", models=["own-2"], credentials="client", priority=2),
            )
        ).start()
        with client(gateway, "", **with_key(gateway.new_key())) as ws:
            ws.send(model="own-1")
            assert ws.completed()
            ws.send(model="own-2")
            event = ws.until("error")
            assert event["status"] == 401
            assert {**event["error"], "headers": None} == {**REJECTED, "headers": None}
            ws.send(model="own-1")
            assert ws.completed()
    assert sorted(row["outcome"] for row in gateway.rows()) == [
        "completed",
        "completed",
        "upstream_error",
    ]


def test_a_response_that_follows_by_itself_is_the_clients(
    make_gateway: MakeGateway, own: Upstream
) -> None:
    """Its row says so, and costs what its upstream costs."""

    async def talk(sock: Socket) -> None:
        frame = await sock.recv()
        first, delta, _ = ws_events(1, frame)
        await sock.send(first, delta)
        await sock.recv()
        await sock.send(steered(1), *ws_events(2, frame))
        await sock.send(*ws_events(3, frame))  # nobody has asked for this one
        await sock.recv()

    own.talk = talk
    gateway = make_gateway(
        settings_of(table(own, "clients", credentials="client", billing="free"))
    ).start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    with client(gateway, "", **with_key(key)) as ws:
        ws.send()
        ws.until("response.created")
        ws.raw(steer(1))
        for number in (2, 3):
            while ws.completed()["id"] != f"resp_ws_{number}":
                pass
    gateway.wait_for_rows(3)
    rows = gateway.rows()
    assert {row["credentials"] for row in rows} == {"client"}
    assert {float(row["cost"]) for row in rows} == {0}
    with httpx2.Client(base_url=gateway.base_url, headers=with_key(key, OTHER), **USUAL) as http:
        for number in (1, 2, 3):
            assert http.get(f"/responses/resp_ws_{number}").status_code == 404
    with httpx2.Client(base_url=gateway.base_url, headers=with_key(key), **USUAL) as http:
        own.script = json_answer({"id": "resp_ws_3", "object": "response", "status": "completed"})
        assert http.get("/responses/resp_ws_3").status_code == 200


def test_a_background_response_is_refused(gateway: Gateway, own: Upstream, key: str) -> None:
    with client(gateway, "", **with_key(key)) as ws:
        ws.send(model="own-1", background=True)
        assert code(ws.until("error")) == "invalid_request"
    assert not any(sock.frames for sock in own.sockets)


def test_a_reload_while_a_session_is_open(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """Whose credential an upstream gets changes with the next request, over a new connection; what
    the key's header is, stays as it was for the session."""

    clients = table(own, "clients", credentials="client")
    gateway = make_gateway(settings_of(clients)).start()
    key = gateway.new_key()
    with client(gateway, "", **with_key(key)) as ws:
        ws.send()
        name = ws.completed()["id"]
        reload(gateway, settings_of(table(own, "clients")))
        ws.send()
        operators = ws.completed()["id"]
        ws.send(previous_response_id=name)
        assert code(ws.until("error")) == "no_upstream"
        reload(gateway, settings_of(clients, server={"key_headers": ["x-other"]}))
        ws.send(previous_response_id=operators)
        assert code(ws.until("error")) == "no_upstream"
        ws.send(previous_response_id=name)
        assert ws.completed()
        assert sent_to(own) == [API_KEY, f"Bearer {UPSTREAM_KEY}", API_KEY]
    with pytest.raises(InvalidStatus) as refused, client(gateway, "", **with_key(key)):
        pass
    assert refused.value.response.status_code == 401
