"""What events and handshakes of an upstream's WebSocket say of the operator's key and organization
reaches no client; everything else passes unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from redbtc.meter.operator_errors import LIMIT_TEXT, QUOTA_TEXT, REJECTED_TEXT
from tests.helpers.gateway import Gateway
from tests.helpers.upstream import Socket, Upstream, json_answer, response_object, ws_events
from tests.helpers.websocket_client import client

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_7]

SECRETS = "organization org-AbC123 of project proj_xyz, key sk-proj-*****6789"
TEXT = f"Rate limit reached in {SECRETS}. Please try again in 1.5s. Visit https://platform."
WAITING = f"{LIMIT_TEXT} Please try again in 1.5s."


def error(status: int | None, code: str, **more: Any) -> dict[str, Any]:
    named = {} if status is None else {"status": status}
    problem = {"type": code, "code": code, "message": TEXT, "param": None}
    return {"type": "error", **named, "error": problem, "sequence_number": 3, **more}


def names_nothing(shown: object) -> bool:
    return not any(each in str(shown) for each in ("AbC123", "xyz", "6789", "https://"))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("event", "message"),
    [
        (error(429, "rate_limit_exceeded"), WAITING),
        (error(429, "own_code"), WAITING),
        (error(None, "rate_limit_exceeded"), WAITING),
        (error(429, "insufficient_quota"), QUOTA_TEXT),
        (error(401, "invalid_api_key"), REJECTED_TEXT),
        (error(403, "permission_error"), REJECTED_TEXT),
        (error(None, "invalid_api_key"), REJECTED_TEXT),
    ],
)
def test_an_error_event(
    gateway: Gateway, upstream: Upstream, key: str, event: dict[str, Any], message: str, begun: bool
) -> None:
    """Before a response has begun, a rejected key is a 502 of the gateway's."""
    headers = {"retry-after": "2", "openai-organization": "org-AbC123"}

    async def talk(sock: Socket) -> None:
        created = ws_events(1, await sock.recv())[0]
        await sock.send(*([created] if begun else []), {**event, "headers": headers})
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        shown = ws.until("error")
    assert names_nothing(shown)
    if message == REJECTED_TEXT and not begun:
        assert (shown["status"], shown["error"]["code"]) == (502, "upstream_credentials_rejected")
    else:
        problem = {**event["error"], "message": message}
        assert shown == {**event, "error": problem, "headers": {"retry-after": "2"}}
    assert gateway.row()["upstream_error_code"] == event["error"]["code"]
    assert names_nothing(gateway.flushed_log())


@pytest.mark.parametrize("size", [0, 100_000])
@pytest.mark.parametrize("code", ["rate_limit_exceeded", "server_error"])
def test_a_failed_response(
    gateway: Gateway, upstream: Upstream, key: str, code: str, size: int
) -> None:
    problem = {"code": code, "message": TEXT}
    response = response_object(
        status="failed", error=problem, id="resp_ws_1", instructions="x" * size
    )
    failed = {"type": "response.failed", "response": response, "sequence_number": 5}
    sent: list[str] = []

    async def talk(sock: Socket) -> None:
        sent.append(json.dumps(failed))
        await sock.send(*ws_events(1, await sock.recv())[:1], sent[0].encode())
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        assert ws.recv()["type"] == "response.created"
        shown = ws.recv_text()
    if code == "server_error":
        assert shown == sent[0]
    else:
        own = json.dumps({"code": code, "message": WAITING}, separators=(",", ":"))
        assert shown == sent[0].replace(json.dumps(problem), own)
        assert names_nothing(shown)
    assert gateway.row()["upstream_error_code"] == code


def test_an_error_of_no_request(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        await sock.send(*events, error(429, "rate_limit_exceeded"), error(400, "other"))
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        ws.until("response.completed")
        assert ws.recv()["error"]["message"] == WAITING
        assert ws.recv() == error(400, "other")


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_other_statuses_pass_unchanged(
    gateway: Gateway, upstream: Upstream, key: str, status: int
) -> None:
    event = error(status, "rate_limit_exceeded", headers={"x-a": "org-AbC123"})

    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.send(event)
        await sock.recv()

    upstream.talk = talk
    with client(gateway, key) as ws:
        ws.send()
        assert ws.recv() == event


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_handshake(gateway: Gateway, upstream: Upstream, key: str, status: int) -> None:
    problem = {"error": {"code": "some_code", "type": "x", "message": TEXT}}
    upstream.talk = None
    upstream.script = json_answer(problem, status, {"openai-organization": "org-AbC123"})
    with pytest.raises(InvalidStatus) as refused, client(gateway, key):
        pass
    response = refused.value.response
    assert response.status_code == (429 if status == 429 else 502)
    assert names_nothing([response.body, response.headers, gateway.flushed_log()])
