"""The raw HTTP cases of a front that faces the world, and the gateway's own errors."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import struct
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, USUAL, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import Received, Reply, Upstream, event, json_answer

pytestmark = pytest.mark.promise_9

RESPONSE = {"model": "gpt-up", "input": "Hi"}


def request(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


BODY = b'{"model":"m","input":"x"}'
CASES = {
    "no host": ("POST /v1/responses HTTP/1.1\nAuthorization: Bearer KEY", 400),
    "two hosts": ("GET /v1/models HTTP/1.1\nHost: a\nHost: b\nAuthorization: Bearer KEY", 400),
    "a host with a path": ("GET /v1/models HTTP/1.1\nHost: a/../b?x#y\nAuthorization: x", 400),
    "a host with a user": ("GET /v1/models HTTP/1.1\nHost: u@a\nAuthorization: x", 400),
    "a host with an empty port": ("GET /v1/files HTTP/1.1\nHost: a:", 404),
    "a host with a long port": ("GET /v1/files HTTP/1.1\nHost: a:123456", 400),
    "HTTP/0.9": ("GET /v1/models", 400),
    "HTTP/2 in words": ("GET /v1/models HTTP/2.0\nHost: a", 400),
    "gzip, chunked": (
        "POST /v1/responses HTTP/1.1\nHost: a\nTransfer-Encoding: gzip, chunked",
        400,
    ),
    "encoding on 1.0": ("POST /v1/responses HTTP/1.0\nHost: a\nTransfer-Encoding: chunked", 400),
    "length and encoding": (
        "POST /v1/responses HTTP/1.1\nHost: a\nContent-Length: 5\nTransfer-Encoding: chunked",
        400,
    ),
    "two lengths": (
        "POST /v1/responses HTTP/1.1\nHost: a\nContent-Length: 5\nContent-Length: 6",
        400,
    ),
    "a length with a sign": ("POST /v1/responses HTTP/1.1\nHost: a\nContent-Length: +5", 400),
    "a bad length": ("POST /v1/responses HTTP/1.1\nHost: a\nContent-Length: 5, 5", 400),
    "a 2 MB header": ("GET /v1/models HTTP/1.1\nHost: a\nX: " + "x" * 2_000_000, 431),
    "5,000 headers": ("GET /v1/models HTTP/1.1\nHost: a" + "\nX: y" * 5000, 431),
    "a long path": ("GET /" + "x" * 100_000 + " HTTP/1.1\nHost: a", 431),
    "obs-fold": ("GET /v1/models HTTP/1.1\nHost: a\nX: y\n z: w", 400),
    "a space before the colon": ("GET /v1/models HTTP/1.1\nHost : a", 400),
    "a NUL": ("GET /v1/models HTTP/1.1\nHost: a\nX: a\0b", 400),
    "an unknown method": ("BREW /v1/models HTTP/1.1\nHost: a", 400),
    "CONNECT": ("CONNECT a:80 HTTP/1.1\nHost: a", 400),
    "garbage": ("\x16\x03\x01\x02", 400),
    "an unknown path": ("GET /v1/files HTTP/1.1\nHost: a", 404),
    "a stored chat": ("GET /v1/chat/completions HTTP/1.1\nHost: a", 405),
    "another method": ("DELETE /v1/models/x HTTP/1.1\nHost: a", 405),
    "a path that climbs": ("GET /v1/models/../../admin/v1/accounts HTTP/1.1\nHost: a", 401),
    "an encoded slash": ("GET /v1%2fresponses HTTP/1.1\nHost: a", 404),
    "the admin API": ("GET /admin/v1/accounts HTTP/1.1\nHost: a", 401),
    "HEAD as codex doctor": ("HEAD /v1/responses HTTP/1.1\nHost: a", 405),
    "an absolute URL without a path": ("GET http://evil HTTP/1.1\nHost: a", 404),
    "CONNECT with an absolute URL": ("CONNECT http://evil HTTP/1.1\nHost: a", 400),
    "an absolute URL": ("GET http://evil/v1/files HTTP/1.1\nHost: a", 404),
    "a WebSocket": (
        "GET /v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: x\nSec-WebSocket-Version: 13",
        426,
    ),
    "a WebSocket without a key": (
        "GET /v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13",
        401,
    ),
    "a WebSocket at an absolute URL": (
        "GET http://a/v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13",
        401,
    ),
    "a WebSocket with two keys": (
        "GET /v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        426,
    ),
    "a WebSocket and another upgrade": (
        "GET /v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\nUpgrade: h2c",
        426,
    ),
    "a WebSocket with a bad protocol": (
        "GET /v1/responses HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n"
        "Sec-WebSocket-Protocol: ;",
        426,
    ),
    "a WebSocket with a long query": (
        f"GET /v1/responses?{'x' * 9000} HTTP/1.1\nHost: a\n"
        "Connection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13",
        431,
    ),
    "a WebSocket elsewhere": (
        "GET /v1/files HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13",
        404,
    ),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> object:
    with Upstream() as upstream:
        gateway = Gateway(tmp_path_factory.mktemp("shared"), upstream.url).start()
        yield gateway, upstream
        gateway.close()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.front_door
def test_raw_requests(shared: tuple[Gateway, Upstream], name: str) -> None:
    gateway, upstream = shared
    head, status = CASES[name]
    answer = gateway.raw(request(head))
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"x-redbtc-request-id: req_" in answer
    _, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith("HEAD"):
        assert json.loads(body)["error"]["type"]
    assert not upstream.requests


def test_an_unknown_path_is_refused_before_its_body(shared: tuple[Gateway, Upstream]) -> None:
    gateway, _ = shared
    for path, status in (("/v1/files", 404), ("/v1/responses", 401)):
        head = f"POST {path} HTTP/1.1\nHost: a\nContent-Length: 100000000\nExpect: 100-continue"
        answer = gateway.raw(request(head))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"100 Continue" not in answer


SERVED = (
    "POST chat/completions, responses, responses/compact, responses/input_tokens, "
    "images/generations, images/edits, completions, embeddings, moderations, "
    "audio/transcriptions, audio/translations, audio/speech, alpha/search, "
    "memories/trace_summarize, responses/{id}/cancel; "
    "GET responses/{id}, responses/{id}/input_items, models, models/{model}; "
    "DELETE responses/{id}."
)


@pytest.mark.parametrize(
    "path",
    ["/v1/files", "/v1/batches", "/v1/vector_stores/x", "/v1/realtime", "/responses", "/v1", "/"],
)
def test_what_is_not_served_lists_what_is(shared: tuple[Gateway, Upstream], path: str) -> None:
    gateway, _ = shared
    for method in ("GET", "POST", "DELETE"):
        answer = httpx2.request(method, gateway.url + path, trust_env=False)
        found = answer.json()["error"]
        assert (answer.status_code, found["code"]) == (404, "unknown_url")
        assert found["message"] == f"Unknown request URL. Served under /v1: {SERVED}"
        assert "allow" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/x", "/v1/%00%1b", "/v1/%e2%80%ae"])
def test_no_path_is_repeated(shared: tuple[Gateway, Upstream], path: str) -> None:
    answer = httpx2.get(shared[0].url + path, trust_env=False)
    assert answer.json()["error"]["message"] == f"Unknown request URL. Served under /v1: {SERVED}"


def test_a_websocket_elsewhere_is_told_what_is_served(shared: tuple[Gateway, Upstream]) -> None:
    for path, status, told in (
        ("/v1/realtime", 404, SERVED),
        ("/healthz", 404, SERVED),
        ("/v1/models", 404, SERVED),
        ("/v1/chat/completions", 405, "allow: OPTIONS, POST"),
    ):
        head = f"GET {path} HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\n"
        head += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13"
        answer = shared[0].raw(request(head))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert told.encode() in answer


SERVED_METHODS = {
    "/v1/chat/completions": "OPTIONS, POST",
    "/v1/responses": "OPTIONS, POST",
    "/v1/responses/compact": "DELETE, GET, HEAD, OPTIONS, POST",
    "/v1/images/edits": "OPTIONS, POST",
    "/v1/responses/resp_1": "DELETE, GET, HEAD, OPTIONS",
    "/v1/responses/resp_1/cancel": "OPTIONS, POST",
    "/v1/responses/resp_1/input_items": "GET, HEAD, OPTIONS",
    "/v1/models": "GET, HEAD, OPTIONS",
    "/v1/models/a/b": "GET, HEAD, OPTIONS",
    "/healthz": "GET, HEAD",
    "/readyz": "GET, HEAD",
    "/status": "GET, HEAD",
    "/metrics": "GET, HEAD",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@pytest.mark.parametrize("path", list(SERVED_METHODS))
def test_another_method_of_a_path_that_is_served(
    shared: tuple[Gateway, Upstream], path: str
) -> None:
    """It needs no key, and its body is not read."""
    gateway, upstream = shared
    allowed = SERVED_METHODS[path]
    for method in METHODS:
        head = f"{method} {path} HTTP/1.1\nHost: a\nContent-Length: 100000000"
        answer = gateway.raw(request(f"{head}\nExpect: 100-continue"))
        status = int(answer.split(b" ")[1])
        assert b"100 Continue" not in answer
        if method in allowed.split(", ") and method != "OPTIONS":
            assert status in (200, 401), (method, answer)
            continue
        without = allowed.replace("OPTIONS, ", "").replace(", OPTIONS", "")
        named = without if method == "OPTIONS" else allowed  # a preflight alone is answered
        assert status == 405, (method, answer)
        assert f"\r\nallow: {named}\r\n".encode() in answer
        if method != "HEAD":
            found = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert (found["code"], found["type"]) == ("method_not_allowed", "invalid_request_error")
            assert found["message"] == f"The method {method} is not allowed here. Allowed: {named}."
    assert not upstream.requests


def test_a_wrong_method_of_an_upgrade(shared: tuple[Gateway, Upstream]) -> None:
    for method, path, status in (
        ("GET", "/v1/responses", 426),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
    ):
        head = f"{method} {path} HTTP/1.1\nHost: a\nUpgrade: websocket"
        assert shared[0].raw(request(head)).startswith(b"HTTP/1.1 %d " % status)


def test_expect_is_answered_for_a_good_key(gateway: Gateway, key: str) -> None:
    head = (
        f"POST /v1/responses HTTP/1.1\nHost: a\nAuthorization: Bearer {key}\n"
        f"Content-Type: application/json\nContent-Length: {len(BODY)}\nExpect: 100-continue"
    )
    with gateway.connect() as sock:
        sock.sendall(request(head))
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        sock.sendall(BODY)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("first", ["GET /healthz", "POST /dashboard", "POST /v1/files"])
def test_who_was_not_told_to_send_a_body_sends_no_other_request(
    gateway: Gateway, first: str
) -> None:
    """RFC 9110 §10.1.1: the body may follow, or the next request, so the connection is closed."""
    head = f"{first} HTTP/1.1\nHost: a\nContent-Length: 50\nExpect: 100-continue"
    answer = gateway.raw(request(head), until_close=True)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer
    assert b"100 Continue" not in answer


def test_pipelined_requests_are_answered_in_order(gateway: Gateway, key: str) -> None:
    one = request("GET /healthz HTTP/1.1\nHost: a")
    two = request(f"GET /v1/models HTTP/1.1\nHost: a\nAuthorization: Bearer {key}")
    last = request("GET /v1/nothing HTTP/1.1\nHost: a\nConnection: close")
    with gateway.connect() as sock:
        sock.sendall(one + two + last)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    order = [answer.find(mark) for mark in (b'"status":"ok"', b'"object":"list"', b"unknown_url")]
    assert order == sorted(order)
    assert order[0] > 0


def test_a_slow_body_and_a_large_one(make_gateway: MakeGateway) -> None:
    gateway = make_gateway("[server]\nbody_timeout_seconds = 2\nmax_body_bytes = 2000").start()
    key = gateway.new_key()
    head = (
        f"POST /v1/responses HTTP/1.1\nHost: a\nAuthorization: Bearer {key}\n"
        "Content-Type: application/json\n"
    )
    slow = gateway.raw(request(head + "Content-Length: 100", b"{"))
    assert slow.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in slow
    large = gateway.raw(request(head + "Content-Length: 2001"))
    assert large.startswith(b"HTTP/1.1 413 ")
    chunk = b"800\r\n" + b"x" * 2048 + b"\r\n"
    endless = gateway.raw(request(head + "Transfer-Encoding: chunked", chunk * 2))
    assert endless.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in endless


def test_a_client_in_mid_upload_sees_why_it_is_refused(gateway: Gateway, key: str) -> None:
    """20 MB for a wrong key, 200 MB for a right one: the answer is not lost in a reset."""
    for token, length, status in (("sk-no", 20, 401), (key, 200, 413)):
        body = b"x" * (length << 20)
        answer = httpx2.post(
            f"{gateway.base_url}/responses",
            content=body,
            headers={"authorization": f"Bearer {token}", "content-type": "application/json"},
            **USUAL,
        )
        assert answer.status_code == status


def test_connections_that_are_reset_leave_nothing_behind(gateway: Gateway) -> None:
    """uvicorn's keep-alive timers hold on to them for as long as it would keep one open."""

    def reset(count: int) -> None:
        for _ in range(count):
            with gateway.connect() as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
                assert sock.recv(1000).startswith(b"HTTP/1.1 200")
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    reset(1000)
    before = gateway.rss()
    reset(5000)
    assert gateway.rss() - before < 8 << 20


