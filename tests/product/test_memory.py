"""A request for which there is no memory left is refused with 503; the process goes on, and nothing
of the request stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.turns import steer, steering
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    images_json,
    json_answer,
    response_object,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import client as websocket

pytestmark = pytest.mark.promise_9

# While the file "fails" names a function, that function raises MemoryError.
PRELUDE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from redbtc.server import cycle
from redbtc.limits import memory
from redbtc.request_body import body
from redbtc.request_body import forms, media
from redbtc.gateway import admitted_request, background_responses, maximum
from redbtc.upstream import upstreams
from redbtc.meter import meters
from redbtc.server import websocket_protocol
from redbtc.gateway.websocket import client_sender, event_meter, turn_response

def let_fail(owner, name):
    usual = vars(owner)[name]
    function = getattr(usual, "__func__", usual)
    def failing(*arguments, **named):
        try:
            failed = open("fails").read()
        except FileNotFoundError:
            failed = ""
        if failed == f"{{owner.__name__}}.{{name}}":
            raise MemoryError
        return function(*arguments, **named)
    setattr(owner, name, failing if usual is function else type(usual)(failing))

let_fail(cycle.RequestCycle, "feed")
let_fail(cycle.RequestCycle, "receive")
let_fail(memory.Reservation, "take")
let_fail(body.RequestBody, "read_body")
let_fail(body.RequestBody, "add_include_usage")
let_fail(forms.Form, "grow")
let_fail(media, "decompressed")
let_fail(body.ClientEvent, "read_event")
let_fail(admitted_request.AdmittedRequest, "take_hold")
let_fail(maximum.Maximum, "note_growth")
let_fail(upstreams.Upstream, "open")
let_fail(meters.JSONMeter, "steps")
let_fail(websocket_protocol.WebSocketProtocol, "_count")
let_fail(event_meter.EventMeter, "take")
let_fail(turn_response.TurnResponse, "following")
let_fail(client_sender.ClientSender, "send")
let_fail(background_responses.BackgroundResponses, "start")
"""
RESPONSE = {"model": "m", "input": "Hi"}
CHAT = {"model": "m", "stream": True, "messages": []}
JSON = {"content-type": "application/json"}
GZIP = {**JSON, "content-encoding": "gzip"}
FORM = {"content-type": "multipart/form-data; boundary=x"}
PICTURE = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
TEXT = json.dumps(RESPONSE).encode()
BEFORE_FORWARDING: dict[str, tuple[str, dict[str, str], bytes]] = {
    "RequestCycle.feed": ("/responses", JSON, TEXT),
    "RequestCycle.receive": ("/responses", JSON, TEXT),
    "Reservation.take": ("/responses", JSON, TEXT),
    "RequestBody.read_body": ("/responses", JSON, TEXT),
    "RequestBody.add_include_usage": ("/chat/completions", JSON, json.dumps(CHAT).encode()),
    "Form.grow": ("/images/edits", FORM, PICTURE),
    "redbtc.request_body.media.decompressed": ("/responses", GZIP, gzip.compress(TEXT)),
    "AdmittedRequest.take_hold": ("/responses", JSON, TEXT),
}


@pytest.fixture
def starving(make_gateway: MakeGateway) -> Gateway:
    """A gateway with two places, of which one that is not given back would soon be missed."""
    gateway = make_gateway("[limits]\nconcurrency = 2\nqueue_seconds = 0\n")
    gateway.prelude = PRELUDE
    return gateway.start()


def let_fail(gateway: Gateway, name: str) -> Path:
    file = gateway.folder / "fails"
    file.write_text(name)
    return file


def is_calm(gateway: Gateway) -> bool:
    metrics = gateway.metrics()
    return metrics["redbtc_in_flight"] == metrics["redbtc_queued"] == 0


def check_refusal(answer: Any) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_no_memory_for_a_body_is_503(starving: Gateway, upstream: Upstream) -> None:
    key = starving.new_key()
    for name, (path, headers, body) in BEFORE_FORWARDING.items():
        upstream.script = images_json() if "images" in path else json_answer(response_object())
        seen = len(upstream.requests)
        with starving.client(key) as client:
            for _ in range(3):
                file = let_fail(starving, name)
                check_refusal(client.post(path, content=body, headers=headers))
                assert len(upstream.requests) == seen, name
                file.unlink()
            assert client.post(path, content=body, headers=headers).status_code == 200, name
    wait_until(lambda: is_calm(starving))
    assert {row["outcome"] for row in starving.rows()} == {"completed"}
    assert len(starving.rows()) == len(BEFORE_FORWARDING)
    refused = starving.metrics()['redbtc_refusals_total{code="overloaded"}']
    assert refused == 3 * len(BEFORE_FORWARDING)


