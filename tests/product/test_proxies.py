"""nginx and Caddy in front of the gateway, as deploy/ configures them."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from websockets.sync.client import connect

from tests.helpers.certificates import Authority
from tests.helpers.gateway import USUAL, Gateway
from tests.helpers.proxies import HEAD_SECONDS, TEMPORARY, Proxy, running_proxy
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    response_object,
    ws_like_openai,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_6]
SpawnProxy = Callable[[int], Proxy]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=["nginx", "caddy"])
def spawn_proxy(
    request: pytest.FixtureRequest, tmp_path: Path, authority: Authority
) -> Iterator[SpawnProxy]:
    """Runs the proxy in front of a port."""
    with contextlib.ExitStack() as stack:

        def run(port: int) -> Proxy:
            running = running_proxy(str(request.param), tmp_path / "proxy", port, authority)
            return stack.enter_context(running)

        yield run


@pytest.fixture
def proxy(gateway: Gateway, spawn_proxy: SpawnProxy) -> Proxy:
    return spawn_proxy(gateway.port)


def authorized(key: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **more}


def test_requests_and_events_pass_at_once(
    proxy: Proxy, gateway: Gateway, upstream: Upstream, key: str
) -> None:
    arrived = [threading.Event(), threading.Event()]

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b'data: {"type":"response.created"}\n\n')
        await reply.wait(arrived[0])
        await reply.send(b'data: {"type":"response.in_progress"}\n\n')
        await reply.wait(arrived[1])
        await reply.send(b'data: {"type":"response.completed"}\n\n')
        await reply.end()

    upstream.script = script
    body = {"model": "m", "input": "x", "stream": True}
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/responses", json=body, headers=authorized(key)) as answer,
    ):
        assert answer.http_version == "HTTP/2"
        parts = answer.iter_raw()
        for name, event in zip((b"created", b"in_progress"), arrived, strict=True):
            assert name in next(parts), "each event passes at once"
            event.set()
        assert b"completed" in b"".join(parts)
    assert gateway.row()["outcome"] == "completed"


@pytest.mark.parametrize("http2", [False, True])
def test_bytes_pass_unchanged_over_kept_connections(
    proxy: Proxy, gateway: Gateway, upstream: Upstream, key: str, http2: bool
) -> None:
    upstream.script = json_answer(response_object())
    headers = authorized(key, session_id="s1", **{"accept-encoding": "gzip, zstd"})
    sent = b'{ "model":"m",   "input":"\xc3\xbc" }'
    headers["content-type"] = "application/json"
    before = gateway.connections()
    with proxy.client(http2) as client:
        for _ in range(40):
            answer = client.post("/v1/responses", content=sent, headers=headers)
            assert answer.status_code == 200, answer.text
            assert "content-encoding" not in answer.headers
            assert json.loads(answer.content) == response_object()
            assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert upstream.requests[-1].body == sent
    assert upstream.requests[-1].header("session_id") == "s1"
    assert gateway.connections() <= before + 2, "connections to the gateway are used again"


def test_a_turn_over_a_websocket(proxy: Proxy, upstream: Upstream, key: str) -> None:
    upstream.talk = ws_like_openai
    url = f"wss://localhost:{proxy.port}/v1/responses"
    with connect(
        url, additional_headers=authorized(key), ssl=proxy.context(), proxy=None
    ) as client:
        client.send(json.dumps({"type": "response.create", "model": "m", "input": "x"}))
        events = [json.loads(client.recv()) for _ in range(3)]
    assert events[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/metrics", 404),
        ("//metrics", 404),
        ("/%6detrics", 404),
        ("/x/../metrics", 404),
        ("/metrics?x", 404),
        ("/admin/v1/accounts", 404),
        ("/admin/v1/openapi.json", 404),
        ("/admin/v1/me/../accounts", 404),
        ("/admin/v1/me/%2e%2e/accounts", 404),
        ("/admin/v1/me", 200),
        ("/admin/v1/me/limits", 200),
        ("/healthz", 200),
        ("/status", 200),
        ("/dashboard/style.css", 200),
    ],
)
def test_what_is_for_operators_is_closed(
    proxy: Proxy, gateway: Gateway, key: str, path: str, status: int
) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    answer = exchange(proxy, f"{head}Connection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"redbtc_requests_total" not in answer


def exchange(proxy: Proxy, data: bytes) -> bytes:
    """Send bytes over TLS; return all that comes until the connection ends."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", proxy.port), 100) as plain,
        proxy.context().wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        sock.sendall(data)
        with contextlib.suppress(OSError):
            while part := sock.recv(65536):
                answer += part
    return answer