def test_a_head_that_never_ends_costs_no_memory(gateway: Gateway) -> None:
    before = gateway.rss()
    with gateway.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000:
                sent += sock.send(b"x" * 10_000)
                time.sleep(0.0005)
    assert sent < 50_000_000, "the connection was closed"
    assert gateway.rss() - before < 4 << 20


def code_of(gateway: Gateway, key: str, path: str, **options: Any) -> tuple[int, str, str]:
    with gateway.client(key) as client:
        answer = client.post(path, **options)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "expected"),
    [
        ("/responses", b"", JSON, (400, "invalid_json", None)),
        ("/responses", b"{", JSON, (400, "invalid_json", None)),
        ("/responses", b"[]", JSON, (400, "invalid_request", None)),
        ("/responses", b'{"input":"x"}', JSON, (400, "invalid_request", "model")),
        ("/responses", b'{"model":5}', JSON, (400, "invalid_request", "model")),
        (
            "/responses",
            b'{"model":"m","input":"x","request_id":"resp_b"}',
            JSON,
            (400, "invalid_request", "request_id"),
        ),
        ("/responses", b'{"model":"m","stream":"x"}', JSON, (400, "invalid_request", "stream")),
        ("/responses", b"[" * 100_000, JSON, (400, "invalid_json", None)),
        ("/responses", b'{"a":' * 100_000, JSON, (400, "invalid_json", None)),
        ("/responses", b'{"model":"%s"}' % (b"m" * 300), JSON, (400, "invalid_request", "model")),
        ("/chat/completions", b"\xff{}", JSON, (400, "invalid_json", None)),
        (
            "/responses",
            b'{"model":"m","previous_response_id":"resp_1"}',
            JSON,
            (404, "response_not_found", "previous_response_id"),
        ),
        (
            "/responses",
            b'{"model":"m","conversation":{"id":"conv_1"}}',
            JSON,
            (400, "invalid_request", "conversation"),
        ),
        (
            "/responses",
            b'{"model":"m","input":[{"type":"item_reference","id":"msg_1"}]}',
            JSON,
            (400, "invalid_request", "item_reference"),
        ),
        ("/responses", BODY, {"content-type": "text/plain"}, (415, "unsupported_media_type", None)),
        (
            "/responses",
            BODY,
            {**JSON, "content-encoding": "br"},
            (415, "unsupported_media_type", None),
        ),
        (
            "/images/generations",
            BODY,
            {"content-type": "multipart/form-data; boundary=x"},
            (415, "unsupported_media_type", None),
        ),
    ],
)
@pytest.mark.front_door
def test_bodies_that_are_refused(
    shared: tuple[Gateway, Upstream],
    path: str,
    body: bytes,
    headers: dict[str, str],
    expected: tuple[int, str, str | None],
) -> None:
    gateway, upstream = shared
    found = code_of(gateway, gateway.new_key(), path, content=body, headers=headers)
    assert found == expected
    assert not upstream.requests
    assert not gateway.rows()


