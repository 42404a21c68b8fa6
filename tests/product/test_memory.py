"""A request for which there is no memory left is refused with 503; the process goes on, and nothing
of the request stays behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    Upstream,
    images_json,
    json_answer,
    response_object,
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
from redbtc.gateway import admission
from redbtc.upstream import upstreams
from redbtc.meter import meters
from redbtc.server import websocket_protocol
from redbtc.gateway.websocket import event_meter
pass

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
let_fail(body.RequestBody, "steps")
let_fail(body.RequestBody, "add_include_usage")
let_fail(forms.Form, "grow")
let_fail(media, "decompressed")
let_fail(body.ClientEvent, "read")
let_fail(admission.AdmittedRequest, "hold")
let_fail(admission.AdmittedRequest, "_note_growth")
let_fail(upstreams.Upstream, "open")
let_fail(meters.JSONMeter, "steps")
let_fail(websocket_protocol.WebSocketProtocol, "_count")
let_fail(event_meter.EventMeter, "take")
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
    "RequestBody.steps": ("/responses", JSON, TEXT),
    "RequestBody.add_include_usage": ("/chat/completions", JSON, json.dumps(CHAT).encode()),
    "Form.grow": ("/images/edits", FORM, PICTURE),
    "redbtc.request_body.media.decompressed": ("/responses", GZIP, gzip.compress(TEXT)),
    "AdmittedRequest.hold": ("/responses", JSON, TEXT),
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
    file = let_fail(starving, "AdmittedRequest._note_growth")
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
        file = let_fail(starving, "ClientEvent.read")
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