def test_the_gateway_learns_the_address_of_the_client(
    upstream: Upstream, spawn_proxy: SpawnProxy
) -> None:
    """Put the test's own server in the gateway's place, to see what the gateway would."""
    upstream.script = json_answer({})
    proxy = spawn_proxy(int(upstream.url.rpartition(":")[2].partition("/")[0]))
    forged = {"x-forwarded-for": "198.51.100.7", "x-forwarded-proto": "http"}
    forged |= {"upgrade": "h2c", "connection": "upgrade"}
    with proxy.client(http2=False, address="127.0.0.9") as client:
        client.post("/v1/responses", json={}, headers=forged)
    (seen,) = [each for each in upstream.requests if each.method == "POST"]
    shown = [value for name, value in seen.headers if name.lower() == b"x-forwarded-for"]
    assert shown == [b"127.0.0.9"]
    assert seen.header("x-forwarded-proto") == "https"
    assert seen.header("host") == f"localhost:{proxy.port}"
    assert seen.header("upgrade") is None
    assert (seen.header("connection") or "keep-alive").lower() == "keep-alive"


def test_a_large_body_passes_without_a_file(
    proxy: Proxy, gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """100 MB, at a proxy whose folders for files can't be used."""
    for name in TEMPORARY:
        if (proxy.folder / name).exists():
            shutil.rmtree(proxy.folder / name)
            (proxy.folder / name).touch()
    upstream.script = json_answer(response_object())
    start, end = b'{"model":"m","input":"', b'"}'
    headers = authorized(key, **{"content-type": "application/json"})
    for http2, size in ((False, 104_857_600), (True, 3_000_000)):
        body = start + b"x" * (size - len(start) - len(end)) + end
        with proxy.client(http2) as client:
            answer = client.post("/v1/responses", content=body, headers=headers)
            assert answer.status_code == 200, answer.text[:300]
        assert upstream.requests[-1].body == body
    served = len(upstream.requests)
    with proxy.client(http2=False) as client, contextlib.suppress(httpx2.TransportError):
        body = b"x" * (104_857_600 + 1)  # while it is sent, the connection may be closed
        assert client.post("/v1/responses", content=body, headers=headers).status_code == 413
    assert len(upstream.requests) == served


def test_a_slow_head_is_cut(proxy: Proxy, gateway: Gateway) -> None:
    began = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", proxy.port), 100) as plain,
        proxy.context().wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 60:
                sock.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(1000):
                        break
    assert HEAD_SECONDS / 2 < time.monotonic() - began < 30
    assert gateway.connections() <= 1, "the gateway was not bothered"


def test_a_request_that_was_sent_is_not_sent_again(
    upstream: Upstream, spawn_proxy: SpawnProxy
) -> None:
    """Put the test's own server in the gateway's place, and let it break off."""
    upstream.script = json_answer({})
    proxy = spawn_proxy(int(upstream.url.rpartition(":")[2].partition("/")[0]))

    async def torn(_: Received, reply: Reply) -> None:
        reply.tear()

    with proxy.client() as client:
        upstream.script = torn
        headers = {"idempotency-key": "k"}
        assert client.post("/v1/responses", json={}, headers=headers).status_code == 502
    assert sum(each.method == "POST" for each in upstream.requests) == 1


def test_keys_are_not_accepted_without_tls(proxy: Proxy, gateway: Gateway, key: str) -> None:
    def ask(path: str) -> httpx2.Response:
        headers = {"host": "localhost", **authorized(key)}
        return httpx2.get(f"http://127.0.0.1:{proxy.plain_port}{path}", headers=headers, **USUAL)

    assert (ask("/v1/models").status_code, ask("/v1/models").text) == (403, "Use https.\n")
    assert ask("/admin/v1/me").status_code == 403
    answer = ask("/dashboard/?x=1")
    assert answer.status_code == 301
    assert answer.headers["location"].endswith("/dashboard/?x=1")
    assert answer.headers["location"].startswith("https://localhost")