@pytest.mark.parametrize("name", ["../files", "a/../../files", "..%2ffiles", "a%3fb", "a%0d%0ab"])
def test_a_models_name_is_no_way_to_other_paths(
    gateway: Gateway, upstream: Upstream, key: str, name: str
) -> None:
    head = f"GET /v1/models/{name} HTTP/1.1\nHost: a\nAuthorization: Bearer {key}"
    assert gateway.raw(request(head)).startswith(b"HTTP/1.1 404 ")
    assert not upstream.requests


def test_nulls_are_no_references(gateway: Gateway, upstream: Upstream, key: str) -> None:
    body = {**RESPONSE, "previous_response_id": None, "conversation": None, "background": False}
    with gateway.client(key) as client:
        assert client.post("/responses", json=body).status_code == 200


def test_an_upstream_that_is_not_there(make_gateway: MakeGateway, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    settings = (
        f'[[upstreams]]\nname = "gone"\nbase_url = "http://127.0.0.1:{port}/v1"\napi_key_env = ""\n'
    )
    gateway = make_gateway(settings).start()
    key = gateway.new_key()
    assert code_of(gateway, key, "/responses", json=RESPONSE)[:2] == (502, "upstream_unreachable")
    row = gateway.row()
    assert (row["outcome"], row["status"], row["upstream"]) == ("upstream_failed", 502, "gone")
    large, memory = {**RESPONSE, "input": "x" * 2_000_000}, gateway.rss()
    with gateway.client(key) as client:
        for _ in range(100):
            assert client.post("/responses", json=large).status_code == 502
    assert gateway.rss() - memory < 20 << 20, "what has failed is let go of"
    more = f'{settings}priority = 0\n[[upstreams]]\nname = "here"\nbase_url = "{upstream.url}"\n'
    gateway.configure(more + 'api_key_env = ""\n')
    gateway.signal(1)
    wait_until(lambda: '"reloaded"' in gateway.log())
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200, "the next one is tried"
    assert gateway.rows()[-1]["upstream"] == "here"


def test_an_upstream_that_breaks_the_protocol(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    answers = [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000,
        b"garbage\r\n\r\n",
        b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n",
        b"",
    ]
    for answer in answers:

        async def script(_: Received, reply: Reply, answer: bytes = answer) -> None:
            await reply.raw(answer)
            reply.close()

        upstream.script = script
        status, code, _ = code_of(gateway, key, "/responses", json=RESPONSE)
        assert (status, code) == (502, "upstream_protocol_error"), answer[:20]
    assert {row["outcome"] for row in gateway.rows()} == {"upstream_failed"}


def test_informational_answers_are_stepped_over(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def script(request: Received, reply: Reply) -> None:
        await reply.raw(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 100)
        await json_answer({"id": "resp_1"})(request, reply)

    upstream.script = script
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).json() == {"id": "resp_1"}


@pytest.mark.parametrize("timeout", ["first_byte", "idle", "total"])
def test_timeouts(make_gateway: MakeGateway, upstream: Upstream, timeout: str) -> None:
    gateway = make_gateway(upstream_settings=f"{timeout}_timeout_seconds = 2").start()
    key = gateway.new_key()

    sent = 0

    async def script(request: Received, reply: Reply) -> None:
        nonlocal sent
        if timeout == "first_byte":
            await reply.wait(request.closed)
        await reply.head(200, [("content-type", "text/event-stream")])
        while not request.closed.is_set():
            await reply.send(b": x\n\n")
            sent += 1
            await reply.wait(request.closed, PATIENCE_SECONDS if timeout == "idle" else 0.05)

    upstream.script = script
    if timeout == "first_byte":
        found = code_of(gateway, key, "/responses", json=RESPONSE)
        assert found[:2] == (504, "upstream_timeout")
    else:
        with gateway.client(key) as client, pytest.raises(httpx2.RemoteProtocolError):
            client.post("/responses", json=RESPONSE)
    assert gateway.row()["outcome"] == "upstream_failed"
    assert upstream.requests[0].closed.wait(PATIENCE_SECONDS), "the upstream is closed"
    assert (sent > 1, sent > 0) == (timeout == "total", timeout != "first_byte")


def test_a_slow_reader_slows_the_upstream_down(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    sent = [0]

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        for _ in range(2000):
            await reply.send(b": " + b"x" * 50_000 + b"\n\n")
            sent[0] += 50_004
        await reply.end()

    upstream.script = script
    before = gateway.rss()
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        parts = answer.iter_raw()
        next(parts)
        wait_until(lambda: sent[0] > 100_000)
        time.sleep(1)
        assert sent[0] < 30_000_000, "the rest of 100 MB waits at the upstream"
        assert gateway.rss() - before < 24 << 20
        assert sum(map(len, parts)) > 90_000_000


def test_metrics_and_readiness(gateway: Gateway, key: str, upstream: Upstream) -> None:
    with gateway.client(key) as client:
        client.post("/responses", json=RESPONSE)
        client.post("/responses", content=b"{", headers=JSON)
        assert gateway.get("/readyz").status_code == 200
    metrics = gateway.metrics()
    labels = 'outcome="completed",route="/v1/responses",status="200"'
    assert metrics[f"redbtc_requests_total{{{labels}}}"] == 1
    assert metrics['redbtc_refusals_total{code="invalid_json"}'] == 1
    assert metrics['redbtc_tokens_total{kind="input",source="upstream"}'] == 30
    assert metrics['redbtc_request_seconds_count{route="/v1/responses"}'] == 1
    assert metrics["redbtc_ledger_commits_total"] >= 2
    assert metrics["redbtc_ledger_healthy"] == 1
    outside = {"x-forwarded-for": "203.0.113.5"}
    answer = gateway.get("/metrics", headers=outside)
    assert answer.status_code == 403


def test_an_http_1_0_client_gets_no_chunks_and_a_reset_where_the_answer_is_torn(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """RFC 9112 §6.1. nginx proxies with HTTP/1.0 by default."""
    body = b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
    head = (
        f"POST /v1/chat/completions HTTP/1.0\nAuthorization: Bearer {key}\n"
        f"Content-Type: application/json\nContent-Length: {len(body)}"
    )
    events = [event({"id": "c", "choices": []}), b"data: [DONE]\n\n"]
    for torn in (False, True):

        async def script(_: Received, reply: Reply, torn: bool = torn) -> None:
            await reply.head(200, [("content-type", "text/event-stream")])
            for each in events[: 1 if torn else 2]:
                await reply.send(each)
            if torn:
                reply.tear()
            await reply.end()

        upstream.script = script
        answer, end = b"", None
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=100) as sock:
            sock.sendall(request(head, body))
            try:
                while part := sock.recv(65536):
                    answer += part
            except ConnectionResetError as error:
                end = error
        assert bool(end) is torn
        if not torn:
            assert answer.partition(b"\r\n\r\n")[2] == b"".join(events)
            assert b"chunked" not in answer


def test_an_http_1_0_client_sees_that_the_gateway_was_killed(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created"}))
        await reply.wait(request.closed)

    upstream.script = script
    body = b'{"model":"m","input":"x","stream":true}'
    head = (
        f"POST /v1/responses HTTP/1.0\nAuthorization: Bearer {key}\n"
        f"Content-Type: application/json\nContent-Length: {len(body)}"
    )
    with gateway.connect() as sock:
        sock.sendall(request(head, body))
        received = b""
        while b"response.created" not in received:
            received += sock.recv(65536)
        gateway.kill()
        with pytest.raises(ConnectionResetError):
            sock.recv(65536)


class FewDescriptors(Gateway):
    """Start a gateway that may open 160 files."""

    def command(self, *arguments: str) -> list[str]:
        command = super().command(*arguments)
        if "serve" not in arguments:
            return command
        return ["sh", "-c", 'ulimit -n 160; exec "$@"', "sh", *command]


@pytest.mark.process
def test_more_connections_than_descriptors(tmp_path: Path, upstream: Upstream) -> None:
    """Idle connections, slow heads and slow bodies without a key are closed for new ones, with one
    log line; requests under way are not."""
    gateway = FewDescriptors(tmp_path / "gateway", upstream.url).start()
    try:
        key = gateway.new_key()
        gateway.get("/dashboard/login")  # the pages are loaded, which needs descriptors and time
        head = b"POST /dashboard/login HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n"
        form = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\n"
        slow = [b"", head + b"X-Slow: ", head + form + b"email="]
        with contextlib.ExitStack() as stack:
            for number in range(300):
                sock = socket.create_connection(("127.0.0.1", gateway.port), 100)
                stack.enter_context(sock).sendall(slow[number % 3])
                if number % 50 == 0:  # on a new connection: idle ones are among those closed
                    with gateway.client(key) as client:
                        assert client.post("/responses", json=RESPONSE).status_code == 200
            assert gateway.open_files() < 120
            assert gateway.get("/healthz").status_code == 200
        assert gateway.log().count("too many connections") == 1
        assert '"maximum":48' in gateway.log()
    finally:
        gateway.close()


def test_the_descriptor_limit_is_raised(gateway: Gateway) -> None:
    soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


class CountsObjects(Gateway):
    """Start a gateway that prints at its end how many objects a full garbage collection skips, and
    how many it visits."""

    prelude = """
import atexit, gc
atexit.register(lambda: print("objects", gc.get_freeze_count(), len(gc.get_objects())))
"""


@pytest.mark.process
def test_garbage_collections_skip_what_is_there_at_the_start(
    tmp_path: Path, upstream: Upstream
) -> None:
    """A full collection holds the loop: it would take 25 ms to visit all modules."""
    gateway = CountsObjects(tmp_path / "gateway", upstream.url).start()
    try:
        with gateway.client(gateway.new_key()) as client:
            assert client.post("/responses", json=RESPONSE).is_success
        assert gateway.terminate() == 0
        found = re.search(r"objects (\d+) (\d+)", gateway.log())
        assert found
        skipped, visited = map(int, found.groups())
        assert skipped > 5 * visited
    finally:
        gateway.close()
