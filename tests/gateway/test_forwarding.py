"""Promise 1: bytes are sacred. Promise 3: what a client saw complete is in the ledger."""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.helpers.gateway import UPSTREAM_KEY, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    DONE,
    IMAGE_USAGE,
    Received,
    Reply,
    Upstream,
    chat_pieces,
    event,
    images_pieces,
    json_answer,
    response_object,
    response_pieces,
    stream,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_3]

CHAT = {"model": "gpt-up", "messages": [{"role": "user", "content": "Hi"}]}
RESPONSE = {"model": "gpt-up", "input": "Hi"}


@pytest.mark.front_door
def test_a_json_answer_is_the_same_byte_for_byte_and_metered(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    body = b'  {"model" : "gpt-up",\n "input":"\\u00e9 \\"usage\\"" , "x":1.0e5 }\n'
    with gateway.client(key) as client:
        answer = client.post(
            "/responses", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200
    assert upstream.requests[0].body == body
    assert answer.json() == response_object()
    row = gateway.row(answer.headers["x-redbtc-request-id"])
    assert row["outcome"] == "completed"
    assert row["usage_source"] == "upstream"
    assert (row["input_tokens"], row["output_tokens"]) == (30, 9)
    assert (row["cached_input_tokens"], row["cache_write_tokens"]) == (10, 4)
    assert row["reasoning_tokens"] == 5
    assert (row["model"], row["requested_model"]) == ("gpt-up", "gpt-up")
    assert (row["service_tier"], row["response_id"]) == ("default", "resp_1")
    assert (row["account"], row["upstream"]) == ("test", "test")
    assert (row["status"], row["endpoint"]) == (200, "/v1/responses")
    assert (row["cost"], row["currency"]) == ("0", "USD")


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.front_door
def test_a_stream_is_the_same_byte_for_byte(
    gateway: Gateway, upstream: Upstream, key: str, size: int
) -> None:
    whole = b"".join(response_pieces(["Hel", "lo"]))
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    upstream.script = stream(pieces)
    with gateway.client(key) as client:
        answer = client.post("/responses", json={**RESPONSE, "stream": True})
    assert answer.content == whole
    assert gateway.row()["input_tokens"] == 30


@pytest.mark.front_door
def test_each_chunk_passes_at_once(gateway: Gateway, upstream: Upstream, key: str) -> None:
    """In lock step: the upstream sends the next piece when the client has the one before."""
    pieces = [
        b": keepalive\n\n",
        b"event: response.output_text.delta\nda",
        b'ta: {"type":"response.output_text.delta","delta":"H"}\n\n',
        b'data: {"type":"response.output_text.delta","del',
        b'ta":"i"}\n\n',
        b"event: response.completed\ndata: "
        b'{"type":"response.completed","response":{"usage":{"input_tokens":1}}}\n\n',
    ]
    arrived = [threading.Event() for _ in pieces]

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        for piece, seen in zip(pieces, arrived, strict=True):
            await reply.send(piece)
            await reply.wait(seen)
            assert seen.is_set()
        await reply.end()

    upstream.script = script
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        got = b""
        for part in answer.iter_raw():
            got += part
            passed = 0
            for piece, seen in zip(pieces, arrived, strict=True):
                passed += len(piece)
                if len(got) >= passed:
                    seen.set()
    assert got == b"".join(pieces)


@pytest.mark.front_door
def test_the_usage_chunk_is_asked_for_and_taken_out(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    body = b'{"model":"gpt-up","stream":true,"messages":[]}'
    with gateway.client(key) as client:
        answer = client.post(
            "/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    sent = upstream.requests[0].body
    added = b'"stream_options":{"include_usage":true},'
    assert sent == body[:1] + added + body[1:]
    everything = chat_pieces(["Hello", " there", "!"])
    assert answer.content == b"".join([*everything[:-2], DONE])
    row = gateway.row()
    assert (row["input_tokens"], row["output_tokens"], row["reasoning_tokens"]) == (20, 7, 3)


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (
            b'{"stream_options":{},"stream":true,"model":"m"}',
            b'{"stream_options":{"include_usage":true},"stream":true,"model":"m"}',
        ),
        (
            b'{"x":"\\"stream_options\\": {","y":{"stream_options":{}},'
            b'"stream_options": {"include_obfuscation":false},"stream":true,"model":"m"}',
            b'{"x":"\\"stream_options\\": {","y":{"stream_options":{}},'
            b'"stream_options": {"include_usage":true,"include_obfuscation":false},'
            b'"stream":true,"model":"m"}',
        ),
        (
            b'{"stream":true, "stream_options" : null,"model":"m"}',
            b'{"stream":true, "stream_options" : {"include_usage":true},"model":"m"}',
        ),
        (
            b'{"stream":true,"stream_options":{"x":{"include_usage":null}, '
            b'"include_usage" :\nnull },"model":"m"}',
            b'{"stream":true,"stream_options":{"x":{"include_usage":null}, '
            b'"include_usage" :\ntrue },"model":"m"}',
        ),
        (
            b'{"stream":true,"stream_options":{"include\\u005fusage":null},"model":"m"}',
            b'{"stream":true,"stream_options":{"include\\u005fusage":true},"model":"m"}',
        ),
        (b'{"stream_options":{"include_usage":false},"stream":true,"model":"m"}', None),
        (b'{"stream_options":{"include_usage":true},"stream":true,"model":"m"}', None),
        (b'{"stream":false,"model":"m"}', None),
    ],
)
def test_include_usage_is_inserted_where_it_was_left_out(
    gateway: Gateway, upstream: Upstream, key: str, body: bytes, sent: bytes | None
) -> None:
    with gateway.client(key) as client:
        client.post("/chat/completions", content=body, headers={"content-type": "application/json"})
    assert upstream.requests[0].body == (sent or body)


def test_a_client_that_asked_for_usage_gets_it(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    with gateway.client(key) as client:
        answer = client.post("/chat/completions", json=body)
    assert answer.content == b"".join(chat_pieces(["Hello", " there", "!"]))
    assert gateway.row()["usage_source"] == "upstream"


def test_with_client_nothing_is_changed_and_the_row_says_none(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway('[metering]\ninclude_usage = "client"').start()
    with gateway.client(gateway.new_key()) as client:
        client.post("/chat/completions", json={**CHAT, "stream": True})
    assert b"stream_options" not in upstream.requests[0].body
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "none")
    assert row["input_tokens"] is None
    assert row["output_tokens"] is None


@pytest.mark.front_door
def test_the_terminal_event_waits_for_the_row_and_nothing_else_does(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """While the database is locked all but the end arrives; then the end, and the row is there."""
    pieces = response_pieces(["Hel", "lo"])
    lock = sqlite3.connect(gateway.database, isolation_level=None)

    locked = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(locked)
        await stream(pieces)(request, reply)

    upstream.script = script
    got: list[bytes] = []
    finished = threading.Event()

    def read() -> None:
        with (
            gateway.client(key) as client,
            client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
        ):
            got.extend(answer.iter_raw())
        finished.set()

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: upstream.requests)
    lock.execute("BEGIN IMMEDIATE")
    locked.set()
    wait_until(lambda: b"".join(got) == b"".join(pieces[:-1]))
    time.sleep(0.5)  # it must not come, however long one waits
    assert b"".join(got) == b"".join(pieces[:-1])
    assert not finished.is_set()
    lock.execute("ROLLBACK")
    lock.close()
    thread.join()
    assert b"".join(got) == b"".join(pieces)
    assert gateway.row()["outcome"] == "completed"


@pytest.mark.parametrize("end", ["tear", "close"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_torn_answer_looks_torn(
    gateway: Gateway, upstream: Upstream, key: str, end: str, streamed: bool
) -> None:
    pieces = response_pieces(["Hel", "lo"])[:-1]

    async def half(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "application/json")], "length:1000")
        await reply.send(b'{"id":"resp_1",')
        await asyncio.sleep(0.05)
        reply.tear() if end == "tear" else reply.close()

    upstream.script = stream(pieces, 0.01, end=end) if streamed else half
    with gateway.client(key) as client, pytest.raises(httpx2.RemoteProtocolError):
        client.post("/responses", json={**RESPONSE, "stream": streamed})
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert row["output_tokens"] >= 1


@pytest.mark.front_door
def test_headers_pass_by_list(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.script = json_answer(
        response_object(),
        headers=[
            ("x-request-id", "req_upstream"),
            ("openai-processing-ms", "12"),
            ("x-codex-turn-state", "abc"),
            ("set-cookie", "a=b"),
            ("server", "cloud"),
            ("alt-svc", "h3"),
            ("openai-organization", "org-1"),
            ("openai-project", "proj-1"),
            ("x-accel-redirect", "/secret"),
            ("x-ratelimit-limit-requests", "10000"),
            ("x-hop", "1"),
            ("connection", "x-hop"),
        ],
    )
    sent = {
        "x-codex-window-id": "w",
        "session-id": "s",
        "session_id": "s2",
        "originator": "codex_exec",
        "x-stainless-lang": "python",
        "x-openai-internal-codex-responses-lite": "true",
        "openai-beta": "b",
        "idempotency-key": "i",
        "cookie": "c=d",
        "openai-organization": "org-2",
        "chatgpt-account-id": "acc",
        "x-forwarded-for": "1.2.3.4",
        "x-other": "o",
        "accept-encoding": "gzip",
    }
    with gateway.client(key) as client:
        answer = client.post("/responses?x=1", json=RESPONSE, headers=sent)
    received = upstream.requests[0]
    assert received.path == "/v1/responses"
    names = {name.decode().lower() for name, _ in received.headers}
    assert names == {
        "accept",
        "content-type",
        "user-agent",
        "x-codex-window-id",
        "session-id",
        "session_id",
        "originator",
        "x-stainless-lang",
        "x-openai-internal-codex-responses-lite",
        "openai-beta",
        "idempotency-key",
        "host",
        "authorization",
        "content-length",
        "accept-encoding",
    }
    assert received.header("authorization") == f"Bearer {UPSTREAM_KEY}"
    assert received.header("accept-encoding") == "identity"
    assert received.header("host") == upstream.url.split("/")[2]
    assert answer.headers["x-request-id"] == "req_upstream"
    assert answer.headers["openai-processing-ms"] == "12"
    assert answer.headers["x-codex-turn-state"] == "abc"
    dropped = (
        "set-cookie server alt-svc openai-organization openai-project x-accel-redirect "
        "x-ratelimit-limit-requests x-hop"
    )
    assert not set(dropped.split()) & set(answer.headers)


OF_THE_ORIGIN = """
strict-transport-security: max-age=31536000; includeSubDomains; preload
clear-site-data: "*"
refresh: 0;url=https://evil.example
link: </dashboard/login>; rel=preload
content-security-policy: report-uri https://evil.example
content-security-policy-report-only: default-src 'none'
report-to: {"group":"x","endpoints":[{"url":"https://evil.example"}],"max_age":1}
reporting-endpoints: x="https://evil.example"
nel: {"report_to":"x","max_age":1}
permissions-policy: camera=*
service-worker-allowed: /
sourcemap: https://evil.example/map
x-sourcemap: https://evil.example/map
x-frame-options: ALLOWALL
www-authenticate: Basic realm="the dashboard"
proxy-authenticate: Basic
proxy-authentication-info: x
access-control-allow-origin: https://evil.example
access-control-allow-credentials: true
access-control-expose-headers: x
access-control-allow-private-network: true
cross-origin-opener-policy: unsafe-none
cross-origin-resource-policy: cross-origin
origin-agent-cluster: ?1
set-cookie: session=x; Path=/dashboard
use-as-dictionary: match="/dashboard/*"
public-key-pins: pin-sha256="x"; max-age=1
accept-ch: DPR
alt-svc: h3="evil.example:443"
x-sendfile: /etc/passwd
x-accel-redirect: /metrics
x-litespeed-location: /metrics
x-envoy-immediate-health-check-fail: 1
surrogate-control: content="ESI/1.0"
speculation-rules: "/rules"
"""
OF_THE_ANSWER = """
openai-version: 2020-10-01
openai-processing-ms: 12
openai-model: gpt-up
x-request-id: req_upstream
retry-after: 3
retry-after-ms: 2500
x-should-retry: true
x-codex-turn-state: abc
x-codex-primary-used-percent: 12
x-models-etag: W/"1"
x-new-thing: 7
cf-ray: 1-FRA
cf-cache-status: DYNAMIC
date: Sat, 28 Nov 2026 10:00:00 GMT
cache-control: no-store
content-language: en
content-disposition: attachment
x-content-type-options: nosniff
etag: "1"
age: 5
location: /v1/responses/resp_1
"""


def header_of(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value


@pytest.mark.parametrize("path", ["/responses", "/responses/resp_1"])
def test_an_answer_cannot_act_on_the_gateways_origin(
    gateway: Gateway, upstream: Upstream, key: str, path: str
) -> None:
    """Headers that browsers and proxies apply beyond the one response are removed, and all others
    forwarded, for stored responses as well."""
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).is_success
        dropped, passed = (
            [header_of(line) for line in lines.strip().splitlines()]
            for lines in (OF_THE_ORIGIN, OF_THE_ANSWER)
        )
        upper = [(name.title(), value) for name, value in dropped]
        upstream.script = json_answer(response_object(), headers=[*upper, *passed])
        method = "POST" if path == "/responses" else "GET"
        answer = client.request(method, path, json=RESPONSE if method == "POST" else None)
    assert answer.is_success
    assert not {name for name, _ in dropped} & {*answer.headers}
    assert {name: answer.headers.get_list(name) for name, _ in passed} == {
        name: [value] for name, value in passed
    }


def test_an_upstream_that_is_a_gateway_as_well_names_no_row(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    sent = [("x-redbtc-request-id", "req_theirs"), ("x-request-id", "req_theirs")]
    upstream.script = json_answer(response_object(), headers=sent)
    with gateway.client(key) as client:
        answer = client.post("/responses", json=RESPONSE)
    assert answer.headers["x-request-id"] == "req_theirs"
    assert answer.headers.get_list("x-redbtc-request-id") == [gateway.row()["request_id"]]


BODIES = {
    "none": b"Content-Length: 0\r\n\r\n",
    "none, but a length": b"Content-Length: 5\r\n\r\n",
    "a length": b"Content-Length: 5\r\n\r\nhello",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "no framing": b"\r\nhello",
    "an answer": b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "JSON": b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    "events": b"Content-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: x\n\n",
    "gzip": b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
def test_an_answer_that_has_no_body_ends_with_its_head(
    make_gateway: MakeGateway, upstream: Upstream, transport: str
) -> None:
    """After a 204 or 304 (RFC 9110 §6.4.1) the next bytes on a connection are the next answer's,
    whatever the upstream sends; clients refuse a 204 with a length (§8.6)."""
    gateway = make_gateway(upstream_settings=f'transport = "{transport}"').start()
    key = gateway.new_key()
    ask = b"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\n" % key.encode()
    ask += b'content-type: application/json\r\ncontent-length: 25\r\n\r\n{"model":"m","input":"x"}'
    last = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    for status in (b"204 No Content", b"304 Not Modified"):
        for name, rest in BODIES.items():
            answer = b"HTTP/1.1 " + status + b"\r\n" + rest

            async def script(_: Received, reply: Reply, answer: bytes = answer) -> None:
                await reply.raw(answer)
                reply.close()

            upstream.script = script
            got = gateway.raw(ask + last, until_close=True)
            head, _, after = got.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status), (status, name, got)
            assert after.startswith(b"HTTP/1.1 200 OK\r\n"), (status, name, got)
            assert after.endswith(b'{"status":"ok"}')
            assert b"transfer-encoding" not in head
            assert status[:3] == b"304" or b"content-length" not in head
    rows = gateway.rows()
    assert len(rows) == 2 * len(BODIES)
    assert {row["outcome"] for row in rows} == {"completed"}
    assert {row["usage_source"] for row in rows} == {"none"}


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        ("no-cache", True),
        ("no-store", True),
        ("private, max-age=60", True),
        ("public, max-age=60", False),
        ("no-transform, Max-Age=60", False),
        ("Max-Age=60, S-MaxAge=60", False),
        ("max-age=60, must-revalidate", False),
        ("no-store, no-cache, must-revalidate", False),
    ],
)
def test_no_shared_cache_may_keep_an_answer(
    gateway: Gateway, upstream: Upstream, key: str, value: str, passes: bool
) -> None:
    """A cache in front of the gateway would give one account's response to another."""
    more = [
        ("cdn-cache-control", "public"),
        ("expires", "Thu, 01 Jan 2099 00:00:00 GMT"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
    ]
    for headers in ([("cache-control", value)], [("Cache-Control", value), *more]):
        upstream.script = json_answer(response_object(), headers=headers)
        with gateway.client(key) as client:
            answer = client.post("/responses", json=RESPONSE)
        assert answer.headers.get("cache-control") == (value if passes else "no-store")
        assert not {"cdn-cache-control", "expires", "x-hop"} & {*answer.headers}


@pytest.mark.parametrize(
    ("content_types", "inert"),
    [
        (["application/json"], False),
        (["Application/JSON; charset=utf-8"], False),
        (["text/event-stream; charset=utf-8"], False),
        (["text/html"], True),
        (["image/svg+xml"], True),
        (["application/json, text/html"], True),
        (["application/json; x=y, text/html"], True),
        (["application/jsonx"], True),
        (["application/json", "text/html"], True),
        ([], True),
    ],
)
def test_a_browser_runs_nothing_of_an_answer(
    gateway: Gateway, upstream: Upstream, key: str, content_types: list[str], inert: bool
) -> None:
    """An upstream's HTML would run in the dashboard's origin; JSON and events can't."""

    async def script(_: Received, reply: Reply) -> None:
        headers = [("content-type", each) for each in content_types]
        policies = [("content-security-policy", "x"), ("x-content-type-options", "x")]
        await reply.head(200, [*headers, *policies], "length:2")
        await reply.send(b"{}")

    upstream.script = script
    with gateway.client(key) as client:
        answer = client.post("/responses", json=RESPONSE)
    assert answer.headers.get("content-security-policy") == ("sandbox" if inert else None)
    assert answer.headers.get("x-content-type-options") == ("nosniff" if inert else "x")
    assert answer.headers.get_list("content-type") == content_types


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
@pytest.mark.front_door
def test_an_upstreams_error_passes_unchanged(
    gateway: Gateway, upstream: Upstream, key: str, status: int
) -> None:
    body = b'{"error": {"message": "no",  "type": "x", "param": null, "code": "y"}}'
    upstream.script = json_answer(body, status, [("retry-after", "7")])
    with gateway.client(key) as client:
        answer = client.post("/responses", json=RESPONSE)
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers["retry-after"] == "7"
    row = gateway.row()
    assert (row["outcome"], row["status"]) == ("upstream_error", status)
    assert row["usage_source"] == "none"


def test_no_redirect_is_followed(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.script = json_answer(b"{}", 307, [("location", f"{upstream.url}/elsewhere")])
    with gateway.client(key) as client:
        answer = client.post("/responses", json=RESPONSE, follow_redirects=False)
    assert answer.status_code == 307
    assert len(upstream.requests) == 1


def test_a_multipart_body_passes_and_its_model_is_found_after_the_file(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    picture = b"\x89PNG" + bytes(range(256)) * 400 + b'\r\nname="model"\r\n\r\nnot-this\r\n'
    with gateway.client(key) as client:
        request = client.build_request(
            "POST",
            "/images/edits",
            files=[
                ("image[]", ("model", picture, "image/png")),
                ("prompt", (None, "model")),
                ("model", (None, "gpt-image-2")),
            ],
        )
        request.read()
        answer = client.send(request)
    assert answer.status_code == 200
    assert upstream.requests[0].body == request.content
    assert upstream.requests[0].header("content-type") == request.headers["content-type"]
    row = gateway.row()
    assert row["requested_model"] == "gpt-image-2"
    assert (row["input_tokens"], row["image_input_tokens"]) == (50, 40)
    assert (row["output_tokens"], row["image_output_tokens"]) == (272, 272)


def test_models_are_joined_in_order_and_by_pattern(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    two = "".join(
        f'\n[[upstreams]]\nname = "{name}"\nbase_url = "{upstream.url}"\n'
        f'api_key_env = "TEST_UPSTREAM_KEY"\nmodels = {models}\n'
        for name, models in (("one", '["gpt-o*"]'), ("two", '["gpt-up"]'))
    )
    gateway = make_gateway(two).start()
    with gateway.client(gateway.new_key()) as client:
        assert [model["id"] for model in client.get("/models").json()["data"]] == [
            "gpt-other",
            "gpt-up",
        ]
        assert client.get("/models/gpt-up").json()["id"] == "gpt-up"
        missing = client.post("/responses", json={**RESPONSE, "model": "gpt-7"})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["@cf/meta/llama+x", "~a/b@2", "ft:gpt-5:acme::x"])
def test_models_have_names_of_many_forms(
    gateway: Gateway, upstream: Upstream, key: str, name: str
) -> None:
    async def describe(received: Received, reply: Reply) -> None:
        await reply.head(framing="length:2")
        await reply.send(b"{}")

    upstream.script = describe
    with gateway.client(key) as client:
        assert client.get(f"/models/{name}").status_code == 200
    assert upstream.requests[0].path == f"/v1/models/{name}"


def test_a_chat_error_event_after_200_is_an_upstream_error(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    pieces = [*chat_pieces(["Hi"])[:2], event({"error": {"message": "x", "code": "y"}})]
    upstream.script = stream(pieces)
    with gateway.client(key) as client:
        answer = client.post("/chat/completions", json={**CHAT, "stream": True})
    assert answer.content == b"".join(pieces)
    assert gateway.row()["outcome"] == "upstream_error"


@pytest.mark.parametrize("seed", range(4))
def test_a_long_stream_is_the_same_however_it_comes(
    gateway: Gateway, upstream: Upstream, key: str, seed: int
) -> None:
    """Whole events, halves and heaps of them, fast and slow, to a client that now and then sleeps:
    most pass without a task's waking, and none overtakes another."""
    chance = random.Random(seed)
    words = [f"word{number} " * chance.choice([1, 1, 1, 3000]) for number in range(600)]
    events = response_pieces(words)
    pieces: list[bytes] = []
    while events:
        count = chance.choice([1, 1, 1, 5])
        whole, events = b"".join(events[:count]), events[count:]
        cut = chance.randrange(len(whole)) if chance.random() < 0.2 else 0
        pieces += [whole[:cut], whole[cut:]]

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        for piece in pieces:
            await reply.send(piece)
            if chance.random() < 0.2:
                await asyncio.sleep(0.002)
        await reply.end()

    upstream.script = script
    received = bytearray()
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        for part in answer.iter_raw():
            received += part
            if chance.random() < 0.01:
                time.sleep(0.1)
    assert bytes(received) == b"".join(pieces)
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")
    assert row["output_tokens"] == 9


# ── After the end ────────────────────────────────────────────────────────────────────────────────


COMPLETED = response_pieces(["Hel", "lo"])


async def keep_open(reply: Reply) -> None:
    await asyncio.sleep(600)


async def comment_for_ever(reply: Reply) -> None:
    while True:
        await reply.send(b": ping\n\n")
        await asyncio.sleep(0.02)


async def flood(reply: Reply) -> None:
    while True:
        await reply.send(b": " + b"x" * 65536 + b"\n\n")


async def flood_events(reply: Reply) -> None:
    while True:
        await reply.send(b'data: {"type":"keepalive"}\n\n' * 2000)


async def flood_lines(reply: Reply) -> None:
    while True:
        await reply.send(b"\n" * 65536)
        await asyncio.sleep(0.01)


async def tear(reply: Reply) -> None:
    await asyncio.sleep(0.05)  # else the reset takes what is still on its way along
    reply.tear()


async def close(reply: Reply) -> None:
    reply.close()


async def break_the_framing(reply: Reply) -> None:
    await reply.raw(b"no chunk at all\r\n")
    await asyncio.sleep(600)


async def begin_an_event(reply: Reply) -> None:
    await reply.send(b'event: response.completed\ndata: {"type"')
    await asyncio.sleep(600)


FLOODS = [flood, flood_events, flood_lines]
AFTERWARDS = [keep_open, comment_for_ever, *FLOODS, tear, close, break_the_framing, begin_an_event]
STREAMS = {
    "/responses": b"".join(COMPLETED),
    "/chat/completions": b"".join(chat_pieces(["Hi"], asked=False)),
    "/images/generations": b"".join(images_pieces(1)),
}
FRAMINGS = ["chunked", "length:100000000", "close"]


def test_after_the_event_that_ends_it_a_stream_ends_cleanly_and_soon(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """This holds whatever the upstream does after that event."""
    gateway = make_gateway({"limits": {"account": {"concurrency": 0}}}).start()
    key = gateway.new_key()

    async def script(request: Received, reply: Reply) -> None:
        number, _, framing = request.json()["model"].partition(" ")
        await reply.head(200, [("content-type", "text/event-stream")], framing)
        await reply.send(STREAMS[request.path.removeprefix("/v1")])
        await AFTERWARDS[int(number)](reply)

    def ask(case: tuple[str, int, str]) -> bytes:
        path, number, framing = case
        body = {"model": f"{number} {framing}", "stream": True, "messages": []}
        return client.post(path, json=body).content  # raises where the answer is torn

    upstream.script = script
    cases = list(itertools.product(STREAMS, range(len(AFTERWARDS)), FRAMINGS))
    with gateway.client(key, timeout=60) as client, ThreadPoolExecutor(len(cases)) as pool:
        for case, content in zip(cases, pool.map(ask, cases), strict=True):
            assert content.startswith(STREAMS[case[0]]), case
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * len(cases)
    assert all(request.finished.wait(60) for request in upstream.requests)
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)


def test_what_follows_the_end_within_its_time_passes(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    follows = [b": trailing\n\n", DONE, b"x" * 300_000, b"garbage\xff"]
    upstream.script = stream([*COMPLETED, *follows], pause=0.01)
    with gateway.client(key) as client:
        answers = [client.post("/responses", json={**RESPONSE, "stream": True}) for _ in range(2)]
    assert [answer.content for answer in answers] == [b"".join([*COMPLETED, *follows])] * 2
    assert upstream.connections == 1, "the connection is used again"


def test_each_of_several_images_is_waited_for(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """The `completed` event of the first image does not end the stream."""
    pieces = images_pieces(0)

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(pieces[0])
        await asyncio.sleep(1.2)
        await reply.send(pieces[0])
        await asyncio.sleep(600)

    upstream.script = script
    body = {"model": "gpt-up", "prompt": "x", "stream": True, "n": 2}
    with gateway.client(key) as client:
        assert client.post("/images/generations", json=body).content == pieces[0] * 2
        upstream.script = stream(pieces)  # only one was made
        assert client.post("/images/generations", json=body).content == pieces[0]
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 2


def test_what_follows_more_pictures_than_were_asked_for_passes_in_order(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Comments overtook a picture that had just been let go."""

    def picture(kind: str, size: int) -> bytes:
        kind = f"image_generation.{kind}"
        return event({"type": kind, "b64_json": "A" * size, "usage": IMAGE_USAGE}, kind)

    parts = [picture("partial_image", 12_000)] * 3
    pieces = [picture("completed", 30_000), *parts, *[b": ping\n\n"] * 3]
    upstream.script = stream([*pieces, picture("completed", 30_000)], pause=0.1)
    body = {"model": "gpt-up", "prompt": "x", "stream": True}
    with gateway.client(key) as client:
        content = client.post("/images/generations", json=body).content
    assert content == b"".join([*pieces, pieces[0]])
    assert gateway.row()["output_tokens"] == 2 * 272


def test_a_place_is_free_again_though_the_upstream_goes_on(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[limits]\nqueue_seconds = 30\n").start()
    key = gateway.new_key("one", concurrency=1)

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b"".join(COMPLETED))
        await comment_for_ever(reply)

    upstream.script = script
    with gateway.client(key) as client:
        for _ in range(3):
            assert client.post("/responses", json={**RESPONSE, "stream": True}).is_success
    assert upstream.max_in_flight == 1


def test_the_answer_of_a_slow_reader_ends_cleanly_too(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """The client reads nothing until long after the end, and more follows than the kernel holds."""
    follows = b": " + b"x" * (16 << 20) + b"\n\n"

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b"".join(COMPLETED))
        await reply.send(follows)
        await asyncio.sleep(600)

    upstream.script = script
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        time.sleep(1.5)
        got = answer.read()
    whole = b"".join(COMPLETED) + follows
    assert len(got) > len(whole) - len(follows)
    assert whole.startswith(got)


def test_a_client_that_reads_nothing_is_let_go_of_though_chunks_are_large(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Large chunks are metered while the clock stands; it goes on while they are sent."""
    settings = "total_timeout_seconds = 3\nidle_timeout_seconds = 1"
    gateway = make_gateway("", settings).start()
    delta = event({"type": "response.output_text.delta", "delta": "x" * (64 << 10)})
    upstream.script = stream(response_pieces(["Hello"])[:2] + [delta] * 300)
    with gateway.begin(gateway.new_key(), {**RESPONSE, "stream": True}):
        wait_until(lambda: [row["outcome"] for row in gateway.rows()] == ["client_disconnected"])


def test_a_client_that_does_not_read_the_end_keeps_no_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[limits]\nqueue_seconds = 5\n").start()
    key = gateway.new_key("one", concurrency=1)

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b"".join(COMPLETED))
        await reply.send(b": " + b"x" * (16 << 20) + b"\n\n")

    upstream.script = script
    with gateway.begin(key, {**RESPONSE, "stream": True}), gateway.client(key) as client:
        wait_until(lambda: [row["outcome"] for row in gateway.rows()] == ["completed"])
        upstream.script = json_answer(response_object())
        assert client.post("/responses", json=RESPONSE).status_code == 200
        # The request's body is kept no longer, either.
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0, 30)


@pytest.mark.parametrize("afterwards", [tear, close])
def test_a_torn_stream_still_looks_torn_before_its_end(
    gateway: Gateway,
    upstream: Upstream,
    key: str,
    afterwards: Callable[[Reply], Awaitable[None]],
) -> None:
    """This also holds for a stream with a Content-Length."""

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")], "length:10000")
        await reply.send(b"".join(COMPLETED[:-1]))
        await afterwards(reply)

    upstream.script = script
    with gateway.client(key) as client, pytest.raises(httpx2.RemoteProtocolError):
        client.post("/responses", json={**RESPONSE, "stream": True})
    assert gateway.row()["outcome"] == "upstream_failed"