def test_no_memory_after_a_hold_gives_it_back(starving: Gateway) -> None:
    key = starving.new_key(monthly_budget="1000")
    starving.cli("price", "add", "m", "--input", "1", "--output", "1")
    file = let_fail(starving, "Maximum.note_growth")
    with starving.client(key) as client:
        check_refusal(client.post("/responses", json=RESPONSE))
        file.unlink()
        assert starving.cli("account", "show", "test")["held"] == "0"
        assert client.post("/responses", json=RESPONSE).status_code == 200


@pytest.mark.parametrize("name", ["Upstream.open", "JSONMeter.steps"])
def test_no_memory_after_forwarding_ends_the_row(
    starving: Gateway, upstream: Upstream, name: str
) -> None:
    """The upstream may have been paid already, so a client is told not to retry."""
    key = starving.new_key()
    with starving.client(key) as client:
        for _ in range(3):
            file = let_fail(starving, name)
            answer = client.post("/responses", json=RESPONSE)
            check_refusal(answer)
            assert answer.headers["x-should-retry"] == "false"
            file.unlink()
        assert client.post("/responses", json=RESPONSE).status_code == 200
    wait_until(lambda: is_calm(starving))
    outcomes = [row["outcome"] for row in starving.rows()]
    assert sorted(outcomes) == ["completed", *["interrupted"] * 3]


def test_no_memory_for_a_message_is_an_event(starving: Gateway, upstream: Upstream) -> None:
    upstream.talk = ws_like_openai
    key = starving.new_key()
    with websocket(starving, key) as client:
        file = let_fail(starving, "ClientEvent.read_event")
        client.send()
        event = client.recv()
        assert (event["status"], event["error"]["code"]) == (503, "overloaded")
        file.unlink()
        client.send()
        client.completed()
    wait_until(lambda: is_calm(starving))


@pytest.mark.parametrize(
    ("name", "close"), [("WebSocketProtocol._count", 1013), ("EventMeter.take", 1011)]
)
def test_no_memory_within_a_message_ends_the_connection(
    starving: Gateway, upstream: Upstream, name: str, close: int
) -> None:
    upstream.talk = ws_like_openai
    key = starving.new_key()
    with websocket(starving, key) as client:
        file = let_fail(starving, name)
        client.send()
        assert client.closed() == close
    file.unlink()
    with websocket(starving, key) as client:
        client.send()
        client.completed()
    wait_until(lambda: is_calm(starving))
    assert "pending" not in {row["outcome"] for row in starving.rows()}


def test_no_memory_to_send_the_last_event_ends_the_turn_at_once(
    starving: Gateway, upstream: Upstream
) -> None:
    """Its row is committed by then, and nothing else comes that could end the turn."""
    key = starving.new_key(concurrency=1)
    last = threading.Event()

    async def talk(sock: Socket) -> None:
        created, delta, completed = ws_events(1, await sock.recv())
        await sock.send(created, delta)
        await asyncio.to_thread(last.wait, PATIENCE_SECONDS)
        await sock.send(completed)
        await sock.recv()

    upstream.talk = talk
    with websocket(starving, key) as client:
        client.send()
        client.until("response.output_text.delta")
        file = let_fail(starving, "ClientSender.send")
        last.set()
        began = time.monotonic()
        assert client.closed() == 1011
        assert time.monotonic() - began < 15
    file.unlink()
    wait_until(lambda: is_calm(starving))
    assert [row["outcome"] for row in starving.rows()] == ["completed"]


def test_no_memory_for_a_response_that_follows_gives_its_hold_back(
    starving: Gateway, upstream: Upstream
) -> None:
    upstream.talk = steering
    key = starving.new_key(monthly_budget="1000")
    starving.cli("price", "add", "gpt-up", "--input", "1", "--output", "1")
    with websocket(starving, key) as client:
        client.send()
        client.until("response.output_text.delta")
        file = let_fail(starving, "TurnResponse.following")
        client.raw(steer(1))
        assert client.closed() == 1011
    file.unlink()
    wait_until(lambda: is_calm(starving))
    assert starving.api("GET", "/accounts/test")["held"] == "0"


def test_no_memory_to_settle_a_background_response_is_tried_again(
    starving: Gateway, upstream: Upstream
) -> None:
    has_ended = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        begun = response_object(status="in_progress", usage=None)
        await json_answer(response_object() if has_ended.is_set() else begun)(request, reply)

    upstream.script = script
    with starving.client(starving.new_key()) as client:
        answer = client.post("/responses", json={**RESPONSE, "background": True})
        assert answer.status_code == 200
        file = let_fail(starving, "BackgroundResponses.start")
        has_ended.set()
        with contextlib.suppress(httpx2.RemoteProtocolError):  # where the answer had begun
            check_refusal(client.get("/responses/resp_1"))
        file.unlink()
        assert client.get("/responses/resp_1").status_code == 200
        assert [row["outcome"] for row in starving.rows()] == ["completed"]
